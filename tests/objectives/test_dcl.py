"""DCL and DCLW against lightly."""

import pytest
import torch

from clipsmall.objectives import OBJECTIVES
from tests.objectives.pair_losses import call, embeddings, gradients


def test_parity_with_lightly() -> None:
    """Their losses compare within the modalities, too, and take the temperature."""
    loss = pytest.importorskip("lightly.loss")
    e = embeddings(17)
    t = 1 / 14.3
    for name, theirs in (
        ("softmax", loss.NTXentLoss(temperature=t)),
        ("dcl", loss.DCLLoss(temperature=t)),
        ("dclw", loss.DCLWLoss(temperature=t, sigma=0.5)),
    ):
        ours = call(name, e, mask=False, intra_modal=True)["loss"]
        other = theirs(e.image, e.text)
        torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-9, msg=name)
        for mine, his in zip(gradients(ours, e)[:2], gradients(other, e)[:2], strict=True):
            torch.testing.assert_close(mine, his, rtol=1e-6, atol=1e-8, msg=name)


def test_dcl_refuses_a_batch_of_one() -> None:
    e = embeddings(1)
    with pytest.raises(ValueError, match="at least 2"):
        OBJECTIVES["dcl"].make(e, e)
