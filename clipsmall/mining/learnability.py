"""JEST: selects pairs that are hard for the learner and easy for a reference model."""

from typing import NamedTuple

import numpy as np

from clipsmall.mining.initial_groups import seat_ranks
from clipsmall.mining.scored_pairs import Bools, Floats, Ints, Quotas, ScoredPairs
from clipsmall.mining.swaps import separate_conflicts
from clipsmall.mining.weights import WEIGHTS

# number of parts in which a batch is drawn
CHUNKS = 16


class LearnabilityGains(NamedTuple):
    """Learnability: the learner's loss minus the reference model's."""

    # (n,) gain of each pair alone
    own: Floats
    # (n, n) gain of two pairs in one batch; symmetric
    together: Floats


def learnability_gains(
    learner: ScoredPairs, reference: ScoredPairs, size: int, kind: str
) -> LearnabilityGains:
    """Learnability of each pair, and of any two in one batch of `size`.

    Evans et al. 2024, arXiv 2406.17711, section 3, for a loss that is a sum over pairs. The sigmoid
    loss is such a sum, and the softmax loss has a bound of this form (see `weights`).
    """
    together = WEIGHTS[kind](learner, size) - WEIGHTS[kind](reference, size)
    own = np.zeros(len(together))
    if kind == "sigmoid":
        # the positive's term of the loss, which does not depend on the batch
        learner_loss = np.logaddexp(0, -learner.logits.diagonal())
        reference_loss = np.logaddexp(0, -reference.logits.diagonal())
        own = learner_loss - reference_loss

    if kind == "softmax":
        together = together / max(size - 1, 1)
    return LearnabilityGains(own, together)


def learnability(
    scored: ScoredPairs,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    keep: int,
    reference: ScoredPairs,
    kind: str = "softmax",
) -> Ints:
    """`keep` groups of learnable pairs, drawn without replacement.

    Each group is drawn in CHUNKS parts: the first by the pairs' own gains, the others by their
    gains together with the pairs drawn before. Blocked Gibbs sampling, Evans et al. 2024,
    arXiv 2406.17711, algorithm 1.

    Args:
        keep: number of groups.
        reference: the same pairs, embedded by the reference model.
        kind: the loss, softmax or sigmoid.
    """
    size = int(quotas.sizes[0])
    gains = learnability_gains(scored, reference, size, kind)
    free = np.ones(len(scored.image), dtype=bool)
    groups = []
    for rank_of_seat in seat_ranks(quotas)[:keep]:
        ranks = generator.permutation(rank_of_seat)
        members = _draw_group(gains, ranks, quotas.owner, free, cannot_link, generator)
        free[members] = False
        groups.append(members)

    return separate_conflicts(np.stack(groups), quotas.owner, cannot_link, generator)


def _draw_group(
    gains: LearnabilityGains,
    ranks: Ints,
    owner: Ints,
    free: Bools,
    cannot_link: Bools,
    generator: np.random.Generator,
) -> Ints:
    """(size,) members of one group; ranks: (size,) the rank of each seat; free: (n,)."""
    gain = gains.own.astype(np.float64)
    banned = ~free
    members = list[int]()
    for chunk in np.array_split(ranks, min(CHUNKS, len(ranks))):
        # Gumbel-top-k: the largest noisy gains are a sample from the softmax of the gains
        noisy = gain + generator.gumbel(size=len(gain))
        new = list[int]()
        for rank in chunk:
            allowed = (owner == rank) & ~banned

            # if all remaining pairs conflict with a member, allow them
            if not allowed.any():
                allowed = (owner == rank) & free
                allowed[members + new] = False

            picked = int(np.where(allowed, noisy, -np.inf).argmax())
            banned = banned | cannot_link[picked]
            banned[picked] = True
            new.append(picked)

        gain = gain + gains.together[new].sum(axis=0)
        members += new

    return np.array(members)
