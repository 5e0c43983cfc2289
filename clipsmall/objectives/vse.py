"""VSE++: the true pair must lead the best other pair by a margin."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity
from clipsmall.objectives.pairs import (
    columns_at,
    comparisons,
    dots,
    layout_of,
    negative_counts,
)
from clipsmall.objectives.spec import ObjectiveSpec
from clipsmall.objectives.triplet import MARGIN, Margin, triplet


class VsePlusPlus(nn.Module):
    """Hinge on the hardest negative alone, both ways, after a warm-up; the mean over rows.

    Also known as:
        VSE++, max of hinges, triplet loss with hardest in-batch negatives.

    Formula:
        L = mean_i [ max_{j≠i} [margin + cos(I_i, T_j) − cos_ii]₊
        + max_{j≠i} [margin + cos(T_i, I_j) − cos_ii]₊ ];  in the warm-up the loss of `triplet`.

    Source:
        Faghri et al. 2018, arXiv 1707.05612, eq. 6.

    When to use:
        Towers that are trained already, batches of about 128, small learning rates.

    When not:
        From scratch: the maximum gives too little and too noisy a gradient, and all embeddings
        become one (the loss stands at 2 · margin). So the first half of the run is `triplet`. On
        the glyphs it still made things worse from there on, at 200 steps. With a false negative in
        every large batch it chases that one.

    Related:
        `triplet`, the sum over all negatives; both read the config section `triplet`.

    Called with rows, my b pairs, and columns, the N pairs of the global batch or more (a queue).

    Args:
        context: its `steps` give the warm-up its length.
        mask_duplicates: leave columns with the row's own caption out.
        margin: of cosines.
        warmup: fraction of the run that trains `triplet`.

    Returns:
        `loss` () mean over my rows; `within_margin` () fraction of rows whose hardest negative
        comes closer than the margin; `effective_negatives` (), 1 after the warm-up.

    Raises:
        ValueError: columns that travel in a ring.

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4).roll(1, 0))
        >>> loss = VsePlusPlus(RunContext(width=4, batch_size=4, steps=10), warmup=0.0)
        >>> round(loss(pairs, pairs)["loss"].item(), 4)  # 1 + margin, twice
        2.4
    """

    def __init__(
        self,
        context: RunContext,
        mask_duplicates: bool = True,
        margin: Margin = MARGIN,
        warmup: Annotated[
            float,
            Field(ge=0, le=1, description="vse++: fraction of the run that trains triplet"),
        ] = 0.5,
    ) -> None:
        super().__init__()
        self.mask_duplicates = mask_duplicates
        self.margin = margin
        self.warmup_steps = round(warmup * context.steps)
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        if self.step < self.warmup_steps:
            losses = triplet(rows, columns, self.mask_duplicates, self.margin)
        else:
            losses = max_of_hinges(rows, columns, self.mask_duplicates, self.margin)
        self.step += 1
        return losses


def max_of_hinges(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool, margin: float
) -> dict[str, Tensor]:
    """The loss of `VsePlusPlus` after its warm-up."""
    layout = layout_of(rows, columns, mask_duplicates)
    if layout.ring:
        raise ValueError(
            "vse++ looks its hardest negatives up among all columns; use objective.exchange=gather"
        )
    loss = rows.logit_scale.new_zeros(())
    within_margin = rows.logit_scale.new_zeros(())
    for x, y, own in comparisons(rows, columns, layout, both_directions=True):
        # find the hardest negative without gradient, then recompute its cosine with gradient
        best, position = similarity.nearest(x, y, layout)
        lead = margin + dots(x, columns_at(y, position)) - dots(x, own)
        # every column has the row's caption: there is no negative
        no_negative = best == -torch.inf
        costs = lead.clamp(min=0).masked_fill(no_negative, 0.0)
        loss = loss + costs.mean()
        within_margin = within_margin + (costs > 0).float().mean() / 2
    return {
        "loss": loss,
        "within_margin": within_margin.detach(),
        # only the hardest negative of a row is used
        "effective_negatives": negative_counts(layout).clamp(max=1).float().mean(),
    }


SPEC = ObjectiveSpec(VsePlusPlus, section="triplet", scale=None, ring=False, queue=True)
