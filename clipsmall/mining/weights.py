"""How hard two pairs make a batch for one another, and how hard a batch is."""

import math
from collections.abc import Callable

import numpy as np
import torch

from clipsmall.mining.scored import Floats, Ints, Scored


def softmax_weights(scored: Scored, size: int) -> Floats:
    """(n, n) float32, symmetric: what a pair of pairs adds, at least, to the softmax loss of a
    batch of `size` B.

    With Z the logits, w(i,j) = sum over both anchors and both directions of log(1 + (B-1) exp(Z_neg
    - Z_own)). By concavity of the logarithm the batch's loss (mean over rows of both directions'
    sum) is at least the sum of w over its unordered pairs, divided by B (B-1); equality at B = 2
    (Cho et al. 2023, arXiv 2307.05906).
    """
    z = scored.logits + np.float32(math.log(max(size - 1, 1)))
    own = scored.scale * np.einsum("nd,nd->n", scored.image, scored.text) + np.float32(scored.bias)
    # image i's row, text j's column
    return _both_anchors(softplus(z - own[:, None]) + softplus(z - own[None, :]))


def sigmoid_weights(scored: Scored, size: int) -> Floats:
    """(n, n) float32: softplus(Z_ij) + softplus(Z_ji). A batch's sigmoid loss is *exactly* the sum
    of it over the unordered pairs, plus the pairs' own terms, divided by B; whatever the `size`."""
    return _both_anchors(softplus(scored.logits))


def _both_anchors(half: Floats) -> Floats:
    whole = half + half.T
    np.fill_diagonal(whole, 0)
    return whole


def softplus(x: Floats) -> Floats:
    """log(1 + exp(x)); torch's takes a tenth of the time of numpy's logaddexp, which was most of a
    pool's.
    """
    made: Floats = torch.nn.functional.softplus(torch.from_numpy(x)).numpy()
    return made


WEIGHTS: dict[str, Callable[[Scored, int], Floats]] = {
    "softmax": softmax_weights,
    "sigmoid": sigmoid_weights,
}


def batch_losses(scored: Scored, groups: Ints, kind: str = "softmax") -> Floats:
    """(groups,) float64 loss of each group as a batch: softmax, mean of the two directions, or
    sigmoid.
    """
    losses = []
    for members in groups:
        z = (
            scored.scale * (scored.image[members].astype(np.float64) @ scored.text[members].T)
            + scored.bias
        )
        own = z.diagonal()
        if kind == "sigmoid":
            costs = (
                np.logaddexp(0, z).sum() - np.logaddexp(0, own).sum() + np.logaddexp(0, -own).sum()
            )
            losses.append(costs / len(members))
        else:
            forth = np.logaddexp.reduce(z, axis=1)
            back = np.logaddexp.reduce(z, axis=0)
            losses.append(((forth + back) / 2 - own).mean())
    return np.array(losses)
