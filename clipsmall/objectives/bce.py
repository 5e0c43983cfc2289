"""Binary cross entropy with few or light negatives: a sigmoid loss that needs no prior."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.options import check_options
from clipsmall.objectives.pairs import comparisons, dots, layout_of, negative_counts, scaled
from clipsmall.objectives.sigmoid import softplus
from clipsmall.objectives.spec import ObjectiveSpec, Options

Mode = Literal["balanced", "warmup", "one"]


class Bce(nn.Module):
    """Each pair is judged by itself, against as many, or as heavy, negatives as it can stand.

    Also known as:
        Binary cross entropy with negative sampling, pairwise logistic loss; mode `one` is the
        Jensen-Shannon mutual information bound (JSD) of CLIP-Lite and Deep InfoMax.

    Formula:
        L = mean_i [ sp(−S_ii) + weight · Σ_j w_ij sp(S_ij) ],
        S = logit_scale · cosines + logit_bias,  sp(x) = log(1 + e^x), and by mode:

        - balanced: all negatives, w_ij = 1 / (how many row i has). `sigmoid` with the two sides in
          balance: the bias starts at 0, and no batch size asks for another.
        - warmup: w_ij = 1 for k negatives of every image, the same number for every text. k starts
          at 1 and grows by one, up to all, after every step at which the running accuracy over
          these choices (0.9 of it + 0.1 of the step's) is above ½.
        - one: k = 1 for good.

        The k negatives of row i are the columns i + s (cyclic) for k shifts s, drawn at random in
        every step, the same on all ranks: every image and every text has k.

    Source:
        one: CLIP-Lite, Shrivastava et al. 2021, arXiv 2112.07133; Hjelm et al. 2019, arXiv
        1808.06670, eq. 4. warmup: after a remark of A. Radford's that so many negatives were kept
        that accuracy stayed near one half; binary cross entropy, its sum, uniform draws and a k
        that never falls are our reading.

    When to use:
        Batches below about 512, where a bias for `sigmoid` is hard to choose.

    When not:
        Large batches, where `sigmoid` and `softmax` use all negatives at full weight. Modes warmup
        and one draw their negatives from the batch: a moco queue with in_batch=false refuses them.

    Related:
        `sigmoid`, the same costs with all negatives at weight 1.

    Called with rows, my b pairs, and columns, the N pairs of the global batch or more (a queue).

    Args:
        context: `seed` is used.
        mode: which negatives, see above.
        weight: of the negatives' sum.
        mask_duplicates: leave columns with the row's own caption out (warmup, one: without a
            substitute).

    Returns:
        `loss` () mean over my rows; its parts `positive` and `negative` (); `effective_negatives`
        () k, or the mean of all rows' with mode balanced; `accuracy` () of this step over all
        ranks' images, among their negatives.

    Raises:
        ValueError: an unknown mode, a negative weight, a batch of one pair.

    Examples:
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=10.0, logit_bias=-5.0)
        >>> loss = Bce(RunContext(width=4, batch_size=4, steps=10))
        >>> round(loss(pairs, pairs)["loss"].item(), 4)  # twice log(1 + e^−5)
        0.0134
    """

    def __init__(
        self,
        context: RunContext,
        mode: Annotated[
            Mode, Field(description="which negatives: all, k growing, one")
        ] = "balanced",
        weight: Annotated[float, Field(ge=0, description="of the negatives")] = 1.0,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        check_options("bce", Bce, mode=mode, weight=weight)
        self.mode = mode
        self.weight = weight
        self.mask_duplicates = mask_duplicates
        self.seed = context.seed
        self.count: Tensor
        self.accuracy: Tensor
        self.step: Tensor
        # k, the number of negatives per row
        self.register_buffer("count", torch.ones((), dtype=torch.int64))
        # running mean of the steps' accuracies
        self.register_buffer("accuracy", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        if len(columns.index) < 2:
            raise ValueError("bce compares pairs with one another: it needs a batch of at least 2")
        layout = layout_of(rows, columns, self.mask_duplicates)

        # (b,) divisor of each row's sum over negatives
        if self.mode == "balanced":
            counts = negative_counts(layout)
            divisor = counts.clamp(min=1)
            negatives = world.mean_over_ranks(counts.float().mean())
        else:
            chosen = self._chosen_shifts(layout.columns, rows.image.device)
            layout = replace(layout, chosen=chosen)
            divisor = torch.ones_like(layout.own)
            negatives = self.count.float()

        compared = comparisons(rows, columns, layout)
        directions = len(compared)
        accuracies = []
        positive = negative = rows.logit_scale.new_zeros(())
        for x, y, its_own in compared:
            x = scaled(x, rows.logit_scale)
            bias = rows.logit_bias.to(x.dtype).expand(len(x))

            # positives
            own = dots(x, its_own) + bias
            costs = F.softplus(-own).mean()
            positive = positive + costs / directions

            # negatives
            weights = 1 / (divisor.to(x.dtype) * len(x) * directions)
            costs = similarity.total(x, y, layout, softplus, weights, bias)
            negative = negative + costs
            accuracies.append(self._accuracy_of(own, x, y, layout, bias))

        accuracy = torch.stack(accuracies).mean()
        self._grow(accuracy, layout.columns)
        return {
            "loss": positive + self.weight * negative,
            "positive": positive.detach(),
            "negative": negative.detach(),
            "effective_negatives": negatives,
            "accuracy": accuracy.float(),
        }

    def _chosen_shifts(self, columns: int, device: torch.device) -> Tensor:
        """(N,) bool, True at the shifts of this step: a function of seed and step alone."""
        seed = (self.seed * 1_000_003 + int(self.step)) % 2**63
        generator = torch.Generator().manual_seed(seed)

        # a shift of 0 would be the positive
        order = torch.randperm(columns - 1, generator=generator)
        count = int(self.count)
        shifts = 1 + order[:count]

        chosen = torch.zeros(columns, dtype=torch.bool)
        chosen.index_fill_(0, shifts, True)
        return chosen.to(device)

    @torch.no_grad()
    def _accuracy_of(
        self, own: Tensor, x: Tensor, y: Tensor, layout: Layout, bias: Tensor
    ) -> Tensor:
        """() over all ranks' rows that have a negative; if none has, the running accuracy."""
        hardest, _ = similarity.nearest(x, y, layout, bias)
        has_negative = hardest > -torch.inf
        is_hit = (own > hardest) & has_negative

        # one exchange for both counts
        mine = torch.stack([is_hit.sum(), has_negative.sum()])
        hits, counted = world.sum_over_ranks(mine)
        accuracy = hits / counted.clamp(min=1)
        return torch.where(counted > 0, accuracy, self.accuracy)

    @torch.no_grad()
    def _grow(self, accuracy: Tensor, columns: int) -> None:
        """Update the running accuracy, and with it k."""
        new = accuracy.to(self.accuracy.dtype)
        self.accuracy.lerp_(new, 0.1)

        # computed on the device, so that the host does not wait
        if self.mode == "warmup":
            is_right = self.accuracy > 0.5
            self.count.add_(is_right)
            self.count.clamp_(max=columns - 1)
        self.step += 1


def _batch_negatives_needed(options: Options) -> str:
    if options["mode"] == "balanced":
        return ""
    return "bce draws its few negatives from the batch, too; use mode balanced"


SPEC = ObjectiveSpec(
    Bce,
    section="bce",
    scale=10.0,
    # 0, because positives and negatives have equal weight
    bias=lambda columns: 0.0,
    queue=True,
    needs_batch_negatives=_batch_negatives_needed,
    mining_weights="sigmoid",
)
