"""Balanced k-means: clusters of exact sizes, by transport between pairs and centres."""

import numpy as np
from scipy.special import logsumexp

from clipsmall.mining.scored_pairs import Bools, Floats, Ints, Quotas, ScoredPairs
from clipsmall.mining.swaps import separate_conflicts

# how often centres are moved
ROUNDS = 12
# Sinkhorn iterations in each round
SWEEPS = 8
# 1/epsilon of the transport plan, on cosines of [image; text] in [-1, 1]
SHARPNESS = 50.0


def balanced_kmeans(
    scored: ScoredPairs,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats,
) -> Ints:
    """Groups of similar pairs: k-means on [image; text], with clusters of exact sizes.

    The assignment is an entropic transport plan whose margins are the groups' sizes (Genevay,
    Dulac-Arnold and Vert 2019, arXiv 1910.09036), rounded by confidence at the end. Centres are
    shared by all ranks; each rank's pairs are assigned within that rank's quotas.

    Args:
        weights: (n, n), see `weights`; where pairs in conflict are moved to.
    """
    both_sides = np.concatenate([scored.image, scored.text], axis=1)

    # unit length again
    features = both_sides.astype(np.float64) / np.sqrt(2)
    pairs = len(features)
    count = len(quotas.counts)

    # random pairs are the first centres
    first = generator.choice(pairs, count, replace=False)
    centres = features[first]

    # (n, groups) how much of a pair is in a group
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

    # if there are more pairs than seats, all groups get more
    pairs_a_seat = len(similar) / capacity.sum()
    room = np.log(capacity * pairs_a_seat)
    for _ in range(SWEEPS):
        logs += room - logsumexp(logs, axis=0)
        logs -= logsumexp(logs, axis=1, keepdims=True)

    made: Floats = np.exp(logs)
    return made


def round_plan(plan: Floats, quotas: Quotas) -> Ints:
    """(n, G) plan -> (groups, size) places of pairs; seats go to the most confident pairs first."""
    count = len(quotas.counts)
    size = int(quotas.sizes[0])
    groups = np.full((count, size), -1, dtype=np.int64)

    # (groups, W) seats of each rank, and (groups,) pairs seated
    left = quotas.counts.copy()
    filled = np.zeros(count, dtype=np.int64)
    waiting = np.arange(len(plan))
    while len(waiting) and left.any():
        # each pair asks for its best group that has a seat for its rank
        open_seats = left.T[quotas.owner[waiting]] > 0
        wishes = np.where(open_seats, plan[waiting], -np.inf)
        wish = wishes.argmax(axis=1)
        confidence = wishes[np.arange(len(waiting)), wish]
        by_confidence = np.argsort(-confidence, kind="stable")

        # −inf: no seat for this rank in any group
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
