"""Balanced k-means: clusters of exact sizes, by transport between pairs and centres."""

import numpy as np
from scipy.special import logsumexp

from clipsmall.mining.scored import Bools, Floats, Ints, Quotas, Scored
from clipsmall.mining.swaps import separated

# of moving the centres
ROUNDS = 12
# of Sinkhorn's scaling in each
SWEEPS = 8
# 1/epsilon of the transport, on cosines of [image; text] in [-1, 1]
SHARPNESS = 50.0


def balanced_kmeans(
    scored: Scored,
    quotas: Quotas,
    cannot_link: Bools,
    generator: np.random.Generator,
    weights: Floats,
) -> Ints:
    """Groups of similar pairs: k-means on [image; text] whose assignment is an entropic transport
    with the groups' sizes as margins (Genevay, Dulac-Arnold and Vert 2019, arXiv 1910.09036),
    rounded by confidence at the end.

    Centres are shared by all ranks; each rank's pairs are assigned within that rank's quotas;
    `weights` say where pairs go that may not meet.
    """
    features = np.concatenate([scored.image, scored.text], axis=1).astype(np.float64) / np.sqrt(2)
    groups = len(quotas.counts)
    centres = features[generator.choice(len(features), groups, replace=False)]
    plan = np.zeros((len(features), groups))
    for _ in range(ROUNDS):
        similar = SHARPNESS * features @ centres.T
        for rank, counts in enumerate(quotas.counts.T):
            mine = np.flatnonzero(quotas.owner == rank)
            seats = np.flatnonzero(counts)
            plan[np.ix_(mine, seats)] = transport(similar[np.ix_(mine, seats)], counts[seats])
        centres = plan.T @ features
        centres /= np.linalg.norm(centres, axis=1, keepdims=True).clip(min=1e-12)
    return separated(rounded(plan, quotas), quotas.owner, cannot_link, generator, weights)


def transport(similar: Floats, capacity: Ints) -> Floats:
    """(n, G) plan whose rows sum to 1 and whose columns sum to about `capacity`, all positive:
    scaled alternately.
    """
    logs = similar - similar.max(axis=1, keepdims=True)
    room = np.log(capacity * (len(similar) / capacity.sum()))
    for _ in range(SWEEPS):
        logs += room - logsumexp(logs, axis=0)
        logs -= logsumexp(logs, axis=1, keepdims=True)
    made: Floats = np.exp(logs)
    return made


def rounded(plan: Floats, quotas: Quotas) -> Ints:
    """(groups, size): seats go to the most confident pairs first."""
    groups = np.full((len(quotas.counts), int(quotas.sizes[0])), -1, dtype=np.int64)
    left = quotas.counts.copy()
    filled = np.zeros(len(groups), dtype=np.int64)
    waiting = np.arange(len(plan))
    while len(waiting) and left.any():
        # everybody asks for the best group with a seat left; the most confident are seated first
        open_seats = left.T[quotas.owner[waiting]] > 0
        wishes = np.where(open_seats, plan[waiting], -np.inf)
        wish = wishes.argmax(axis=1)
        confident = np.argsort(-wishes[np.arange(len(waiting)), wish], kind="stable")
        seated = np.zeros(len(waiting), dtype=bool)
        for place in confident[np.isfinite(wishes[confident, wish[confident]])]:
            pair = waiting[place]
            group = wish[place]
            if left[group, quotas.owner[pair]]:
                left[group, quotas.owner[pair]] -= 1
                groups[group, filled[group]] = pair
                filled[group] += 1
                seated[place] = True
        if not seated.any():
            break
        waiting = waiting[~seated]
    return groups
