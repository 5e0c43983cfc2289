"""Sinkhorn: against POT's entropic transport, and what its plan promises.

Seen to fail when: the value uses the f of another iteration.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.distributed import world
from clipsmall.objectives import OBJECTIVES
from clipsmall.objectives.sinkhorn import sinkhorn
from tests.dense import logits
from tests.objectives.pair_losses import assert_same, embeddings


def test_sinkhorn_is_pots_entropic_transport() -> None:
    """L = log B-shifted gap between the true pairing's cost and POT's optimum; gradient by POT's
    own envelope.
    """
    ot = pytest.importorskip("ot")
    e = embeddings(24, noise=0.7, scale=8.0)
    ours = sinkhorn(e, e, iterations=5_000, tolerance=1e-13)["loss"]
    size = 24
    cost = -(e.image @ e.text.T)
    weights = torch.full((size,), 1 / size, dtype=torch.float64)
    solution = ot.solve(
        cost,
        weights,
        weights,
        reg=1 / e.logit_scale.item(),
        reg_type="entropy",
        grad="envelope",
        tol=1e-13,
        max_iter=100_000,
    )
    theirs = e.logit_scale.detach() * (cost.diagonal().mean() - solution.value) - math.log(size)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    for mine, other in zip(
        torch.autograd.grad(ours, [e.image, e.text], retain_graph=True),
        torch.autograd.grad(theirs, [e.image, e.text]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_sinkhorn_scale_gradient_is_that_of_its_value() -> None:
    """The envelope theorem, checked by finite differences of the converged value."""

    def value(scale: float) -> Tensor:
        e = embeddings(10, scale=scale)
        return sinkhorn(e, e, iterations=5_000, tolerance=1e-14)["loss"]

    e = embeddings(10, scale=9.0)
    loss = sinkhorn(e, e, iterations=5_000, tolerance=1e-14)["loss"]
    (analytic,) = torch.autograd.grad(loss, [e.logit_scale])
    numeric = (value(9.0 + 1e-5) - value(9.0 - 1e-5)) / 2e-5
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_sinkhorn_bounds_the_pairing_likelihood_within_a_nat(seed: int) -> None:
    e = embeddings(6, noise=2.0, scale=4.0, seed=seed)
    s = logits(e).detach()
    permanent = sum(
        math.exp(sum(s[i, p[i]].item() for i in range(6))) for p in itertools.permutations(range(6))
    )
    exact = (math.log(permanent) - s.diagonal().sum().item()) / 6
    ours = sinkhorn(e, e, iterations=2_000, tolerance=1e-10)["loss"].item()
    assert ours - 1 <= exact + 1e-9 <= ours + 2e-9
    rows = F.cross_entropy(s, torch.arange(6)).item()
    columns = F.cross_entropy(s.T, torch.arange(6)).item()
    assert ours <= min(rows, columns) + 1e-6


def test_half_an_iteration_of_sinkhorn_is_one_direction_of_softmax() -> None:
    e = embeddings(16)
    assert_same(
        sinkhorn(e, e, iterations=0)["loss"], F.cross_entropy(logits(e), torch.arange(16)), e
    )


def test_unrolled_sinkhorn_becomes_the_envelope_as_it_converges() -> None:
    e = embeddings(12, noise=3.0, scale=3.0)
    ours = sinkhorn(e, e, iterations=40, tolerance=0.0, unrolled=True)["loss"]
    assert_same(ours, sinkhorn(e, e, iterations=40, tolerance=0.0)["loss"], e, rtol=1e-7)


def test_sinkhorn_stops_at_its_tolerance_and_says_how_far_it_came() -> None:
    e = embeddings(32, noise=1.5)
    rough = sinkhorn(e, e, iterations=3, tolerance=0.0)
    fine = sinkhorn(e, e, iterations=500, tolerance=1e-4)
    assert rough["iterations"] == 3
    assert fine["row_error"] <= 1e-4 < rough["row_error"]
    assert 3 < fine["iterations"] < 500


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_targets"])
def test_plans_refuse_columns_that_are_not_the_batch(name: str) -> None:
    e = embeddings(4)
    wide = embeddings(8)
    with pytest.raises(ValueError, match="columns"):
        OBJECTIVES[name].make(e, wide)


def uneven_plan() -> tuple[float, float]:
    """The last rank's pairs are far harder than the others': alone it would iterate longer."""
    e = embeddings(32, noise=0.05, scale=15.0)
    hard = embeddings(32, noise=1.0, scale=15.0)
    late = torch.arange(32)[:, None] >= 24
    e = e._replace(
        image=torch.where(late, hard.image, e.image), text=torch.where(late, hard.text, e.text)
    )
    mine = slice(world.rank() * 32 // world.size(), (world.rank() + 1) * 32 // world.size())
    rows = e._replace(
        **{name: getattr(e, name)[mine] for name in ("image", "text", "index", "caption_hash")}
    )
    found = sinkhorn(rows, e, iterations=500, tolerance=1e-3)
    return found["iterations"].item(), found["row_error"].item()


def test_all_ranks_stop_sinkhorn_together(ranks: Any) -> None:
    expected = uneven_plan()
    assert 1 < expected[0] < 500
    for found in ranks(4, uneven_plan):
        assert found == pytest.approx(expected, rel=1e-9)
