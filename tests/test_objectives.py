"""Each objective against somebody else's: open_clip's losses, POT's transport, permanents by brute force."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives import OBJECTIVES, sigmoid, sinkhorn, softmax


def embeddings(size: int, noise: float = 1.0, scale: float = 14.3, bias: float = -3.0, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    text = image + noise * torch.randn(size, 12, generator=generator, dtype=torch.float64)
    leaf = {"dtype": torch.float64, "requires_grad": True}
    return Embeddings(
        F.normalize(image, dim=-1).requires_grad_(),
        F.normalize(text, dim=-1).requires_grad_(),
        torch.randperm(size, generator=generator) * 7,
        torch.arange(size) - 2**40,
        torch.tensor(scale, **leaf),  # type: ignore[arg-type]
        torch.tensor(bias, **leaf),  # type: ignore[arg-type]
    )


def gradients(loss: Tensor, e: Embeddings) -> list[Tensor]:
    leaves = [e.image, e.text, e.logit_scale, e.logit_bias]
    return [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]


def scores(e: Embeddings) -> Tensor:
    return e.logit_scale * e.image @ e.text.T


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_parity_with_open_clip(name: str) -> None:
    import open_clip

    e = embeddings(17)
    if name == "softmax":
        theirs = open_clip.loss.ClipLoss()(e.image, e.text, e.logit_scale)
    else:
        theirs = open_clip.loss.SigLipLoss()(e.image, e.text, e.logit_scale, e.logit_bias)
    ours = OBJECTIVES[name](e, e, mask_duplicates=False)["loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for mine, other in zip(gradients(ours, e), gradients(theirs, e), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-15)


def test_sinkhorn_is_pots_entropic_transport() -> None:
    """L = log B-shifted gap between the true pairing's cost and POT's optimum; gradient by POT's own envelope."""
    ot = pytest.importorskip("ot")
    e = embeddings(24, noise=0.7, scale=8.0)
    ours = sinkhorn(e, e, iterations=5_000, tolerance=1e-13)["loss"]
    size, cost = 24, -(e.image @ e.text.T)
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
        return sinkhorn(embeddings(10, scale=scale), embeddings(10, scale=scale), iterations=5_000, tolerance=1e-14)[
            "loss"
        ]

    e = embeddings(10, scale=9.0)
    loss = sinkhorn(e, e, iterations=5_000, tolerance=1e-14)["loss"]
    (analytic,) = torch.autograd.grad(loss, [e.logit_scale])
    numeric = (value(9.0 + 1e-5) - value(9.0 - 1e-5)) / 2e-5
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_sinkhorn_bounds_the_pairing_likelihood_within_a_nat(seed: int) -> None:
    e = embeddings(6, noise=2.0, scale=4.0, seed=seed)
    s = scores(e).detach()
    permanent = sum(math.exp(sum(s[i, p[i]].item() for i in range(6))) for p in itertools.permutations(range(6)))
    exact = (math.log(permanent) - s.diagonal().sum().item()) / 6
    ours = sinkhorn(e, e, iterations=2_000, tolerance=1e-10)["loss"].item()
    assert ours - 1 <= exact + 1e-9 <= ours + 2e-9
    rows, columns = F.cross_entropy(s, torch.arange(6)).item(), F.cross_entropy(s.T, torch.arange(6)).item()
    assert ours <= min(rows, columns) + 1e-6


def test_sinkhorn_stops_at_its_tolerance_and_says_how_far_it_came() -> None:
    e = embeddings(32, noise=1.5)
    rough, fine = sinkhorn(e, e, iterations=3, tolerance=0.0), sinkhorn(e, e, iterations=500, tolerance=1e-4)
    assert rough["iterations"] == 3
    assert fine["row_error"] <= 1e-4 < rough["row_error"]
    assert 3 < fine["iterations"] < 500


def with_duplicates(e: Embeddings, equal: list[tuple[int, int]]) -> Embeddings:
    hashes = e.caption_hash.clone()
    for a, b in equal:
        hashes[b] = hashes[a]
    return e._replace(caption_hash=hashes)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinkhorn"])
def test_a_known_duplicate_is_no_negative(name: str) -> None:
    """No gradient flows between a pair and its duplicate's other half: moving that cosine changes nothing."""
    e = with_duplicates(embeddings(8), [(0, 5)])
    masked, plain = OBJECTIVES[name](e, e), OBJECTIVES[name](e, e, mask_duplicates=False)
    assert masked["loss"] < plain["loss"]
    assert masked["effective_negatives"].item() == pytest.approx(7 - 2 / 8)
    assert plain["effective_negatives"].item() == 7
    repelled = torch.autograd.grad(plain["loss"], [e.text])[0][5] @ e.image[0]
    spared = torch.autograd.grad(masked["loss"], [e.text])[0][5] @ e.image[0]
    assert repelled > spared


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinkhorn"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_batch_of_nothing_but_duplicates_is_finite(name: str, scale: float) -> None:
    e = with_duplicates(embeddings(6, noise=0.0, scale=scale), [(0, i) for i in range(1, 6)])
    loss = OBJECTIVES[name](e, e)["loss"]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, e))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinkhorn"])
def test_float32_at_scale_100_matches_float64(name: str) -> None:
    e = embeddings(64, noise=0.5, scale=100.0)
    low = Embeddings(*(x.detach().float() if x.is_floating_point() else x for x in e))
    torch.testing.assert_close(
        OBJECTIVES[name](low, low)["loss"].double(),
        OBJECTIVES[name](e, e)["loss"].detach(),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinkhorn"])
def test_bf16_autocast_computes_logits_in_float32(name: str) -> None:
    e = Embeddings(*(x.detach().float() if x.is_floating_point() else x for x in embeddings(32, scale=100.0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = OBJECTIVES[name](e, e)["loss"]
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, OBJECTIVES[name](e, e)["loss"], rtol=1e-5, atol=1e-6)


def test_sinkhorn_refuses_columns_that_are_not_the_batch() -> None:
    e, wide = embeddings(4), embeddings(8)
    with pytest.raises(ValueError, match="4 columns"):
        sinkhorn(e, wide)


@pytest.mark.parametrize("bias", [-math.log(255), 0.0])
def test_sigmoid_at_the_start_pulls_like_softmax(bias: float) -> None:
    """At nearly equal logits the bias −log(B − 1) gives softmax's gradient; with none, negatives swamp the pull."""
    e = embeddings(256, noise=30.0, scale=0.1, bias=bias)
    ours, theirs = (torch.autograd.grad(f(e, e)["loss"], [e.image])[0] for f in (sigmoid, softmax))
    ratio: Any = ours.norm() / theirs.norm()
    assert (abs(ratio - 1) < 0.02) == (bias < -5)
