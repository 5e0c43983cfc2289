"""Small hard groups put together into batches, at random but for copies."""

import numpy as np

from clipsmall.mining.scored import Bools, Ints, Quotas

ROUNDS = 30  # of looking for another place for a group that brings a copy


def even_quotas(owner: Ints, ranks: int, batch_size: int, size: int) -> Quotas:
    """Quotas of groups of `size`, batch by batch, such that each batch takes batch_size / ranks of every rank.

    A batch's seats belong to the ranks by turns, so that groups are as mixed as they can be: four ranks and groups of
    four have one pair each.
    """
    turns = np.arange(batch_size) % ranks
    of_batch = np.stack([np.bincount(part, minlength=ranks) for part in turns.reshape(-1, size)])
    return Quotas(owner, np.tile(of_batch, (len(owner) // batch_size, 1)))


def combined(groups: Ints, per_batch: int, copies: Bools, generator: np.random.Generator) -> Ints:
    """(m · per_batch, size) groups, as of `even_quotas` -> (m, B) batches.

    The groups at one place of all batches have the same quotas: they are permuted among the batches, then those that
    bring a pair beside its copy change places with others.
    """
    if per_batch == 1:
        return groups
    batches = len(groups) // per_batch
    dealt = groups.reshape(batches, per_batch, -1).copy()
    for place in range(per_batch):
        dealt[:, place] = dealt[generator.permutation(batches), place]
    for _ in range(ROUNDS):
        places = ((batch, place) for batch in range(batches) for place in range(per_batch))
        clashing = [(b, p) for b, p in places if _clashes(dealt, copies, b, p, dealt[b, p])]
        if not clashing:
            break
        for batch, place in clashing:
            mine = dealt[batch, place].copy()
            if not _clashes(dealt, copies, batch, place, mine):
                continue
            for other in generator.permutation(batches):
                theirs = dealt[other, place].copy()
                if other != batch and not (
                    _clashes(dealt, copies, batch, place, theirs) or _clashes(dealt, copies, other, place, mine)
                ):
                    dealt[batch, place], dealt[other, place] = theirs, mine
                    break
    return dealt.reshape(batches, -1)


def _clashes(dealt: Ints, copies: Bools, batch: int, place: int, group: Ints) -> bool:
    """Whether `group`, put at that place, would meet a copy in the rest of the batch."""
    rest = np.delete(dealt[batch], place, axis=0).ravel()
    return bool(copies[np.ix_(group, rest)].any())
