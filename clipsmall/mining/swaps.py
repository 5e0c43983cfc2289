"""Local search: pairs change places between groups as long as the groups get harder, or conflicts
fewer.
"""

import numpy as np

from clipsmall.mining.scored import Bools, Floats, Ints

# of a cannot-link pair in a group: beyond any sum of weights, exact beside them in float64
PENALTY = 2.0**20
# of separating; each may move every pair in conflict
ROUNDS = 30


class _Groups:
    """Groups under exchange, with each pair's ties to each group kept up to date.

    `ties[g, i]` is the sum of weights between pair i and the members of group g, so the gain of an
    exchange of i and j, of groups a and b, is ties[b,i] + ties[a,j] - ties[a,i] - ties[b,j] - 2
    w[i,j].
    """

    def __init__(self, weights: Floats, groups: Ints, owner: Ints) -> None:
        self.weights = weights
        self.groups = groups.copy()
        self.owner = owner
        n = len(weights)
        self.of = np.full(n, -1)
        self.of[groups] = np.arange(len(groups))[:, None]
        # a selection leaves pairs out
        self.seated = self.of >= 0
        self.ties = np.stack([weights[members].sum(axis=0, dtype=np.float64) for members in groups])
        self.own = np.where(self.seated, self.ties[self.of, np.arange(n)], 0.0)
        self.several = bool((owner != owner[0]).any())

    def gains(self, i: int) -> Floats:
        """(n,) of exchanging i with each other pair; -inf where that is not allowed."""
        a = self.of[i]
        found: Floats = (
            self.ties[:, i][self.of] + self.ties[a] - self.own[i] - self.own - 2.0 * self.weights[i]
        )
        found[self.groups[a]] = -np.inf
        if not self.seated.all():
            found[~self.seated] = -np.inf
        if self.several:
            found[self.owner != self.owner[i]] = -np.inf
        return found

    def exchange(self, i: int, j: int) -> None:
        a = self.of[i]
        b = self.of[j]
        self.groups[a][self.groups[a] == i] = j
        self.groups[b][self.groups[b] == j] = i
        change = self.weights[j].astype(np.float64) - self.weights[i]
        self.ties[a] += change
        self.ties[b] -= change
        self.of[i], self.of[j] = b, a
        for group in (a, b):
            members = self.groups[group]
            self.own[members] = self.ties[group, members]


def swapped(
    weights: Floats,
    groups: Ints,
    owner: Ints,
    cannot_link: Bools,
    sweeps: int,
    generator: np.random.Generator,
) -> Ints:
    """Groups of higher total weight, by best exchanges of two pairs of one rank; sizes and quotas
    stay as they are.

    Args:
        weights: (n, n) symmetric, see `weights`.
        groups: (groups, size) to start from.
        owner: (n,) rank of each pair.
        cannot_link: (n, n) never put together, and separated if they were.
        sweeps: times that every pair is offered an exchange, at most; it ends when none gains.
    """
    if sweeps < 1 or len(groups) < 2:
        return groups
    state = _Groups(np.where(cannot_link, np.float32(-PENALTY), weights), groups, owner)
    enough = 1e-6 * max(float(np.abs(weights).max()), 1e-30)
    for _ in range(sweeps):
        moved = 0
        for i in generator.permutation(groups.ravel()):
            gains = state.gains(i)
            j = int(gains.argmax())
            if gains[j] > enough:
                state.exchange(i, j)
                moved += 1
        if not moved:
            break
    return state.groups


def separated(
    groups: Ints,
    owner: Ints,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats | None = None,
) -> Ints:
    """Groups with as few cannot-link pairs inside as exchanges can reach; hardly any other pair
    moves.

    With `weights`, a pair in conflict goes where it is hardest among those that clear it. Then, and
    without them, where fewest are, at random among equals, so that the search does not stand still.
    """
    if len(groups) < 2 or not conflicts(groups, cannot_link).any():
        return groups
    if weights is not None:
        groups = _placed(
            _Groups(np.where(cannot_link, np.float32(-PENALTY), weights), groups, owner), generator
        )
    return _scattered(_Groups(-cannot_link.astype(np.float32), groups, owner), generator)


def _placed(state: _Groups, generator: np.random.Generator) -> Ints:
    for i in generator.permutation(np.flatnonzero((state.own < -PENALTY / 2) & state.seated)):
        gains = state.gains(i)
        if state.own[i] < -PENALTY / 2 and gains.max() > 0:
            state.exchange(i, int(gains.argmax()))
    return state.groups


def _scattered(state: _Groups, generator: np.random.Generator) -> Ints:
    for _ in range(ROUNDS):
        unhappy = np.flatnonzero((state.own < 0) & state.seated)
        if not len(unhappy):
            break
        for i in generator.permutation(unhappy):
            if state.own[i] < 0:
                gains = state.gains(i)
                best = gains.max()
                if best >= 0:
                    state.exchange(i, int(generator.choice(np.flatnonzero(gains == best))))
    return state.groups


def conflicts(groups: Ints, cannot_link: Bools) -> Ints:
    """(groups,) cannot-link pairs inside each group."""
    return np.array(
        [cannot_link[np.ix_(members, members)].sum() // 2 for members in groups], dtype=np.int64
    )
