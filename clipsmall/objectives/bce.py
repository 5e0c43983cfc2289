"""Binary cross entropy with few or light negatives: a sigmoid loss that needs no prior."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import dots, layout, negatives, scaled, ways
from clipsmall.objectives.sigmoid import softplus

MODES = ("balanced", "warmup", "one")


class Bce(nn.Module):
    """Each pair is judged by itself, against as many, or as heavy, negatives as it can stand.

    L = mean_i [ sp(−S_ii) + weight · Σ_j w_ij sp(S_ij) ],  S = logit_scale · cosines + logit_bias,
    sp(x) = log(1 + e^x).

    balanced: all negatives, w_ij = 1 / (how many row i has). `sigmoid` with the two sides in
    balance: the bias starts
        at 0, and no batch size asks for another.
    warmup: w_ij = 1 for k negatives of every image, the same number for every text. k starts at 1
    and grows by one,
        up to all, after every step at which the running accuracy over these choices (0.9 of it +
        0.1 of the step's) is above ½. After a remark of A. Radford's that so many negatives were
        kept that accuracy stayed near one half; binary cross entropy, its sum, uniform draws and a
        k that never falls are our reading.
    one: k = 1 for good, the Jensen-Shannon bound on mutual information of CLIP-Lite (Shrivastava et
    al. 2021,
        arXiv 2112.07133; Hjelm et al. 2019, arXiv 1808.06670, eq. 4).

    The k negatives of row i are the columns i + s (cyclic) for k shifts s, drawn anew at every
    step, alike on all
    ranks: every image and every text has k. For batches below about 512.

    Args:
        setting: `seed` is used.
        mode: one of the above. weight: of the negatives' sum.
        mask_duplicates: leave columns with the row's own caption out (warmup, one: without a
            substitute).

    Called with rows and columns it returns `loss` (the mean over my rows), its parts `positive` and
    `negative`, `effective_negatives` (k; balanced: the mean of all rows'), `accuracy` (of this step
    over all ranks' images, among their negatives).

    Raises:
        ValueError: an unknown mode, a negative weight, a batch of one pair.
    """

    def __init__(
        self,
        setting: RunContext,
        mode: str = "balanced",
        weight: float = 1.0,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"bce: mode is one of {', '.join(MODES)}, not {mode!r}")
        if weight < 0:
            raise ValueError(f"bce: weight is at least 0, not {weight}")
        self.mode = mode
        self.weight = weight
        self.mask_duplicates = mask_duplicates
        self.seed = setting.seed
        self.count: Tensor
        self.accuracy: Tensor
        self.step: Tensor
        # k
        self.register_buffer("count", torch.ones((), dtype=torch.int64))
        # running, over the choices
        self.register_buffer("accuracy", torch.zeros(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        if len(columns.index) < 2:
            raise ValueError("bce compares pairs with one another: it needs a batch of at least 2")
        place = layout(rows, columns, self.mask_duplicates)
        if self.mode == "balanced":
            all_of_them = negatives(place)
            each = all_of_them.clamp(min=1)
            count = world.mean_over_ranks(all_of_them.float().mean())
        else:
            place = replace(place, chosen=self._chosen(place.columns, rows.image.device))
            each = torch.ones_like(place.own)
            count = self.count.float()
        compared = ways(rows, columns, place)
        accuracies = []
        positive = negative = rows.logit_scale.new_zeros(())
        for x, y, its in compared:
            x = scaled(x, rows.logit_scale)
            bias = rows.logit_bias.to(x.dtype).expand(len(x))
            own = dots(x, its) + bias
            share = 1 / (each.to(x.dtype) * len(x) * len(compared))
            positive = positive + F.softplus(-own).mean() / len(compared)
            negative = negative + similarity.total(x, y, place, softplus, share, bias)
            accuracies.append(self._accuracy(own, x, y, place, bias))
        accuracy = torch.stack(accuracies).mean()
        self._grow(accuracy, place.columns)
        return {
            "loss": positive + self.weight * negative,
            "positive": positive.detach(),
            "negative": negative.detach(),
            "effective_negatives": count,
            "accuracy": accuracy.float(),
        }

    def _chosen(self, columns: int, device: torch.device) -> Tensor:
        """(N,) bool: the shifts of this step, a function of seed and step alone."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.step)) % 2**63)
        shifts = 1 + torch.randperm(columns - 1, generator=generator)[: int(self.count)]
        return torch.zeros(columns, dtype=torch.bool).index_fill_(0, shifts, True).to(device)

    @torch.no_grad()
    def _accuracy(self, own: Tensor, x: Tensor, y: Tensor, place: Layout, bias: Tensor) -> Tensor:
        """() over all ranks' images that have a negative; where none has, the running one stays as
        it is.
        """
        hardest, _ = similarity.nearest(x, y, place, bias)
        counts = hardest > -torch.inf
        hits, all_of_them = world.sum_over_ranks(
            torch.stack([((own > hardest) & counts).sum(), counts.sum()])
        )
        return torch.where(all_of_them > 0, hits / all_of_them.clamp(min=1), self.accuracy)

    @torch.no_grad()
    def _grow(self, accuracy: Tensor, columns: int) -> None:
        self.accuracy.lerp_(accuracy.to(self.accuracy.dtype), 0.1)
        if self.mode == "warmup":
            self.count.add_(self.accuracy > 0.5).clamp_(max=columns - 1)
        self.step += 1
