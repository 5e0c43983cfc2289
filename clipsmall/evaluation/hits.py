"""Is a right answer among the k best? Exact, also where scores tie."""

import torch
from torch import Tensor


def tied_hit(slots: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Chance that `slots` places, filled at random from `right` + `wrong` tied answers, hold a right one.

    1 − C(wrong, slots) / C(right + wrong, slots), for integer tensors of one shape; slots below 1 give 0. In
    log-gamma and float64: accurate to 1e-9 for millions of answers.
    """

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    slots, right, wrong = slots.double(), right.double(), wrong.double()
    certain = slots > wrong  # more places than wrong answers
    k = torch.where(certain, torch.zeros_like(slots), slots.clamp(min=0))
    miss = (log_choose(wrong, k) - log_choose(right + wrong, k)).exp()
    return torch.where(slots < 1, 0.0, torch.where(certain & (right > 0), 1.0, 1 - miss))


def hits(scores: Tensor, right: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(q, n) scores and (q, n) True for right answers -> (q, len(ks)): is one of the k best right?

    Ties are broken at random, and the answer is the probability: a model whose features are all equal gets the
    chance level k/n, neither 0 nor 1. Without ties every entry is 0 or 1.
    """
    best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
    above = (scores > best).sum(dim=1)  # all of them wrong
    tied = scores == best
    tied_right, tied_wrong = (tied & right).sum(dim=1), (tied & ~right).sum(dim=1)
    return torch.stack([tied_hit(k - above, tied_right, tied_wrong) for k in ks], dim=1)


def chance(answers: Tensor, right: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(q,) numbers of answers and of right ones -> (len(ks),) mean hit of a random ranking."""
    return torch.stack([tied_hit(torch.full_like(answers, k), right, answers - right).mean() for k in ks])


def chunk_rows(columns: int, budget: int = 1 << 24) -> int:
    """Rows of a (rows, columns) score block that stay within `budget` entries (64 MiB in float32)."""
    return max(1, budget // max(columns, 1))


def refuse_non_finite(features: Tensor, what: str) -> None:
    """Raises ValueError: NaN compares false with everything and would pass for a bad model."""
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(dim=-1).sum())
        raise ValueError(f"{bad} of {len(features)} {what} features are not finite: the model has diverged or is broken")
