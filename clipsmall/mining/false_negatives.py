"""Pairs that must not meet in a mined batch: copies, near duplicates, and negatives too close to be
true.
"""

from typing import NamedTuple

import numpy as np

from clipsmall.mining.scored import Bools, Floats, Ints, Scored

# rows that the threshold of a share of all pairs is read off
SAMPLED = 1024
# of all pairs of pairs may be near duplicates: two of each pair, in a pool of 2,048
MOST = 0.001
# a positive cosine below it tells nothing about its negatives
UNSURE = 0.05


class Identity(NamedTuple):
    """What is known of n pairs without any model."""

    index: Ints  # type: ignore[assignment]  # (n,) the pair's number
    # (n,)
    caption_hash: Ints
    # (n,) of the image's bytes
    image_hash: Ints

    def take(self, places: Ints) -> "Identity":
        return Identity(*(field[places] for field in self))


def copies(identity: Identity) -> Bools:
    """(n, n) the same pair, caption or image."""
    same = np.zeros((len(identity.index),) * 2, dtype=bool)
    for field in identity:
        values, counts = np.unique(field, return_counts=True)
        for value in values[counts > 1]:
            members = np.flatnonzero(field == value)
            same[np.ix_(members, members)] = True
    np.fill_diagonal(same, False)
    return same


def near_duplicates(scored: Scored, cosine: float) -> Bools:
    """(n, n) two images, or two captions, closer than `cosine` to the scorer; 1 = none are.

    To towers that have hardly learned all features are close: MOST of all pairs of pairs, at most,
    are called so (in a small pool one of each pair).
    """
    near = np.zeros((len(scored.image),) * 2, dtype=bool)
    if cosine < 1:
        for features in (scored.image, scored.text):
            closeness = features @ features.T
            np.fill_diagonal(closeness, -np.inf)
            near |= closeness > max(cosine, threshold(closeness, max(MOST, 1 / len(near))))
    return near


def relative_hardness(scored: Scored) -> Floats:
    """(n, n) symmetric: the larger of two pairs' cross cosines over the smaller of their own
    cosines.

    At 1 a caption fits another pair's image as well as that pair's own: it may be true of it, too
    (positive-aware thresholds of NV-Retriever, Moreira et al. 2024, arXiv 2407.15831, TopK-PercPos,
    on the worse of the two sides).
    """
    cosines = scored.image @ scored.text.T
    own = cosines.diagonal().clip(min=UNSURE)
    made: Floats = np.maximum(cosines, cosines.T) / np.minimum(own[:, None], own[None, :])
    np.fill_diagonal(made, -np.inf)
    return made


def threshold(hardness: Floats, share: float) -> float:
    """The hardness that `share` of all pairs of pairs exceed; read off SAMPLED evenly picked
    rows.
    """
    n = len(hardness)
    rows = hardness[np.unique(np.linspace(0, n - 1, min(n, SAMPLED)).astype(int))]
    known = rows[np.isfinite(rows)]
    return float(np.quantile(known, 1 - share)) if len(known) else np.inf


def too_hard(scored: Scored, share: float, ratio: float | None) -> tuple[Bools, float]:
    """(n, n) pairs of pairs beyond the relative threshold, and that threshold.

    Args:
        share: of all pairs of pairs, blocked from the hardest on: the threshold follows the model.
        ratio: a fixed threshold instead of a share.
    """
    if not share and ratio is None:
        return np.zeros((len(scored.image),) * 2, dtype=bool), np.inf
    hardness = relative_hardness(scored)
    limit = threshold(hardness, share) if ratio is None else ratio
    return hardness > limit, limit
