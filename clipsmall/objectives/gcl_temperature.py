"""A temperature of its own for every image and every text, learned inside the objective `gcl`."""

from typing import Literal

import torch
from torch import Tensor, nn

from clipsmall.distributed import similarity
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import Direction, scaled

Rule = Literal["momentum", "adam"]
# both papers' code clips slopes here: the log u of a pair that is new to the model jumps by tens
STEEPEST = 5.0


class Temperatures(nn.Module):
    """Two temperatures per pair, of its image and of its text, updated when the pair is in a batch.

    - momentum: z ← (1 − β) z + β s,  τ ← τ − lr z, clipped to `bounds`; β = 0.9 (iSogCLR, arXiv
      2305.11965, algorithm 1).
    - adam: Adam with betas 0.9 and 0.999, bias corrected by the pair's own visits (FastCLIP-v2,
      arXiv 2407.01445).

    Args:
        pairs: n, of the data set.
        start: every τ before its first step.
        lr: learning rate of τ.
        bounds: least and largest τ.
        rule: how τ is updated, see above.
    """

    def __init__(
        self, pairs: int, start: float, lr: float, bounds: tuple[float, float], rule: Rule
    ) -> None:
        super().__init__()
        self.lr = lr
        self.bounds = bounds
        self.adam = rule == "adam"
        self.tau: Tensor
        self.slope: Tensor
        self.square: Tensor
        self.visits: Tensor
        self.register_buffer("tau", torch.full((pairs, 2), start))
        self.register_buffer("slope", torch.zeros(pairs, 2))
        if self.adam:
            self.register_buffer("square", torch.zeros(pairs, 2))
            self.register_buffer("visits", torch.zeros(pairs, 1, dtype=torch.int32))

    @torch.no_grad()
    def update(self, positions: Tensor, slopes: Tensor) -> None:
        """One step of some pairs' temperatures.

        Args:
            positions: (N,) rows of the tables, each once.
            slopes: (N, 2) of the loss by these pairs' τ.
        """
        slopes = slopes.to(self.tau.dtype)
        slopes = slopes.clamp(-STEEPEST, STEEPEST)

        # running mean of the slopes
        new_weight = 0.1 if self.adam else 0.9
        before = self.slope[positions]
        step = before.lerp(slopes, new_weight)
        self.slope[positions] = step

        if self.adam:
            # running mean of their squares
            before = self.square[positions]
            square = before.lerp(slopes.square(), 0.001)
            self.square[positions] = square

            # both begin at 0, which is corrected by the pair's own visits
            self.visits[positions] += 1
            visits = self.visits[positions].to(slopes.dtype)
            mean = step / (1 - 0.9**visits)
            square = square / (1 - 0.999**visits)
            step = mean / (square.sqrt() + 1e-8)

        tau = self.tau[positions] - self.lr * step
        self.tau[positions] = tau.clamp(*self.bounds)


def mean_exponent(
    x: Tensor, y: Tensor, scale: Tensor, layout: Layout, direction: Direction
) -> Tensor:
    """(b,) mean of S_ij − S_ii over a row's negatives under their softmax; without gradient.

    Args:
        x: (b, D) my rows.
        y: (N, D) the columns that they were compared with in `direction`.
        scale: (b,) of the rows.
        layout: which columns are negatives.
        direction: the log sums.
    """
    own = direction.own.detach()
    others = direction.others.detach()
    no_negative = others == -torch.inf
    others = others.masked_fill(no_negative, 0.0)

    # Σ_j p_j log p_j, p the softmax over negatives: log p_j = S_ij − others
    x = scaled(x, scale)
    log_weight = similarity.row_sums(x, y, layout, _entropy, -others)
    return log_weight + others - own


def _entropy(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    weights = log_weights.exp()
    # row_sums asks for no slopes
    return weights * log_weights, weights
