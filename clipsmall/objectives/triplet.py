"""Triplet losses: the true pair must lead every other, or the best other, by a margin."""

from typing import Any

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import dots, layout, negatives, picked, ways


def triplet(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True, margin: float = 0.2
) -> dict[str, Tensor]:
    """VSE0: the sum of hinges (Faghri et al. 2018, arXiv 1707.05612, eq. 5), mean over rows instead
    of their sum.

    L = mean_i [ Σ_{j≠i} [margin + cos(I_i, T_j) − cos_ii]₊ + Σ_{j≠i} [margin + cos(T_i, I_j) −
    cos_ii]₊ ].

    No temperature. Works at batches of 16 to 256; the sum over columns grows with the batch, and so
    do its gradients.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out.

    Returns `loss` (mean over my rows), `effective_negatives`.
    """
    place = layout(rows, columns, mask_duplicates)
    loss = rows.logit_scale.new_zeros(())
    for x, y, own in ways(rows, columns, place, both=True):
        share = x.new_full((len(x),), 1 / len(x), dtype=similarity.wide(x))
        loss = loss + similarity.total(x, y, place, hinge, share, u=margin - dots(x, own))
    return {"loss": loss, "effective_negatives": negatives(place).float().mean()}


def hinge(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clamp(min=0), (x > 0).to(x.dtype)


def max_of_hinges(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True, margin: float = 0.2
) -> dict[str, Tensor]:
    """VSE++'s max of hinges without its warm-up; see `VsePlusPlus`."""
    place = layout(rows, columns, mask_duplicates)
    if place.ring:
        raise ValueError(
            "vse++ looks its hardest negatives up among all columns; use objective.exchange=gather"
        )
    loss = rows.logit_scale.new_zeros(())
    broken = rows.logit_scale.new_zeros(())
    for x, y, own in ways(rows, columns, place, both=True):
        best, at = similarity.nearest(x, y, place)
        lead = margin + dots(x, picked(y, at)) - dots(x, own)
        # every column has the row's caption
        costs = lead.clamp(min=0).masked_fill(best == -torch.inf, 0.0)
        loss = loss + costs.mean()
        broken = broken + (costs > 0).float().mean() / 2
    return {"loss": loss, "within_margin": broken.detach(), "effective_negatives": _one(place)}


def _one(place: Layout) -> Tensor:
    """A row meets its hardest negative only."""
    return negatives(place).clamp(max=1).float().mean()


class VsePlusPlus(nn.Module):
    """VSE++: the hinge on the hardest negative alone (Faghri et al. 2018, arXiv 1707.05612, eq. 6),
    mean over rows.

    L = mean_i [ max_{j≠i} [margin + cos(I_i, T_j) − cos_ii]₊ + max_{j≠i} [margin + cos(T_i, I_j) −
    cos_ii]₊ ].

    From scratch the maximum gives too little and too noisy a gradient, and all embeddings become
    one (the loss stands at 2 · margin); so the first half of the run is VSE0 (`triplet`). On the
    glyphs it still made things worse from there on, at 200 steps. Meant for towers that are trained
    already, batches of about 128, small learning rates; with a false negative in every large batch
    it chases that one.

    Args:
        setting: its `steps` give the warm-up its length.
        warmup: share of the run that trains VSE0.

    Called with (rows, columns); returns `loss`, `within_margin` (share of rows whose hardest
    negative comes closer than the margin) and `effective_negatives` (1 after the warm-up).

    Raises:
        ValueError: columns that travel in a ring.
    """

    def __init__(
        self,
        setting: RunContext,
        mask_duplicates: bool = True,
        margin: float = 0.2,
        warmup: float = 0.5,
    ) -> None:
        super().__init__()
        self.mask_duplicates = mask_duplicates
        self.margin = margin
        self.until = round(warmup * setting.steps)
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        loss: Any = triplet if self.step < self.until else max_of_hinges
        losses: dict[str, Tensor] = loss(rows, columns, self.mask_duplicates, self.margin)
        self.step += 1
        return losses
