"""Triplet loss: the true pair must lead every other pair by a margin."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity
from clipsmall.objectives.pairs import comparisons, dots, layout_of, negative_counts
from clipsmall.objectives.spec import ObjectiveSpec

# the same option of triplet and of vse++
Margin = Annotated[
    float, Field(gt=0, lt=2, description="cosine by which the true pair must lead others")
]
MARGIN = 0.2


def triplet(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    margin: Margin = MARGIN,
) -> dict[str, Tensor]:
    """Sum of hinges over all negatives, both ways; the mean over rows.

    Also known as:
        VSE0, sum of hinges, triplet margin loss with all negatives.

    Formula:
        L = mean_i [ Σ_{j≠i} [margin + cos(I_i, T_j) − cos_ii]₊
        + Σ_{j≠i} [margin + cos(T_i, I_j) − cos_ii]₊ ].

    Source:
        Faghri et al. 2018, arXiv 1707.05612, eq. 5; the mean over rows in place of their sum.

    When to use:
        Batches of 16 to 256, where no temperature is wanted.

    When not:
        Large batches: the sum over columns grows with the batch, and so do its gradients.

    Related:
        `vse++` takes the hardest negative alone.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out.
        margin: of cosines.

    Returns:
        `loss` () mean over my rows; `effective_negatives` ().

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4).roll(1, 0))
        >>> # both ways one wrong partner leads by 1 and costs 1.2, two are level and cost 0.2
        >>> round(triplet(pairs, pairs)["loss"].item(), 4)
        3.2
    """
    layout = layout_of(rows, columns, mask_duplicates)
    count = len(rows.index)
    loss = rows.logit_scale.new_zeros(())
    for x, y, own in comparisons(rows, columns, layout, both_directions=True):
        # a mean over rows, a sum over columns
        weights = x.new_full((count,), 1 / count, dtype=similarity.wide(x))
        # (b,) added to a row's cosines before the hinge
        lead = margin - dots(x, own)
        costs = similarity.total(x, y, layout, hinge, weights, u=lead)
        loss = loss + costs

    negatives = negative_counts(layout).float()
    return {
        "loss": loss,
        "effective_negatives": negatives.mean(),
    }


def hinge(x: Tensor) -> tuple[Tensor, Tensor]:
    """max(x, 0) and its slope."""
    return torch.clamp(x, min=0), (x > 0).to(x.dtype)


SPEC = ObjectiveSpec(triplet, section="triplet", scale=None, queue=True)
