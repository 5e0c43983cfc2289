"""SimSiam: each modality predicts the other, and only the prediction learns."""

import math

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed.batch_norm import moments
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import dots
from clipsmall.objectives.spec import ObjectiveSpec


def simsiam(rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
    """Cosine between each modality's prediction of the other and the other, without negatives.

    Also known as:
        SimSiam, symmetric negative cosine similarity with stop-gradient.

    Formula:
        L = −½ mean_i [ cos(h_I(x_i), sg y_i) + cos(h_T(y_i), sg x_i) ],
        h the predictors, sg without gradient.

    Source:
        Chen & He 2020, arXiv 2011.10566, eq. 1 to 4.

    When to use:
        As a second term beside a contrastive one, or to learn how it fails. In the paper a batch of
        64 costs 2 points of 68.

    When not:
        As the only objective for zero-shot recognition: image-text objectives without negatives do
        poorly there (nCLIP, arXiv 2210.09304). Nothing but the stopped gradient and the predictors'
        batch normalisation keeps all embeddings from becoming one: look at `spread`.

    Related:
        `byol`, with an averaged copy of the towers as the target. In both the *prediction* of one
        tower learns to match the other: plain cosines of image and text stay at chance, and
        everything that retrieves must go through the predictors.

    Args:
        rows: my b pairs, with `image_predicted`, `text_predicted` (b, D) of the head `predictors`;
            its `hidden` should not be the paper's ¼, see there.
        columns: not looked at.

    Returns:
        `loss` () mean over my rows, −1 at best; `spread` () over all ranks, see `spread`.

    Examples:
        >>> import torch
        >>> eye = torch.eye(4)
        >>> pairs = Embeddings.of(eye, eye, image_predicted=eye, text_predicted=eye)
        >>> simsiam(pairs, pairs)["loss"].item()
        -1.0
    """
    predicted_text = unit(rows.extra["image_predicted"])
    predicted_image = unit(rows.extra["text_predicted"])

    # (b,) cosines; only the predictions learn
    by_image = dots(predicted_text, rows.text.detach())
    by_text = dots(predicted_image, rows.image.detach())
    cosines = by_image.mean() + by_text.mean()
    return {
        "loss": -cosines / 2,
        "spread": spread(rows),
    }


def spread(rows: Embeddings) -> Tensor:
    """() √D times the mean standard deviation of an embedding's coordinates.

    Over the global batch and both modalities. Near 1 where the unit vectors fill the sphere, 0
    where they have collapsed into one (arXiv 2011.10566, §4.1).
    """
    # (D,) over all ranks
    _, _, image_variance = moments(rows.image.detach())
    _, _, text_variance = moments(rows.text.detach())

    image = image_variance.sqrt().mean()
    text = text_variance.sqrt().mean()
    mean: Tensor = (image + text) / 2

    # unit vectors that fill the sphere have a standard deviation of 1/√D
    width = rows.image.shape[1]
    return mean * math.sqrt(width)


SPEC = ObjectiveSpec(
    simsiam,
    section="simsiam",
    heads={"predictors": {}},
    scale=None,
    retrieval_head=lambda options: "predictors",
)
