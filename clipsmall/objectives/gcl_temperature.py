"""A temperature of its own for every image and every text, learned inside the objective."""

from typing import Literal

import torch
from torch import Tensor, nn

from clipsmall.distributed import similarity
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import Direction, scaled

Rule = Literal["momentum", "adam"]
# both papers' code cuts slopes here: the log u of a pair that is new to the model jumps by tens
STEEPEST = 5.0


class Temperatures(nn.Module):
    """Two temperatures a pair, of its image and of its text, moved when the pair comes by.

    momentum: z ← (1 − β) z + β s,  τ ← τ − lr z, cut to `bounds`; β = 0.9 (iSogCLR, arXiv
    2305.11965, algorithm 1).
    adam: Adam with betas 0.9 and 0.999, bias corrected by the pair's own visits (FastCLIP-v2, arXiv
    2407.01445).

    Args:
        pairs: n, of the data set.
        start: every τ before its first step. lr: of τ. bounds: least and largest τ.
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
    def update(self, spots: Tensor, slopes: Tensor) -> None:
        """spots: (N,) rows of the tables, each once. slopes: (N, 2) of what these pairs' τ are to
        lower.
        """
        slopes = slopes.to(self.tau.dtype).clamp(-STEEPEST, STEEPEST)
        self.slope[spots] = self.slope[spots].lerp(slopes, 0.1 if self.adam else 0.9)
        step = self.slope[spots]
        if self.adam:
            self.visits[spots] += 1
            self.square[spots] = self.square[spots].lerp(slopes.square(), 0.001)
            times = self.visits[spots].to(slopes.dtype)
            step = (
                step / (1 - 0.9**times) / ((self.square[spots] / (1 - 0.999**times)).sqrt() + 1e-8)
            )
        self.tau[spots] = (self.tau[spots] - self.lr * step).clamp(*self.bounds)


def mean_exponent(x: Tensor, y: Tensor, scale: Tensor, place: Layout, way: Direction) -> Tensor:
    """(b,) mean of S_ij − S_ii over a row's negatives under their softmax; without gradient.

    x: (b, D) my rows. y: what they were compared with in `way`, at `scale` (b,).
    """
    others = way.others.detach().masked_fill(way.others == -torch.inf, 0.0)
    return (
        similarity.row_sums(scaled(x, scale), y, place, _entropy, -others)
        + others
        - way.own.detach()
    )


def _entropy(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    weights = log_weights.exp()
    # row_sums asks for no slopes
    return weights * log_weights, weights
