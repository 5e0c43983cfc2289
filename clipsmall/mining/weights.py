"""Hardness of two pairs in one batch, and of a whole batch, measured by the loss."""

import math
from collections.abc import Callable

import numpy as np
import torch

from clipsmall.mining.scored_pairs import Floats, Ints, ScoredPairs


def softmax_weights(scored: ScoredPairs, size: int) -> Floats:
    """(n, n) float32, symmetric: a lower bound of what two pairs add to their batch's softmax loss.

    With Z the logits and B = `size` the batch, w(i,j) = sum over both anchors and both directions
    of log(1 + (B-1) exp(Z_neg - Z_own)). By concavity of the logarithm the batch's loss (mean over
    rows of both directions' sum) is at least the sum of w over its unordered pairs, divided by
    B (B-1); equality at B = 2 (Cho et al. 2023, arXiv 2307.05906).
    """
    # log of (B-1) exp(Z)
    negatives = max(size - 1, 1)
    z = scored.logits + np.float32(math.log(negatives))

    # (n,) logits of the positives
    own_cosines = np.einsum("nd,nd->n", scored.image, scored.text)
    own = scored.scale * own_cosines + np.float32(scored.bias)

    # row i compares image i with text j; column j compares text j with image i
    from_image = softplus_of_array(z - own[:, None])
    from_text = softplus_of_array(z - own[None, :])
    return _both_anchors(from_image + from_text)


def sigmoid_weights(scored: ScoredPairs, size: int) -> Floats:
    """(n, n) float32, symmetric: softplus(Z_ij) + softplus(Z_ji); independent of `size`.

    A batch's sigmoid loss is *exactly* the sum of these weights over its unordered pairs, plus the
    terms of the positives, divided by B.
    """
    return _both_anchors(softplus_of_array(scored.logits))


def _both_anchors(half: Floats) -> Floats:
    whole = half + half.T
    np.fill_diagonal(whole, 0)
    return whole


def softplus_of_array(x: Floats) -> Floats:
    """log(1 + exp(x)), computed by torch.

    Ten times as fast as numpy's logaddexp, which took most of the time of mining a pool.
    """
    made: Floats = torch.nn.functional.softplus(torch.from_numpy(x)).numpy()
    return made


WEIGHTS: dict[str, Callable[[ScoredPairs, int], Floats]] = {
    "softmax": softmax_weights,
    "sigmoid": sigmoid_weights,
}


def batch_losses(scored: ScoredPairs, groups: Ints, kind: str = "softmax") -> Floats:
    """(groups,) float64 loss of each group, taken as a batch.

    kind: softmax (mean of both directions) or sigmoid.
    """
    losses = []
    for members in groups:
        image = scored.image[members].astype(np.float64)
        text = scored.text[members]
        cosines = image @ text.T
        z = scored.scale * cosines + scored.bias
        own = z.diagonal()
        if kind == "sigmoid":
            # all entries as negatives, minus the diagonal's terms, plus the diagonal as positives
            all_negative = np.logaddexp(0, z).sum()
            own_negative = np.logaddexp(0, own).sum()
            own_positive = np.logaddexp(0, -own).sum()
            losses.append((all_negative - own_negative + own_positive) / len(members))
        else:
            from_image = np.logaddexp.reduce(z, axis=1)
            from_text = np.logaddexp.reduce(z, axis=0)
            losses.append(((from_image + from_text) / 2 - own).mean())

    return np.array(losses)
