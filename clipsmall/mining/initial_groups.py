"""Simple arrangements: random groups, hardest random groups, a nearest-neighbour chain, greedy."""

import numpy as np

from clipsmall.mining.scored_pairs import Bools, Floats, Ints, Quotas, ScoredPairs
from clipsmall.mining.swaps import separate_conflicts
from clipsmall.mining.weights import batch_losses


def seat_ranks(quotas: Quotas) -> Ints:
    """(groups, size) the rank whose pair fills each seat."""
    ranks = np.arange(quotas.counts.shape[1])
    return np.stack([np.repeat(ranks, counts) for counts in quotas.counts])


def random_groups(
    scored: ScoredPairs, quotas: Quotas, cannot_link: Bools, generator: np.random.Generator
) -> Ints:
    """Random groups: the baseline for mining."""
    # all arrangements have this signature; this one does not use the embeddings
    del scored
    rank_of_seat = seat_ranks(quotas)
    groups = np.empty_like(rank_of_seat)
    for rank in range(quotas.counts.shape[1]):
        own_pairs = np.flatnonzero(quotas.owner == rank)
        own_seats = rank_of_seat == rank
        groups[own_seats] = generator.permutation(own_pairs)[: own_seats.sum()]

    return separate_conflicts(groups, quotas.owner, cannot_link, generator)


def osgd(
    scored: ScoredPairs,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    keep: int,
    kind: str = "softmax",
) -> Ints:
    """The `keep` random groups of highest loss; all other pairs are dropped.

    Ordered SGD (Kawaguchi and Lu 2020, arXiv 1907.04371) as Cho et al. 2023 (arXiv 2307.05906) use
    it: the top q of k batches.
    """
    groups = random_groups(scored, quotas, cannot_link, generator)
    losses = batch_losses(scored, groups, kind)
    hardest_first = np.argsort(-losses, kind="stable")
    return groups[hardest_first[:keep]]


def chain_groups(
    scored: ScoredPairs, quotas: Quotas, cannot_link: Bools, generator: np.random.Generator
) -> Ints:
    """A chain of hard negatives, cut into groups.

    The chain goes from an image to its hardest unused caption, from that pair's caption to its
    hardest unused image, and so on (GRIT-VLP, Byun et al. 2022, arXiv 2208.04060).
    """
    from_image = scored.logits
    from_text = np.ascontiguousarray(from_image.T)
    sides = (from_image, from_text)
    filler = GroupFiller(quotas, cannot_link)
    picked = 0
    last = -1
    for group in range(len(quotas.counts)):
        filler.open(group)
        for _ in range(quotas.sizes[group]):
            # alternate between images and captions
            side = sides[picked % 2]

            # the first pair of the chain is random
            hardness = side[last] if last >= 0 else generator.random(len(side))
            last = filler.take(hardness)
            picked += 1

    return filler.groups


def grow_groups(
    scored: ScoredPairs,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats,
) -> Ints:
    """Greedy groups: start with a random pair, then add the hardest free pair, one at a time.

    The hardest pair has the largest total weight with the group's members.

    Args:
        weights: (n, n) symmetric, see `weights`.
    """
    filler = GroupFiller(quotas, cannot_link)

    # a group starts with the first free pair in this order
    order = generator.random(len(scored.image))
    for group in range(len(quotas.counts)):
        filler.open(group)
        first = filler.take(order)

        # (n,) each pair's total weight with the group's members
        hardness = weights[first].astype(np.float64)
        for _ in range(quotas.sizes[group] - 1):
            hardest = filler.take(hardness)
            hardness += weights[hardest]

    return filler.groups


class GroupFiller:
    """Fills groups pair by pair.

    Takes only free pairs without conflict with the group's members, of ranks with seats left. If
    there is no such pair, it takes one in conflict, which later swaps separate if possible.
    """

    def __init__(self, quotas: Quotas, cannot_link: Bools) -> None:
        self.quotas = quotas
        self.cannot_link = cannot_link
        # (groups, size) places of the seated pairs
        count = len(quotas.counts)
        size = int(quotas.sizes[0])
        self.groups = np.empty((count, size), dtype=np.int64)
        # (n,) True for pairs in no group yet
        self.free = np.ones(len(quotas.owner), dtype=bool)

    def open(self, group: int) -> None:
        """Start filling this group."""
        self.group = group
        self.seat = 0
        # (W,) free seats of each rank
        self.left = self.quotas.counts[group].copy()
        # (n,) True for pairs that conflict with a member
        self.banned = np.zeros_like(self.free)

    def take(self, hardness: Floats) -> int:
        """Seat the hardest allowed pair and return its place; `hardness` is (n,)."""
        has_seat = self.free
        if len(self.left) > 1:
            rank_has_seat = self.left > 0
            has_seat = self.free & rank_has_seat[self.quotas.owner]
        allowed = has_seat & ~self.banned
        if not allowed.any():
            allowed = has_seat
        candidates = np.where(allowed, hardness, -np.inf)
        picked = int(candidates.argmax())
        rank = self.quotas.owner[picked]
        self.groups[self.group, self.seat] = picked
        self.seat += 1
        self.free[picked] = False
        self.left[rank] -= 1
        self.banned |= self.cannot_link[picked]
        return picked
