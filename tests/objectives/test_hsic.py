"""SSL-HSIC against the dense formula, and its digits.

Seen to fail when: row weights, mean or squares are of one rank.
"""

import pytest
import torch
import torch.nn.functional as F

from clipsmall.objectives.hsic import hsic
from tests.objectives.outputs_of_heads import assert_same, embeddings


@pytest.mark.parametrize(("gamma", "width"), [(3.0, 1.0), (0.3, 0.5)])
def test_hsic_is_the_dense_formula(gamma: float, width: float) -> None:
    e = embeddings(11)
    z = torch.cat([e.image, e.text])
    k = width / (width**2 + 2 - 2 * z @ z.T).sqrt()
    h = torch.eye(22, dtype=torch.float64) - 1 / 22
    # Y: the same pair or not
    pairs = torch.eye(11, dtype=torch.float64).repeat(2, 2)
    of_pair = (k * (pairs - torch.eye(22))).sum() / 22 - k.mean()
    theirs = -of_pair + gamma * ((h @ k @ h).square().mean() + 1e-10).sqrt()
    ours = hsic(e, e, gamma, width)
    assert_same(ours["loss"], theirs, e)
    torch.testing.assert_close(ours["dependence"], of_pair.detach())


def test_hsic_keeps_its_digits_in_float32_when_embeddings_are_alike() -> None:
    e = embeddings(64)
    near = e._replace(
        **{n: F.normalize(1 + 0.05 * getattr(e, n).detach(), dim=1) for n in ("image", "text")}
    )
    low = near._replace(image=near.image.float(), text=near.text.float())
    torch.testing.assert_close(
        hsic(low, low)["redundancy"].double(), hsic(near, near)["redundancy"], rtol=3e-3, atol=0
    )


def test_hsic_takes_cosines_that_rounding_made_greater_than_one() -> None:
    e = embeddings(64)
    low = e._replace(
        image=e.image.detach().to(torch.bfloat16), text=e.image.detach().to(torch.bfloat16)
    )
    assert (low.image.float().norm(dim=1) > 1.001).any()
    assert torch.isfinite(hsic(low, low, width=0.02)["loss"])


def test_hsic_refuses_columns_that_are_not_the_batch() -> None:
    with pytest.raises(ValueError, match="not 5 pairs"):
        hsic(embeddings(4), embeddings(5))
