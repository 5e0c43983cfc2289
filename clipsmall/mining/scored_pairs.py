"""Types of mining: scored pairs, quotas of ranks, and arrangements."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipsmall.data.scores import Scores

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class ScoredPairs(NamedTuple):
    """The embeddings of n pairs by one model, and that model's scale and bias."""

    # (n, D), unit length
    image: NDArray[np.float32]
    # (n, D), unit length
    text: NDArray[np.float32]
    # logit scale
    scale: float = 1.0
    # logit bias; used by the sigmoid loss
    bias: float = 0.0

    @property
    def logits(self) -> NDArray[np.float32]:
        """(n, n) logits of image i with text j."""
        cosines = self.image @ self.text.T
        bias = np.float32(self.bias)
        logits: NDArray[np.float32] = self.scale * cosines + bias
        return logits


def select_scored(scores: Scores, places: Ints) -> ScoredPairs:
    """The pairs at these places (n,) of a table of scores."""
    scorer = scores.scorer
    image = scores.image[places].astype(np.float32)
    text = scores.text[places].astype(np.float32)
    return ScoredPairs(image, text, scorer.logit_scale, scorer.logit_bias)


class Quotas(NamedTuple):
    """How many pairs of each of the W ranks every group has.

    Pairs stay on their rank, and all ranks have equally many.
    """

    # (n,) the rank that holds the pair
    owner: Ints
    # (groups, W) pairs of each rank in each group; a row sums to the group's size
    counts: Ints

    @property
    def sizes(self) -> Ints:
        """(groups,) number of pairs in each group."""
        made: Ints = self.counts.sum(axis=1)
        return made


def one_owner(pairs: int, size: int) -> Quotas:
    """The quotas of a single rank: `pairs // size` groups of `size`."""
    owner = np.zeros(pairs, np.int64)
    counts = np.full((pairs // size, 1), size, np.int64)
    return Quotas(owner, counts)


# Maps (pairs, quotas, cannot-link matrix, generator) to (groups, size) distinct places of pairs.
# The cannot-link matrix is (n, n) bool and symmetric.
Arrangement = Callable[[ScoredPairs, Quotas, Bools, np.random.Generator], Ints]
