"""Even spectral clustering: the arrangement of the paper that batches of high loss come from."""

import warnings

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from clipsmall.mining.scored import Bools, Floats, Ints, Quotas, Scored
from clipsmall.mining.swaps import separated

# log affinity: with fainter ones a row's 1/√degree, squared by k-means, would leave float64
FAINTEST = -600.0


def spectral(
    scored: Scored,
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
    lets a few
    pairs take most centres: rows of unit length in its place, which are not the paper's, then found
    5 to 40% more loss.

    Args:
        quotas: n pairs at most: what no group has a seat for is left out. Groups all of one size.
        cannot_link: (n, n) affinity 0, and separated after the assignment, which does not know of
            it.
        weights: (n, n) as of `softmax_weights` or `sigmoid_weights`; a constant added to all
            changes nothing.

    Returns (groups, size), members in rising order. Groups of equal quotas come by their first
    member.
    """
    del scored
    means = KMeans(len(quotas.counts), n_init=1, random_state=int(generator.integers(2**31)))
    # several threads would add in another order
    with (
        threadpool_limits(1),
        warnings.catch_warnings(),
    ):
        # of equal centres; the assignment fills them all
        warnings.simplefilter("ignore", ConvergenceWarning)
        embedded = embedding(affinity(weights, cannot_link), len(quotas.counts))
        centres = means.fit(embedded).cluster_centers_
    groups = separated(
        even_clusters(embedded, quotas, centres), quotas.owner, cannot_link, generator, weights
    )
    groups.sort(axis=1)
    if (quotas.counts == quotas.counts[0]).all():
        groups = groups[groups[:, 0].argsort()]
    return groups


def affinity(weights: Floats, cannot_link: Bools) -> Floats:
    """(n, n) float64 exp(w) over its maximum: a common factor does not change the Laplacian, but
    100 times a cosine does not fit an exponential. 0 on the diagonal and where `cannot_link`."""
    apart = cannot_link | np.eye(len(weights), dtype=bool)
    top = weights.max(where=~apart, initial=np.finfo(weights.dtype).min)
    made: Floats = np.exp((weights.astype(np.float64) - top).clip(FAINTEST, 0))
    made[apart] = 0
    return made


def embedding(affinity: Floats, width: int) -> Floats:
    """(n, n) -> (n, width): eigenvectors of I − D^−½ W D^−½ with the smallest eigenvalues, over
    √degree.
    """
    degrees = affinity.sum(axis=1)
    # a pair that may meet nobody stands alone
    roots = np.sqrt(np.where(degrees > 0, degrees, 1))
    laplacian = np.eye(len(roots)) - affinity / roots[:, None] / roots
    vectors: Floats = eigh(laplacian, subset_by_index=[0, width - 1])[1]
    return vectors / roots[:, None]


def even_clusters(features: Floats, quotas: Quotas, centres: Floats) -> Ints:
    """(n, d) features, (groups, d) centres -> (groups, size) places of pairs: each rank's pairs on
    that rank's seats, at the least total distance to the centres. An exact linear assignment, O(n³)
    at worst: for n up to some 10⁴."""
    distance = cdist(features, centres)
    group_of = np.full(len(features), -1)
    for rank, counts in enumerate(quotas.counts.T):
        mine = np.flatnonzero(quotas.owner == rank)
        seats = np.repeat(np.arange(len(centres)), counts)
        assert len(mine) >= len(seats), f"rank {rank} has {len(mine)} pairs for {len(seats)} seats"
        seated, seat = linear_sum_assignment(distance[np.ix_(mine, seats)])
        group_of[mine[seated]] = seats[seat]
    left_out = int((group_of < 0).sum())
    return group_of.argsort(kind="stable")[left_out:].reshape(len(centres), -1)
