"""Small hard groups put together into batches: at random, but copies in different batches."""

import numpy as np

from clipsmall.mining.scored_pairs import Bools, Ints, Quotas

# how often another batch is looked for, for every group that shares one with a copy
ROUNDS = 30


def even_quotas(owner: Ints, ranks: int, batch_size: int, size: int) -> Quotas:
    """Quotas of groups of `size`, such that each batch takes batch_size / ranks of every rank.

    The seats of a batch belong to the ranks in turn, so that groups are as mixed as they can be:
    with four ranks, groups of four have one pair of each.
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
    """(m · per_batch, size) groups with the quotas of `even_quotas` -> (m, B) batches.

    The k-th groups of all batches have the same quotas: they are permuted among the batches. Then
    groups that share a batch with a copy change places with k-th groups of other batches, as long
    as that leaves fewer such groups together.

    Args:
        per_batch: groups in a batch.
        copies: (n, n) pairs that should not share a batch.
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
    """Exchange groups of equal place between batches until no exchange lessens the clashes.

    Args:
        seats: (m, per_batch) numbers of groups; changed in place.
        clash: (G, G) 1 where two groups hold copies of one another.
    """
    # (G, m) how many groups of a batch a group clashes with
    met = np.stack([clash[:, members].sum(axis=1) for members in seats], axis=1)
    for _ in range(ROUNDS):
        moved = False

        # (m, per_batch) the same for each group and its own batch
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
    """(m,) how many clashes go if the group at this seat changes places with each batch's."""
    mine = seats[batch, place]
    theirs = seats[:, place]
    batches = np.arange(len(seats))
    before = met[mine, batch] + met[theirs, batches]

    # each of the two no longer meets the other in the batch it goes to: that one has left
    after = met[mine] + met[theirs, batch] - 2 * clash[mine, theirs]
    gains: Ints = before - after
    gains[batch] = 0
    return gains
