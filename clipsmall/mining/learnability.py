"""JEST's selection: pairs that are hard for the learner and easy for a reference model."""

from typing import NamedTuple

import numpy as np

from clipsmall.mining.initial_groups import seat_ranks
from clipsmall.mining.scored_pairs import Bools, Floats, Ints, Quotas, ScoredPairs
from clipsmall.mining.swaps import separate_conflicts
from clipsmall.mining.weights import WEIGHTS

# parts in which a batch is drawn
CHUNKS = 16


class LearnabilityGains(NamedTuple):
    """How much the learner can learn: its loss minus the reference's."""

    # (n,) of each pair by itself
    own: Floats
    # (n, n) symmetric, of two pairs in one batch
    together: Floats


def learnability_gains(
    learner: ScoredPairs, reference: ScoredPairs, size: int, kind: str
) -> LearnabilityGains:
    """Learnability of each pair, and of any two in one batch of `size`.

    Evans et al. 2024, arXiv 2406.17711, section 3, where the loss is a sum over pairs: the sigmoid
    loss is one, and the softmax loss has a bound that is one (see `weights`).
    """
    together = WEIGHTS[kind](learner, size) - WEIGHTS[kind](reference, size)
    own = np.zeros(len(together))
    if kind == "sigmoid":
        # a pair's own term of the loss, which does not depend on its batch
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

    Each group is drawn in CHUNKS parts: the first by the gain of pairs by themselves, the others by
    their gain together with the pairs drawn before. Blocked Gibbs sampling, Evans et al. 2024,
    arXiv 2406.17711, algorithm 1.

    Args:
        keep: groups.
        reference: the same pairs as the reference model sees them.
        kind: softmax or sigmoid.
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
        # with Gumbel noise the largest are a draw from the softmax of the gains
        noisy = gain + generator.gumbel(size=len(gain))
        new = list[int]()
        for rank in chunk:
            allowed = (owner == rank) & ~banned

            # all that are left conflict with a member: take one of them
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
