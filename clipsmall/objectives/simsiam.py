"""SimSiam: each modality predicts the other, and only the prediction learns."""

import math

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed.batch_norm import moments
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import dots


def simsiam(rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
    """SimSiam between the modalities (Chen & He 2020, arXiv 2011.10566, eq. 1 to 4).

    L = −½ mean_i [ cos(h_I(x_i), sg y_i) + cos(h_T(y_i), sg x_i) ],  h the predictors, sg without
    gradient.

    There are no negatives: nothing but the stopped gradient and the predictors' batch normalisation
    keeps all embeddings from becoming one; look at `spread`. In the paper a batch of 64 costs 2
    points of 68.

    Of two towers the *prediction* of one learns to match the other: plain cosines of image and text
    stay at chance, and everything that retrieves must go through the predictors. Image-text
    objectives without negatives do poorly in zero-shot recognition (nCLIP, arXiv 2210.09304): use
    it as a second term beside a contrastive one, or to learn how it fails.

    Args:
        rows: my b pairs, with `image_predicted`, `text_predicted` (b, D) of the head `predictors`;
            its `hidden` should not be the paper's ¼, see there. columns: not looked at.

    Returns `loss` (mean over my rows, −1 at best) and `spread` (over all ranks, see there).
    """
    by_image = dots(unit(rows.extra["image_predicted"]), rows.text.detach())
    by_text = dots(unit(rows.extra["text_predicted"]), rows.image.detach())
    return {"loss": -(by_image.mean() + by_text.mean()) / 2, "spread": spread(rows)}


def spread(rows: Embeddings) -> Tensor:
    """√D times the mean standard deviation of an embedding's coordinates, over the global batch and
    both modalities.

    Near 1 where the unit vectors fill the sphere, 0 where they have collapsed into one (arXiv
    2011.10566, §4.1).
    """
    image, text = (moments(x.detach())[2].sqrt().mean() for x in (rows.image, rows.text))
    mean: Tensor = (image + text) / 2
    return mean * math.sqrt(rows.image.shape[1])
