"""Balanced k-means: clusters of exact sizes, by optimal transport from pairs to centres."""

import numpy as np
from scipy.special import logsumexp

from clipsmall.mining.scored_pairs import Bools, Floats, Ints, Quotas, ScoredPairs
from clipsmall.mining.swaps import separate_conflicts

# number of updates of the centres
ROUNDS = 12
# Sinkhorn iterations per round
SWEEPS = 8
# 1/epsilon of the transport plan; the costs are cosines of [image; text], in [-1, 1]
SHARPNESS = 50.0


def balanced_kmeans(
    scored: ScoredPairs,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats,
) -> Ints:
    """Groups of similar pairs: k-means on [image; text], with clusters of exact sizes.

    The assignment is an entropic transport plan whose marginals are the groups' sizes (Genevay,
    Dulac-Arnold and Vert 2019, arXiv 1910.09036), rounded at the end, most confident pairs first.
    All ranks share the centres; each rank's pairs are assigned within that rank's quotas.

    Args:
        weights: (n, n), see `weights`; used to choose the new group of a pair in conflict.
    """
    both_sides = np.concatenate([scored.image, scored.text], axis=1)

    # scale back to unit length
    features = both_sides.astype(np.float64) / np.sqrt(2)
    pairs = len(features)
    count = len(quotas.counts)

    # start with random pairs as centres
    first = generator.choice(pairs, count, replace=False)
    centres = features[first]

    # (n, groups) fraction of each pair assigned to each group
    plan = np.zeros((pairs, count))
    for _ in range(ROUNDS):
        similar = SHARPNESS * features @ centres.T
        for rank, counts in enumerate(quotas.counts.T):
            own_pairs = np.flatnonzero(quotas.owner == rank)
            own_groups = np.flatnonzero(counts)
            block = np.ix_(own_pairs, own_groups)
            plan[block] = transport_plan(similar[block], counts[own_groups])

        centres = plan.T @ features
        lengths = np.linalg.norm(centres, axis=1, keepdims=True)
        centres /= lengths.clip(min=1e-12)

    groups = round_plan(plan, quotas)
    return separate_conflicts(groups, quotas.owner, cannot_link, generator, weights)


def transport_plan(similar: Floats, capacity: Ints) -> Floats:
    """(n, G), all positive; rows sum to 1, columns to about `capacity` (G,).

    Sinkhorn's algorithm: columns and rows are scaled alternately, in logarithms.
    """
    logs = similar - similar.max(axis=1, keepdims=True)

    # with more pairs than seats, enlarge all groups by the same factor
    pairs_a_seat = len(similar) / capacity.sum()
    room = np.log(capacity * pairs_a_seat)
    for _ in range(SWEEPS):
        logs += room - logsumexp(logs, axis=0)
        logs -= logsumexp(logs, axis=1, keepdims=True)

    made: Floats = np.exp(logs)
    return made


def round_plan(plan: Floats, quotas: Quotas) -> Ints:
    """Round an (n, G) plan to (groups, size) places of pairs, most confident pairs first."""
    count = len(quotas.counts)
    size = int(quotas.sizes[0])
    groups = np.full((count, size), -1, dtype=np.int64)

    # (groups, W) free seats of each rank, and (groups,) number of seated pairs
    left = quotas.counts.copy()
    filled = np.zeros(count, dtype=np.int64)
    waiting = np.arange(len(plan))
    while len(waiting) and left.any():
        # each pair asks for its best group with a free seat for its rank
        open_seats = left.T[quotas.owner[waiting]] > 0
        wishes = np.where(open_seats, plan[waiting], -np.inf)
        wish = wishes.argmax(axis=1)
        confidence = wishes[np.arange(len(waiting)), wish]
        by_confidence = np.argsort(-confidence, kind="stable")

        # −inf: no group has a free seat for the pair's rank
        has_wish = np.isfinite(confidence[by_confidence])
        seated = np.zeros(len(waiting), dtype=bool)
        for place in by_confidence[has_wish]:
            pair = waiting[place]
            group = wish[place]
            rank = quotas.owner[pair]
            if left[group, rank]:
                left[group, rank] -= 1
                groups[group, filled[group]] = pair
                filled[group] += 1
                seated[place] = True

        if not seated.any():
            break
        waiting = waiting[~seated]

    return groups
