"""Local search: pairs change groups as long as groups get harder, or conflicts fewer."""

import numpy as np

from clipsmall.mining.scored_pairs import Bools, Floats, Ints

# Negative weight of a cannot-link pair in a group: beyond any sum of weights, and sums with it are
# exact in float64.
PENALTY = 2.0**20
# how often conflicts are looked for; each time every pair in conflict may move
ROUNDS = 30


class _Groups:
    """Groups whose pairs are exchanged, with each pair's ties to each group kept up to date.

    `ties[g, i]` is the sum of the weights of pair i with the members of group g. So the gain of
    exchanging i, of group a, for j, of group b, is
    ties[b,i] + ties[a,j] - ties[a,i] - ties[b,j] - 2 w[i,j].
    """

    def __init__(self, weights: Floats, groups: Ints, owner: Ints) -> None:
        self.weights = weights
        self.groups = groups.copy()
        self.owner = owner
        n = len(weights)
        # (n,) each pair's group; −1 for pairs that a selection left out
        self.group_of = np.full(n, -1)
        self.group_of[groups] = np.arange(len(groups))[:, None]
        self.seated = self.group_of >= 0
        # (groups, n)
        self.ties = np.stack([weights[members].sum(axis=0, dtype=np.float64) for members in groups])
        # (n,) each pair's ties to its own group
        self.own = np.where(self.seated, self.ties[self.group_of, np.arange(n)], 0.0)
        self.several_ranks = bool((owner != owner[0]).any())

    def gains(self, i: int) -> Floats:
        """(n,) gain of exchanging pair i for each other pair; -inf where that is not allowed."""
        a = self.group_of[i]
        i_to_their_groups = self.ties[:, i][self.group_of]
        they_to_a = self.ties[a]
        gains: Floats = (
            i_to_their_groups + they_to_a - self.own[i] - self.own - 2.0 * self.weights[i]
        )
        gains[self.groups[a]] = -np.inf
        if not self.seated.all():
            gains[~self.seated] = -np.inf
        # pairs do not move between ranks
        if self.several_ranks:
            gains[self.owner != self.owner[i]] = -np.inf
        return gains

    def exchange(self, i: int, j: int) -> None:
        """Pairs i and j change groups."""
        a = self.group_of[i]
        b = self.group_of[j]
        self.groups[a][self.groups[a] == i] = j
        self.groups[b][self.groups[b] == j] = i
        change = self.weights[j].astype(np.float64) - self.weights[i]
        self.ties[a] += change
        self.ties[b] -= change
        self.group_of[i] = b
        self.group_of[j] = a
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
    """(groups, size) of higher total weight.

    Each pair in turn is exchanged for the pair of the same rank by which the groups gain most;
    sizes and quotas stay as they are.

    Args:
        weights: (n, n) symmetric, see `weights`.
        groups: (groups, size) to start from.
        owner: (n,) rank of each pair.
        cannot_link: (n, n) never put together, and separated if they were.
        sweeps: times that every pair is offered an exchange, at most; it ends when none gains.
    """
    if sweeps < 1 or len(groups) < 2:
        return groups
    state = _penalised(weights, groups, owner, cannot_link)
    # more than rounding makes
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
    """The groups under weights by which cannot-link pairs are worse than anything else."""
    return _Groups(np.where(cannot_link, np.float32(-PENALTY), weights), groups, owner)


def separate_conflicts(
    groups: Ints,
    owner: Ints,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats | None = None,
) -> Ints:
    """(groups, size) with as few cannot-link pairs inside as exchanges can reach.

    Hardly any other pair moves. With `weights`, a pair in conflict first goes to the group where it
    is hardest, of those where it has no conflict. Then, and without weights, it goes where it has
    the fewest, at random among equal groups, so that the search does not stop short.

    Args:
        groups: (groups, size) to start from.
        owner: (n,) rank of each pair; pairs do not move between ranks.
        cannot_link: (n, n) symmetric.
        weights: (n, n) symmetric, see `weights`.
    """
    if len(groups) < 2 or not count_conflicts(groups, cannot_link).any():
        return groups
    if weights is not None:
        groups = _move_to_hardest(_penalised(weights, groups, owner, cannot_link), generator)
    fewest_conflicts = _Groups(-cannot_link.astype(np.float32), groups, owner)
    return _move_to_fewest_conflicts(fewest_conflicts, generator)


def _move_to_hardest(state: _Groups, generator: np.random.Generator) -> Ints:
    in_conflict = (state.own < -PENALTY / 2) & state.seated
    for i in generator.permutation(np.flatnonzero(in_conflict)):
        gains = state.gains(i)
        # an exchange before may have ended its conflict
        if state.own[i] < -PENALTY / 2 and gains.max() > 0:
            state.exchange(i, int(gains.argmax()))
    return state.groups


def _move_to_fewest_conflicts(state: _Groups, generator: np.random.Generator) -> Ints:
    for _ in range(ROUNDS):
        in_conflict = np.flatnonzero((state.own < 0) & state.seated)
        if not len(in_conflict):
            break
        for i in generator.permutation(in_conflict):
            # an exchange before may have ended its conflict
            if state.own[i] >= 0:
                continue
            gains = state.gains(i)
            best = gains.max()
            if best >= 0:
                equals = np.flatnonzero(gains == best)
                state.exchange(i, int(generator.choice(equals)))
    return state.groups


def count_conflicts(groups: Ints, cannot_link: Bools) -> Ints:
    """(groups,) combinations of two cannot-link pairs inside each group."""
    counts = [cannot_link[np.ix_(members, members)].sum() // 2 for members in groups]
    return np.array(counts, dtype=np.int64)
