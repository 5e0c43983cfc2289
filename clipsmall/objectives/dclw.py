"""DCL with weighted positives: pairs that are aligned already count less."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives.dcl import IntraModal, decoupled
from clipsmall.objectives.spec import ObjectiveSpec


def dclw(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    intra_modal: IntraModal = False,
    sigma: Annotated[float, Field(gt=0, description="dclw: temperature of the weights")] = 0.5,
) -> dict[str, Tensor]:
    """Weighted decoupled contrastive loss between the modalities.

    Also known as:
        DCLW, the von Mises-Fisher weighted DCL.

    Formula:
        L = ½ mean_i [ log Σ_{j≠i} e^{S_ij} − w_i S_ii ] + the same over columns,
        S = logit_scale · cosines,  w_i = 2 − N softmax_i(cos_ii / sigma), without gradient.

    Source:
        Yeh et al. 2022, arXiv 2110.06848, eq. 6.

    When to use:
        As `dcl`, where easy pairs dominate: the weight moves the pull to pairs that are still far
        apart.

    When not:
        As `dcl`; and where pairs that stay far apart are mostly wrong captions.

    Related:
        `dcl`, which it is as `sigma` grows; both read the config section `dcl`.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out.
        intra_modal: the other images are negatives of an image, too, and texts of a text.
        sigma: temperature of the weights.

    Returns:
        `loss` () mean over my rows; `accuracy` (); `effective_negatives` ().

    Raises:
        ValueError: a batch of one pair, which has no negative.

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> round(dclw(pairs, pairs)["loss"].item(), 4)  # equal pairs weigh 1: dcl's loss
        -0.9014
    """
    return decoupled(rows, columns, mask_duplicates, intra_modal, sigma)


SPEC = ObjectiveSpec(dclw, section="dcl", queue=True)
