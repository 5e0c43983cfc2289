"""Is a right answer among the k best? Exact, also where scores tie."""

import numpy as np
import torch
from torch import Tensor


def scores(queries: Tensor, answers: Tensor) -> Tensor:
    """(q, D) queries, (n, D) answers -> (q, n) cosines; equal features get exactly equal scores.

    BLAS may sum a one-row product, or the edge of a block, in another order than the rest.
    Computing in float64 and rounding to float32 hides that difference.
    """
    columns = answers.double().T
    cosines = queries.double() @ columns
    return cosines.float()


def tied_in_top_k(slots: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Probability that `slots` random draws from right + wrong tied answers hold a right one.

    1 − C(wrong, slots) / C(right + wrong, slots), for integer tensors of one shape; slots below 1
    give 0. Computed as one factor per slot: accurate to 1e-14 for any number of answers, whereas
    log-gamma would lose all digits.
    """
    # probability that all draws so far were wrong
    miss = torch.ones(slots.shape, dtype=torch.float64)
    most = 0
    if slots.numel():
        most = max(int(slots.max()), 0)

    tied = right + wrong
    for taken in range(most):
        # without replacement: answers already drawn no longer count
        wrong_left = (wrong - taken).clamp(min=0).double()
        left = (tied - taken).clamp(min=1)
        still_wrong = wrong_left / left
        has_slot = slots > taken
        miss = torch.where(has_slot, miss * still_wrong, miss)

    # with no right answer the probability is 0
    return torch.where(right > 0, 1 - miss, 0.0)


def in_top_k(scores: Tensor, right: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(q, n) scores and (q, n) True for right answers -> (q, len(ks)): is one of the k best right?

    Ties are broken at random, and the answer is the probability: a model whose features are all
    equal gets the chance level k/n, neither 0 nor 1. Without ties every entry is 0 or 1.
    """
    # (q, 1) the score of the best right answer
    of_right = scores.masked_fill(~right, -torch.inf)
    best = of_right.max(dim=1, keepdim=True).values

    # (q,) answers above the best right one are all wrong
    above = _count(scores > best)
    tied = scores == best
    tied_right = _count(tied & right)
    tied_wrong = _count(tied & ~right)
    columns = []
    for k in ks:
        # ranks among the k best that are left for the tied answers
        slots = k - above
        columns.append(tied_in_top_k(slots, tied_right, tied_wrong))
    return torch.stack(columns, dim=1)


def _count(mask: Tensor) -> Tensor:
    """(q, n) -> (q,) how many are True; NumPy counts ten times as fast as a sum in torch."""
    counts = np.count_nonzero(mask.numpy(), axis=1)
    return torch.from_numpy(counts)


def chance_in_top_k(answers: Tensor, right: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(q,) numbers of answers and of right answers -> (len(ks),) recall@k of a random ranking."""
    wrong = answers - right
    levels = []
    for k in ks:
        # a random ranking is one in which all answers tie
        slots = torch.full_like(answers, k)
        found = tied_in_top_k(slots, right, wrong)
        levels.append(found.mean())
    return torch.stack(levels)


def chunk_rows(columns: int, budget: int = 1 << 24) -> int:
    """Rows of a (rows, columns) score block with at most `budget` entries (128 MiB in float64)."""
    return max(1, budget // max(columns, 1))


def refuse_non_finite(features: Tensor, what: str) -> None:
    """Raises ValueError for NaN or infinity, which would otherwise look like a merely bad model."""
    finite = torch.isfinite(features)
    if not finite.all():
        bad = int((~finite).any(dim=-1).sum())
        raise ValueError(
            f"{bad} of {len(features)} {what} features are not finite: "
            "the model has diverged or is broken"
        )
