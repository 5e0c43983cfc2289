"""Barlow Twins and VICReg against lightly.

Seen to fail when: a matrix or its backward stays on its rank.
"""

from typing import Any

import pytest
import torch

from clipsmall.objectives.barlow import barlow
from clipsmall.objectives.vicreg import vicreg
from tests.objectives.outputs_of_heads import assert_same, embeddings


@pytest.mark.parametrize("size", [5, 40])
def test_barlow_and_vicreg_are_lightlys(size: int) -> None:
    lightly = pytest.importorskip("lightly.loss")
    e = embeddings(size)
    x = e.extra["image_projected"]
    y = e.extra["text_projected"]
    assert_same(barlow(e, e)["loss"], lightly.BarlowTwinsLoss()(x, y), e)
    assert_same(barlow(e, e, redundancy=0.1)["loss"], lightly.BarlowTwinsLoss(0.1)(x, y), e)
    assert_same(vicreg(e, e)["loss"], lightly.VICRegLoss()(x, y), e)
    theirs = lightly.VICRegLoss(lambda_param=3, mu_param=2, nu_param=0.5)(x, y)
    assert_same(vicreg(e, e, invariance=3, variance=2, covariance=0.5)["loss"], theirs, e)


@pytest.mark.parametrize("objective", [barlow, vicreg])
def test_terms_add_up_to_the_loss(objective: Any) -> None:
    terms = objective(embeddings(8), embeddings(8))
    loss = terms.pop("loss")
    torch.testing.assert_close(sum(terms.values()), loss.detach())


@pytest.mark.parametrize("objective", [barlow, vicreg])
def test_one_pair_is_refused(objective: Any) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        objective(embeddings(1), embeddings(1))
