"""Local search: swaps pairs between groups to make groups harder or to remove conflicts."""

import numpy as np

from clipsmall.mining.scored_pairs import Bools, Floats, Ints

# Penalty of a cannot-link pair in a group: larger than any sum of weights, and exact in sums of
# float64.
PENALTY = 2.0**20
# number of rounds to remove conflicts; in each, every pair in conflict may move once
ROUNDS = 30


class _Groups:
    """Groups under pair swaps, with each pair's ties to every group kept up to date.

    `ties[g, i]` is the sum of the weights of pair i with the members of group g. So swapping i in
    group a with j in group b changes the total weight by
    ties[b,i] + ties[a,j] - ties[a,i] - ties[b,j] - 2 w[i,j].
    """

    def __init__(self, weights: Floats, groups: Ints, owner: Ints) -> None:
        self.weights = weights
        self.groups = groups.copy()
        self.owner = owner
        n = len(weights)
        everyone = np.arange(n)

        # (n,) the group of each pair; −1 for pairs that a selection left out
        self.group_of = np.full(n, -1)
        self.group_of[groups] = np.arange(len(groups))[:, None]
        self.seated = self.group_of >= 0
        # (groups, n) sums of weights
        ties = [weights[members].sum(axis=0, dtype=np.float64) for members in groups]
        self.ties = np.stack(ties)
        # (n,) ties of each pair to its own group
        own = self.ties[self.group_of, everyone]
        self.own = np.where(self.seated, own, 0.0)
        # pairs stay on their rank
        self.several_ranks = bool((owner != owner[0]).any())

    def gains(self, i: int) -> Floats:
        """(n,) gain of swapping pair i with each other pair; -inf where that is not allowed."""
        a = self.group_of[i]
        i_to_their_groups = self.ties[:, i][self.group_of]
        they_to_a = self.ties[a]
        gains: Floats = (
            i_to_their_groups + they_to_a - self.own[i] - self.own - 2.0 * self.weights[i]
        )
        gains[self.groups[a]] = -np.inf
        if not self.seated.all():
            gains[~self.seated] = -np.inf
        if self.several_ranks:
            gains[self.owner != self.owner[i]] = -np.inf
        return gains

    def exchange(self, i: int, j: int) -> None:
        """Swap the groups of pairs i and j."""
        a = self.group_of[i]
        b = self.group_of[j]
        group_a = self.groups[a]
        group_b = self.groups[b]
        group_a[group_a == i] = j
        group_b[group_b == j] = i
        self.group_of[i] = b
        self.group_of[j] = a

        # for all pairs: ties to group a lose weights with i and gain those with j; b the reverse
        change = self.weights[j].astype(np.float64) - self.weights[i]
        self.ties[a] += change
        self.ties[b] -= change
        for group in (a, b):
            members = self.groups[group]
            self.own[members] = self.ties[group, members]


def improve_by_swaps(
    weights: Floats,
    groups: Ints,
    owner: Ints,
    cannot_link: Bools,
    sweeps: int,
    generator: np.random.Generator,
) -> Ints:
    """(groups, size) groups of higher total weight.

    Each pair in turn is swapped with the pair of the same rank that gives the largest gain; sizes
    and quotas do not change.

    Args:
        weights: (n, n) symmetric, see `weights`.
        groups: (groups, size) initial groups.
        owner: (n,) rank of each pair.
        cannot_link: (n, n) pairs never put in one group, and separated if they share one.
        sweeps: largest number of passes over all pairs; ends early if no swap gains.
    """
    if sweeps < 1 or len(groups) < 2:
        return groups
    state = _penalised(weights, groups, owner, cannot_link)

    # larger than rounding errors
    least_gain = 1e-6 * max(float(np.abs(weights).max()), 1e-30)
    for _ in range(sweeps):
        moved = False
        for i in generator.permutation(groups.ravel()):
            gains = state.gains(i)
            j = int(gains.argmax())
            if gains[j] > least_gain:
                state.exchange(i, j)
                moved = True

        if not moved:
            break

    return state.groups


def _penalised(weights: Floats, groups: Ints, owner: Ints, cannot_link: Bools) -> _Groups:
    """The groups with weights in which a cannot-link pair outweighs everything else."""
    return _Groups(np.where(cannot_link, np.float32(-PENALTY), weights), groups, owner)


def separate_conflicts(
    groups: Ints,
    owner: Ints,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats | None = None,
) -> Ints:
    """(groups, size) groups with as few cannot-link pairs inside as swaps can reach.

    Hardly any other pair moves. With `weights`, a pair in conflict first moves to the hardest group
    without a conflict for it. After that, or without weights, it moves to the group with the fewest
    conflicts, at random among equal ones, so that the search does not get stuck.

    Args:
        groups: (groups, size) initial groups.
        owner: (n,) rank of each pair; pairs stay on their rank.
        cannot_link: (n, n) bool, symmetric.
        weights: (n, n) symmetric, see `weights`.
    """
    if len(groups) < 2 or not count_conflicts(groups, cannot_link).any():
        return groups
    if weights is not None:
        by_weight = _penalised(weights, groups, owner, cannot_link)
        groups = _move_to_hardest(by_weight, generator)

    # weight −1 for each conflict, 0 elsewhere
    conflicts = -cannot_link.astype(np.float32)
    by_conflicts = _Groups(conflicts, groups, owner)
    return _move_to_fewest_conflicts(by_conflicts, generator)


def _move_to_hardest(state: _Groups, generator: np.random.Generator) -> Ints:
    # a sum of weights below this contains a penalty
    limit = -PENALTY / 2
    in_conflict = np.flatnonzero((state.own < limit) & state.seated)
    for i in generator.permutation(in_conflict):
        gains = state.gains(i)
        best = int(gains.argmax())

        # an earlier swap may have removed its conflict
        if state.own[i] < limit and gains[best] > 0:
            state.exchange(i, best)

    return state.groups


def _move_to_fewest_conflicts(state: _Groups, generator: np.random.Generator) -> Ints:
    for _ in range(ROUNDS):
        in_conflict = np.flatnonzero((state.own < 0) & state.seated)
        if not len(in_conflict):
            break
        for i in generator.permutation(in_conflict):
            # an earlier swap may have removed its conflict
            if state.own[i] >= 0:
                continue
            gains = state.gains(i)
            best = gains.max()
            if best >= 0:
                equals = np.flatnonzero(gains == best)
                state.exchange(i, int(generator.choice(equals)))

    return state.groups


def count_conflicts(groups: Ints, cannot_link: Bools) -> Ints:
    """(groups,) number of cannot-link combinations inside each group."""
    counts = [cannot_link[np.ix_(members, members)].sum() // 2 for members in groups]
    return np.array(counts, dtype=np.int64)
