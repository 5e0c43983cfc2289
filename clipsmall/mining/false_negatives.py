"""Pairs that must not share a group: copies, near-duplicates and likely false negatives."""

from typing import NamedTuple

import numpy as np

from clipsmall.mining.scored_pairs import Bools, Floats, Ints, ScoredPairs

# number of rows of the (n, n) matrix from which a quantile is estimated
SAMPLED = 1024
# Largest fraction of all combinations of two pairs that may count as near-duplicates: two per pair
# in a pool of 2,048.
MOST_NEAR = 0.001
# lower bound of a positive's cosine when hardness is measured relative to it
LEAST_COSINE = 0.05


class Identity(NamedTuple):
    """What is known about n pairs without a model: number, caption hash and image hash."""

    index: Ints  # type: ignore[assignment]  # (n,) the pair's number
    # (n,) hash of the caption
    caption_hash: Ints
    # (n,) hash of the image's bytes
    image_hash: Ints

    def take(self, places: Ints) -> "Identity":
        return Identity(*(field[places] for field in self))


def copies(identity: Identity) -> Bools:
    """(n, n) True where two pairs have the same number, caption or image; False on the diagonal."""
    n = len(identity.index)
    same = np.zeros((n, n), dtype=bool)
    for field in identity:
        values, counts = np.unique(field, return_counts=True)
        for value in values[counts > 1]:
            members = np.flatnonzero(field == value)
            same[np.ix_(members, members)] = True

    np.fill_diagonal(same, False)
    return same


def near_duplicates(scored: ScoredPairs, cosine: float) -> Bools:
    """(n, n) True where two images, or two captions, have a cosine above `cosine`; 1 = nowhere.

    Hardly trained towers give similar features for all pairs. So at most a fraction MOST_NEAR of
    all combinations counts as near-duplicates (in a small pool, one per pair).
    """
    n = len(scored.image)
    near = np.zeros((n, n), dtype=bool)
    if cosine >= 1:
        return near
    for features in (scored.image, scored.text):
        closeness = features @ features.T
        np.fill_diagonal(closeness, -np.inf)
        least = hardness_threshold(closeness, max(MOST_NEAR, 1 / n))
        near |= closeness > max(cosine, least)

    return near


def relative_hardness(scored: ScoredPairs) -> Floats:
    """(n, n), symmetric: cosine of two pairs as negatives, divided by their positives' cosine.

    The larger of the two cross cosines over the smaller of the two positives' cosines; −inf on the
    diagonal. At 1 a caption matches the other pair's image as well as its own, so it may be a false
    negative (positive-aware thresholds of NV-Retriever, Moreira et al. 2024, arXiv 2407.15831,
    TopK-PercPos, on the worse of the two sides).
    """
    cosines = scored.image @ scored.text.T
    # cosines of one pair's image with the other's caption; the larger of the two directions
    cross = np.maximum(cosines, cosines.T)
    # cosines of the positives
    own = cosines.diagonal().clip(min=LEAST_COSINE)
    smaller_own = np.minimum(own[:, None], own[None, :])
    made: Floats = cross / smaller_own
    np.fill_diagonal(made, -np.inf)
    return made


def hardness_threshold(hardness: Floats, fraction: float) -> float:
    """The value exceeded by this fraction of the finite entries of `hardness` (n, n).

    Estimated from SAMPLED evenly spaced rows; inf if none of their entries is finite.
    """
    n = len(hardness)
    places = np.linspace(0, n - 1, min(n, SAMPLED))
    places = np.unique(places.astype(int))
    rows = hardness[places]
    # leave out the diagonal, which is −inf
    finite = rows[np.isfinite(rows)]
    if not len(finite):
        return np.inf
    return float(np.quantile(finite, 1 - fraction))


def too_hard_negatives(
    scored: ScoredPairs, fraction: float, ratio: float | None
) -> tuple[Bools, float]:
    """(n, n) True where two pairs' relative hardness exceeds a threshold; also the threshold.

    Args:
        fraction: fraction of all combinations of two pairs above the threshold, which therefore
            adapts to the model.
        ratio: a fixed threshold to use instead.
    """
    n = len(scored.image)
    if not fraction and ratio is None:
        return np.zeros((n, n), dtype=bool), np.inf
    hardness = relative_hardness(scored)
    threshold = ratio
    if threshold is None:
        threshold = hardness_threshold(hardness, fraction)
    return hardness > threshold, threshold
