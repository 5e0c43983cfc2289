"""BYOL: each modality predicts the other as a slow copy of its tower sees it."""

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import dots
from clipsmall.objectives.simsiam import spread
from clipsmall.objectives.spec import ObjectiveSpec


def byol(rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
    """Squared distance between each modality's prediction and the other's averaged embedding.

    Also known as:
        BYOL, bootstrap your own latent, mean-teacher regression without negatives.

    Formula:
        L = mean_i [ 2 − 2 cos(q_I(x_i), ȳ_i) ] + mean_i [ 2 − 2 cos(q_T(y_i), x̄_i) ],
        q the predictors; x̄, ȳ made by a moving average of the towers.

    Source:
        Grill et al. 2020, arXiv 2006.07733, eq. 2.

    When to use:
        As a second term beside a contrastive one.

    When not:
        As the only objective for zero-shot recognition, see `simsiam`. In the paper batches below
        256 lose: 72.5 % at 4,096, 71.8 at 256, 69.6 at 128, 59.7 at 64; here batch statistics are
        always those of the whole global batch.

    Related:
        `simsiam`, without the average. In both only predictions match the other modality:
        retrieval goes through the predictors, plain cosines stay at chance, and `spread` shows a
        collapse.

    Args:
        rows: my b pairs, with `image_predicted`, `text_predicted` (b, D) of the head `predictors`,
            whose `hidden` is 16 in the paper (4 does nearly as well), and `image_target`,
            `text_target` (b, D) of the head `momentum`.
        columns: not looked at.

    Returns:
        `loss` () mean over my rows, from 0 to 8; `spread` () over all ranks, see `simsiam.spread`.

    Examples:
        >>> import torch
        >>> eye = torch.eye(4)
        >>> outputs = {"image_predicted": eye, "text_predicted": eye, "image_target": eye}
        >>> pairs = Embeddings.of(eye, eye, text_target=-eye, **outputs)
        >>> byol(pairs, pairs)["loss"].item()  # one direction is right, one is opposite
        4.0
    """
    # (b, D) what is learned
    predicted_text = unit(rows.extra["image_predicted"])
    predicted_image = unit(rows.extra["text_predicted"])

    # (b, D) what it is learned from, without gradient
    text = unit(rows.extra["text_target"].detach())
    image = unit(rows.extra["image_target"].detach())

    # (b,) cosines
    by_image = dots(predicted_text, text)
    by_text = dots(predicted_image, image)
    cosines = by_image.mean() + by_text.mean()
    return {
        "loss": 4 - 2 * cosines,
        "spread": spread(rows),
    }


SPEC = ObjectiveSpec(
    byol,
    section="byol",
    heads={"predictors": {}, "momentum": {}},
    scale=None,
    retrieval_head=lambda options: "predictors",
)
