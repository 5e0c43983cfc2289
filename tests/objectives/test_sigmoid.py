"""Sigmoid: where its bias starts."""

import math
from typing import Any

import pytest
import torch

from tests.objectives.pair_losses import call, embeddings


@pytest.mark.parametrize("bias", [-math.log(255), 0.0])
def test_sigmoid_at_the_start_pulls_like_softmax(bias: float) -> None:
    """At nearly equal logits the bias −log(B − 1) gives softmax's gradient; with none, negatives
    swamp the pull.
    """
    e = embeddings(256, noise=30.0, scale=0.1, bias=bias)
    ours, theirs = (
        torch.autograd.grad(call(name, e)["loss"], [e.image])[0] for name in ("sigmoid", "softmax")
    )
    ratio: Any = ours.norm() / theirs.norm()
    assert (abs(ratio - 1) < 0.02) == (bias < -5)
