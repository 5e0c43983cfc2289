"""BYOL: each modality predicts the other as a slow copy of its tower sees it."""

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import dots
from clipsmall.objectives.simsiam import spread


def byol(rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
    """BYOL between the modalities (Grill et al. 2020, arXiv 2006.07733, eq. 2).

    L = mean_i [ 2 − 2 cos(q_I(x_i), ȳ_i) ] + mean_i [ 2 − 2 cos(q_T(y_i), x̄_i) ],  q the
    predictors, and x̄, ȳ made by a moving average of the towers.

    As with `simsiam`, only predictions match the other modality: retrieval goes through the
    predictors, plain cosines stay at chance, and `spread` tells of a collapse. In the paper batches
    below 256 lose: 72.5 % at 4,096, 71.8 at 256, 69.6 at 128, 59.7 at 64; here batch statistics are
    always those of the whole global batch.

    Args:
        rows: my b pairs, with `image_predicted`, `text_predicted` (b, D) of the head `predictors`,
            whose `hidden` is 16 in the paper (4 nearly does), and `image_target`, `text_target` (b,
            D) of the head `momentum` (.996, cosine). columns: not looked at.

    Returns `loss` (mean over my rows, from 0 to 8) and `spread` (over all ranks, see simsiam.py).
    """
    by_image = dots(unit(rows.extra["image_predicted"]), unit(rows.extra["text_target"].detach()))
    by_text = dots(unit(rows.extra["text_predicted"]), unit(rows.extra["image_target"].detach()))
    return {"loss": 4 - 2 * (by_image.mean() + by_text.mean()), "spread": spread(rows)}
