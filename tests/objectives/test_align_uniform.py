"""Alignment and uniformity: against its authors' formula."""

import pytest
import torch

from clipsmall.objectives import OBJECTIVES
from tests.objectives.pair_losses import assert_same, call, embeddings


def test_parity_with_the_hypersphere_formula() -> None:
    """Uniformity as its authors compute it: the mean over i < j of pdist."""
    e = embeddings(11)
    spread = [torch.pdist(x).pow(2).mul(-2).exp().mean().log() for x in (e.image, e.text)]
    theirs = (e.image - e.text).norm(dim=1).pow(2).mean() + (spread[0] + spread[1]) / 2
    assert_same(call("align_uniform", e, mask=False)["loss"], theirs, e)


def test_align_uniform_refuses_weights_that_drive_modalities_apart() -> None:
    e = embeddings(4)
    with pytest.raises(ValueError, match="opposite poles"):
        OBJECTIVES["align_uniform"].make(e, e, align=1.0, uniform=1.0, t=2.0, cross=True)
