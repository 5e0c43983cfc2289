"""JEST's selection: pairs that are hard for the learner and easy for a reference model."""

from typing import NamedTuple

import numpy as np

from clipsmall.mining.initial_groups import seats
from clipsmall.mining.scored import Bools, Floats, Ints, Quotas, Scored
from clipsmall.mining.swaps import separated
from clipsmall.mining.weights import WEIGHTS

# in which a batch is drawn
CHUNKS = 16


class Gains(NamedTuple):
    """What the learner may learn, in units of loss: the learner's minus the reference's."""

    # (n,) of a pair alone
    own: Floats
    # (n, n) symmetric, of two pairs in one batch
    together: Floats


def gains(learner: Scored, reference: Scored, size: int, kind: str) -> Gains:
    """Learnability of pairs and of pairs of pairs (Evans et al. 2024, arXiv 2406.17711, section 3),
    where the loss is a
    sum over pairs: exactly sigmoid's, and softmax's bound (see `weights`)."""
    together = WEIGHTS[kind](learner, size) - WEIGHTS[kind](reference, size)
    own = np.zeros(len(together))
    if kind == "sigmoid":
        own = np.logaddexp(0, -learner.logits.diagonal()) - np.logaddexp(
            0, -reference.logits.diagonal()
        )
    return Gains(own, together / max(size - 1, 1) if kind == "softmax" else together)


def learnability(
    scored: Scored,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    keep: int,
    reference: Scored,
    kind: str = "softmax",
) -> Ints:
    """`keep` groups, each drawn from what is left in CHUNKS parts without replacement; the first
    part by what pairs
    offer alone, the others by what they offer beside those drawn before: blocked Gibbs sampling,
    ibid. algorithm 1."""
    found = gains(scored, reference, int(quotas.sizes[0]), kind)
    free = np.ones(len(scored.image), dtype=bool)
    groups = []
    for of_seat in seats(quotas)[:keep]:
        members = _draw(
            found, generator.permutation(of_seat), quotas.owner, free, cannot_link, generator
        )
        free[members] = False
        groups.append(members)
    return separated(np.stack(groups), quotas.owner, cannot_link, generator)


def _draw(
    found: Gains,
    of_seat: Ints,
    owner: Ints,
    free: Bools,
    cannot_link: Bools,
    generator: np.random.Generator,
) -> Ints:
    offers = found.own.astype(np.float64)
    banned = ~free
    members = list[int]()
    for chunk in np.array_split(of_seat, min(CHUNKS, len(of_seat))):
        # the largest are a draw from the softmax of the offers
        noisy = offers + generator.gumbel(size=len(offers))
        new = list[int]()
        for rank in chunk:
            allowed = (owner == rank) & ~banned
            # only pairs that may not meet those inside are left
            if not allowed.any():
                allowed = (owner == rank) & free
                allowed[members + new] = False
            picked = int(np.where(allowed, noisy, -np.inf).argmax())
            banned = banned | cannot_link[picked]
            banned[picked] = True
            new.append(picked)
        offers = offers + found.together[new].sum(axis=0)
        members += new
    return np.array(members)
