"""Spectral: it is the paper's loss of scaled features."""

import math

import torch

from tests.objectives.pair_losses import assert_same, call, embeddings


def test_spectral_is_the_loss_of_scaled_features() -> None:
    e = embeddings(11)
    mu = 10.0
    x = e.image * math.sqrt(mu)
    y = e.text * math.sqrt(mu)
    inner = x @ y.T
    off = inner[~torch.eye(11, dtype=torch.bool)]
    theirs = (-2 * inner.diagonal().mean() + off.square().mean()) / mu
    assert_same(call("spectral", e, mask=False, mu=mu)["loss"], theirs, e)
