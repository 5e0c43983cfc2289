"""Simple arrangements: at random, the hardest of random batches, a chain of neighbours, grown
groups.
"""

import numpy as np

from clipsmall.mining.scored import Bools, Floats, Ints, Quotas, Scored
from clipsmall.mining.swaps import separated
from clipsmall.mining.weights import batch_losses


def seats(quotas: Quotas) -> Ints:
    """(groups, size) the rank of each seat."""
    ranks = np.arange(quotas.counts.shape[1])
    return np.stack([np.repeat(ranks, counts) for counts in quotas.counts])


def shuffled(
    scored: Scored, quotas: Quotas, cannot_link: Bools, generator: np.random.Generator
) -> Ints:
    """Groups at random: what mining is measured against."""
    del scored
    of_seat = seats(quotas)
    groups = np.empty_like(of_seat)
    for rank in range(quotas.counts.shape[1]):
        mine = generator.permutation(np.flatnonzero(quotas.owner == rank))
        taken = of_seat == rank
        groups[taken] = mine[: taken.sum()]
    return separated(groups, quotas.owner, cannot_link, generator)


def osgd(
    scored: Scored,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    keep: int,
    kind: str = "softmax",
) -> Ints:
    """The `keep` groups of highest loss among random ones: ordered SGD (Kawaguchi and Lu 2020,
    arXiv 1907.04371) as Cho et al. 2023 (arXiv 2307.05906) use it: top q of k batches. The other
    groups' pairs are dropped."""
    groups = shuffled(scored, quotas, cannot_link, generator)
    return groups[np.argsort(-batch_losses(scored, groups, kind), kind="stable")[:keep]]


def chain(
    scored: Scored, quotas: Quotas, cannot_link: Bools, generator: np.random.Generator
) -> Ints:
    """A chain cut into groups: from an image to its hardest caption that is still free, from there
    to that caption's hardest image, and so on (GRIT-VLP, Byun et al. 2022, arXiv 2208.04060)."""
    sides = scored.logits
    other = np.ascontiguousarray(sides.T)
    picker = Picker(quotas, cannot_link)
    last = -1
    for group in range(len(quotas.counts)):
        picker.open(group)
        for _ in range(quotas.sizes[group]):
            hardness = sides[last] if last >= 0 else generator.random(len(sides))
            last = picker.take(hardness)
            sides, other = other, sides
    return picker.groups


def grown(
    scored: Scored,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats,
) -> Ints:
    """Each group starts with a random pair and takes, one by one, the free pair that is hardest
    beside its members.
    """
    picker = Picker(quotas, cannot_link)
    order = generator.random(len(scored.image))
    for group in range(len(quotas.counts)):
        picker.open(group)
        hardness = weights[picker.take(order)].astype(np.float64)
        for _ in range(quotas.sizes[group] - 1):
            hardness += weights[picker.take(hardness)]
    return picker.groups


class Picker:
    """Fills groups pair by pair: only free pairs, of ranks with seats left, that may meet those in
    the group.

    Where none is left that may, one that may not is taken: a later pass of swaps separates them if
    it can be done.
    """

    def __init__(self, quotas: Quotas, cannot_link: Bools) -> None:
        self.quotas = quotas
        self.cannot_link = cannot_link
        self.groups = np.empty((len(quotas.counts), int(quotas.sizes[0])), dtype=np.int64)
        self.free = np.ones(len(quotas.owner), dtype=bool)

    def open(self, group: int) -> None:
        self.group = group
        self.seat = 0
        self.left = self.quotas.counts[group].copy()
        self.banned = np.zeros_like(self.free)

    def take(self, hardness: Floats) -> int:
        """The hardest that may sit here; (n,) `hardness`."""
        seated = (
            self.free if len(self.left) == 1 else self.free & (self.left > 0)[self.quotas.owner]
        )
        allowed = seated & ~self.banned
        picked = int(np.where(allowed if allowed.any() else seated, hardness, -np.inf).argmax())
        self.groups[self.group, self.seat] = picked
        self.seat += 1
        self.free[picked] = False
        self.left[self.quotas.owner[picked]] -= 1
        self.banned |= self.cannot_link[picked]
        return picked
