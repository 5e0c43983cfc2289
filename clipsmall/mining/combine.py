"""Small hard groups put together into batches, at random but for copies."""

import numpy as np

from clipsmall.mining.scored import Bools, Ints, Quotas

# of looking for another place for each group that brings a copy
ROUNDS = 30


def even_quotas(owner: Ints, ranks: int, batch_size: int, size: int) -> Quotas:
    """Quotas of groups of `size`, batch by batch, such that each batch takes batch_size / ranks of
    every rank.

    A batch's seats belong to the ranks by turns, so that groups are as mixed as they can be: four
    ranks and groups of four have one pair each.
    """
    turns = np.arange(batch_size) % ranks
    of_batch = np.stack([np.bincount(part, minlength=ranks) for part in turns.reshape(-1, size)])
    return Quotas(owner, np.tile(of_batch, (len(owner) // batch_size, 1)))


def combined(groups: Ints, per_batch: int, copies: Bools, generator: np.random.Generator) -> Ints:
    """(m · per_batch, size) groups, as of `even_quotas` -> (m, B) batches.

    The groups at one place of all batches have the same quotas: they are permuted among the
    batches, then those that bring a pair beside its copy change places with others, as long as that
    leaves fewer such groups together.
    """
    batches = len(groups) // per_batch
    size = groups.shape[1]
    if per_batch == 1:
        return groups
    of_group = copies[np.ix_(groups.ravel(), groups.ravel())].reshape(
        len(groups), size, len(groups), size
    )
    # (G, G) whether two groups hold copies of one another
    clash: Ints = np.array(of_group.any(axis=(1, 3)), dtype=np.int64)
    np.fill_diagonal(clash, 0)
    seats = np.arange(len(groups)).reshape(batches, per_batch)
    for place in range(per_batch):
        seats[:, place] = seats[generator.permutation(batches), place]
    _spread(seats, clash, generator)
    return groups[seats].reshape(batches, -1)


def _spread(seats: Ints, clash: Ints, generator: np.random.Generator) -> None:
    """Exchange groups between batches at their place, in `seats` (m, per_batch), until no exchange
    helps.
    """
    # (G, m) clashes of group and batch
    met = np.stack([clash[:, members].sum(axis=1) for members in seats], axis=1)
    for _ in range(ROUNDS):
        moved = False
        for batch, place in generator.permutation(
            np.argwhere(np.take_along_axis(met.T, seats, axis=1) > 0)
        ):
            mine = seats[batch, place]
            theirs = seats[:, place]
            others = np.arange(len(seats))
            # a group's clash with the one that leaves its new batch goes with that one
            after = met[mine] + met[theirs, batch] - 2 * clash[mine, theirs]
            gains = met[mine, batch] + met[theirs, others] - after
            gains[batch] = 0
            other = int(gains.argmax())
            if gains[other] > 0:
                yours = theirs[other]
                met[:, batch] += clash[:, yours] - clash[:, mine]
                met[:, other] += clash[:, mine] - clash[:, yours]
                seats[batch, place], seats[other, place] = yours, mine
                moved = True
        if not moved:
            break
