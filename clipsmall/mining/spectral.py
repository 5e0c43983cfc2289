"""Even spectral clustering: groups of high loss as a minimum cut (Cho et al., arXiv 2307.05906)."""

import warnings

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from clipsmall.mining.scored_pairs import Bools, Floats, Ints, Quotas, ScoredPairs
from clipsmall.mining.swaps import separate_conflicts

# Least log affinity: with a smaller one a row's 1/√degree, squared by k-means, would overflow
# float64.
LEAST_LOG_AFFINITY = -600.0


def spectral_groups(
    scored: ScoredPairs,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats,
) -> Ints:
    """Batches of high loss as the even minimum cut of a graph of weights (Cho et al. 2023, arXiv
    2307.05906).

    As the authors' code has it: affinity exp(w), an embedding by the first eigenvectors of its
    normalised Laplacian, one per group, k-means, and then exact sizes by `even_clusters`. Seeding
    k-means once is enough: ten times changed the batches' loss by less than 1% either way.
    Eigenvectors by LAPACK, not ARPACK: the same, as fast at a logit scale of 10 (0.12 s for 1,280
    pairs), 400 times as fast at 100, and a graph in parts is no trouble to it. Where affinities
    differ by orders of magnitude (untrained towers at a logit scale of 30 or 100) the 1/√degree
    lets a few pairs take most centres: rows of unit length in its place, which are not the paper's,
    then found 5 to 40% more loss.

    Args:
        quotas: n pairs at most: what no group has a seat for is left out. Groups all of one size.
        cannot_link: (n, n) these have affinity 0, and are separated after the assignment, which
            does not know of them.
        weights: (n, n) as of `softmax_weights` or `sigmoid_weights`; a constant added to all
            changes nothing.

    Returns:
        (groups, size) places of pairs, in rising order within a group; groups of equal quotas in
        the order of their first members.
    """
    # the interface of all arrangements; this one sees the pairs through `weights`
    del scored
    groups_wanted = len(quotas.counts)
    means = KMeans(groups_wanted, n_init=1, random_state=int(generator.integers(2**31)))

    # one thread: several would add in another order
    with threadpool_limits(1), warnings.catch_warnings():
        # k-means warns of equal centres; the assignment fills all of them
        warnings.simplefilter("ignore", ConvergenceWarning)
        embedded = embedding(affinity(weights, cannot_link), groups_wanted)
        centres = means.fit(embedded).cluster_centers_

    groups = even_clusters(embedded, quotas, centres)
    groups = separate_conflicts(groups, quotas.owner, cannot_link, generator, weights)
    groups.sort(axis=1)
    if (quotas.counts == quotas.counts[0]).all():
        groups = groups[groups[:, 0].argsort()]
    return groups


def affinity(weights: Floats, cannot_link: Bools) -> Floats:
    """(n, n) float64 exp(w) over its maximum; 0 on the diagonal and where `cannot_link`.

    A common factor does not change the Laplacian, and without the division exp(100 times a cosine)
    would overflow.
    """
    diagonal = np.eye(len(weights), dtype=bool)
    apart = cannot_link | diagonal
    lowest = np.finfo(weights.dtype).min
    top = weights.max(where=~apart, initial=lowest)
    log_affinity = weights.astype(np.float64) - top
    made: Floats = np.exp(log_affinity.clip(LEAST_LOG_AFFINITY, 0))
    made[apart] = 0
    return made


def embedding(affinity: Floats, width: int) -> Floats:
    """(n, n) -> (n, width): first eigenvectors of the normalised Laplacian, over √degree.

    Those of I − D^−½ W D^−½ with the smallest eigenvalues, where W is the affinity.
    """
    degrees = affinity.sum(axis=1)

    # a pair without any affinity is a part of the graph by itself
    roots = np.sqrt(np.where(degrees > 0, degrees, 1))
    normalised = affinity / roots[:, None] / roots
    laplacian = np.eye(len(roots)) - normalised

    # in rising order of their eigenvalues
    first = [0, width - 1]
    vectors: Floats = eigh(laplacian, subset_by_index=first)[1]
    return vectors / roots[:, None]


def even_clusters(features: Floats, quotas: Quotas, centres: Floats) -> Ints:
    """(n, d) features, (groups, d) centres -> (groups, size) places of pairs.

    Each rank's pairs take that rank's seats, at the least total distance to the centres: an exact
    linear assignment, O(n³) at worst, for n up to some 10⁴.
    """
    distance = cdist(features, centres)

    # −1: no seat
    group_of = np.full(len(features), -1)
    for rank, counts in enumerate(quotas.counts.T):
        own_pairs = np.flatnonzero(quotas.owner == rank)

        # the group of each of the rank's seats
        seats = np.repeat(np.arange(len(centres)), counts)
        assert len(own_pairs) >= len(seats), (
            f"rank {rank} has {len(own_pairs)} pairs for {len(seats)} seats"
        )
        seated, seat = linear_sum_assignment(distance[np.ix_(own_pairs, seats)])
        group_of[own_pairs[seated]] = seats[seat]

    # pairs without a seat come first in the order of groups
    left_out = int((group_of < 0).sum())
    by_group = group_of.argsort(kind="stable")[left_out:]
    return by_group.reshape(len(centres), -1)
