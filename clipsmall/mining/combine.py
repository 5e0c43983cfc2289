"""Combines small hard groups into batches at random, with copies in different batches."""

import numpy as np

from clipsmall.mining.scored_pairs import Bools, Ints, Quotas

# rounds in which every group that shares a batch with a copy may move to another batch
ROUNDS = 30


def even_quotas(owner: Ints, ranks: int, batch_size: int, size: int) -> Quotas:
    """Quotas of groups of `size`, such that each batch has batch_size / ranks pairs of every rank.

    The seats of a batch are given to the ranks in turn, so that groups mix ranks as much as
    possible: with four ranks, a group of four has one pair of each.
    """
    rank_of_seat = np.arange(batch_size) % ranks
    counts_in_batch = np.stack(
        [np.bincount(part, minlength=ranks) for part in rank_of_seat.reshape(-1, size)]
    )
    batches = len(owner) // batch_size
    return Quotas(owner, np.tile(counts_in_batch, (batches, 1)))


def combine_groups(
    groups: Ints, per_batch: int, copies: Bools, generator: np.random.Generator
) -> Ints:
    """Combine (m · per_batch, size) groups with the quotas of `even_quotas` into (m, B) batches.

    The k-th groups of all batches have equal quotas, so they are permuted among the batches. Then
    a group that shares a batch with a copy is exchanged for the k-th group of another batch, as
    long as this reduces the number of such groups.

    Args:
        per_batch: number of groups in a batch.
        copies: (n, n) bool, pairs that should not share a batch.
    """
    batches = len(groups) // per_batch
    size = groups.shape[1]
    if per_batch == 1:
        return groups
    pairs_of_groups = copies[np.ix_(groups.ravel(), groups.ravel())]
    pairs_of_groups = pairs_of_groups.reshape(len(groups), size, len(groups), size)

    # (G, G) 1 where two groups hold copies of one another
    clash: Ints = np.array(pairs_of_groups.any(axis=(1, 3)), dtype=np.int64)
    np.fill_diagonal(clash, 0)

    # (m, per_batch) numbers of groups
    seats = np.arange(len(groups)).reshape(batches, per_batch)
    for place in range(per_batch):
        seats[:, place] = seats[generator.permutation(batches), place]
    _separate_copies(seats, clash, generator)
    return groups[seats].reshape(batches, -1)


def _separate_copies(seats: Ints, clash: Ints, generator: np.random.Generator) -> None:
    """Exchange k-th groups between batches until no exchange reduces the clashes.

    Args:
        seats: (m, per_batch) numbers of groups; changed in place.
        clash: (G, G) 1 where two groups hold copies of one another.
    """
    # (G, m) number of groups in each batch that a group clashes with
    met = np.stack([clash[:, members].sum(axis=1) for members in seats], axis=1)
    for _ in range(ROUNDS):
        moved = False

        # (m, per_batch) number of clashes of each group within its own batch
        clashes_at_seat = np.take_along_axis(met.T, seats, axis=1)
        unhappy = np.argwhere(clashes_at_seat > 0)
        for batch, place in generator.permutation(unhappy):
            mine = seats[batch, place]
            gains = _exchange_gains(seats, clash, met, batch, place)
            other = int(gains.argmax())
            if gains[other] > 0:
                yours = seats[other, place]
                met[:, batch] += clash[:, yours] - clash[:, mine]
                met[:, other] += clash[:, mine] - clash[:, yours]
                seats[batch, place] = yours
                seats[other, place] = mine
                moved = True

        if not moved:
            break


def _exchange_gains(seats: Ints, clash: Ints, met: Ints, batch: int, place: int) -> Ints:
    """(m,) number of clashes removed by exchanging this seat's group with that of each batch."""
    mine = seats[batch, place]
    theirs = seats[:, place]
    batches = np.arange(len(seats))
    before = met[mine, batch] + met[theirs, batches]

    # the two exchanged groups do not meet in either batch afterwards
    after = met[mine] + met[theirs, batch] - 2 * clash[mine, theirs]
    gains: Ints = before - after
    gains[batch] = 0
    return gains
