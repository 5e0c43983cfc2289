"""Every pair loss: against its dense oracle, in small and strange batches, in low precision.

A new objective is tested here as soon as `tests/dense.py` names it. Comparisons with other
libraries (lightly, pytorch-metric-learning, POT) are in the files of the single objectives.

Seen to fail when: own pairs are not left out, or equal captions are; a column's log sum is taken
for a row's; the tile's slopes are added to another tile's rows.
"""

import pytest
import torch

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity
from tests.dense import CASES
from tests.objectives.pair_losses import assert_same, call, embeddings, gradients, with_duplicates

PAIRWISE = sorted({name for name, _, _ in CASES})


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(similarity.TILE, "cpu", (5, 7))


# ---- dense oracles


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_streamed_is_dense(case: int, mask: bool) -> None:
    """In tiles of 5×7, with captions that repeat across tiles: value and every gradient."""
    name, oracle, options = CASES[case]
    e = with_duplicates(embeddings(17), [(0, 16), (0, 3), (8, 9)])
    assert_same(call(name, e, mask, **options)["loss"], oracle(e, mask, **options), e)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("size", [2, 3])
def test_the_smallest_batches(name: str, size: int) -> None:
    e = embeddings(size)
    losses = call(name, e)
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert all(g is None or torch.isfinite(g).all() for g in gradients(losses["loss"], e))


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_batch_of_nothing_but_duplicates_is_finite(name: str, scale: float) -> None:
    e = with_duplicates(embeddings(6, noise=0.0, scale=scale), [(0, i) for i in range(1, 6)])
    for options in [{}, *[{"intra_modal": True}] * (name in ("softmax", "dcl", "dclw"))]:
        loss = call(name, e, **options)["loss"]
        assert torch.isfinite(loss)
        assert all(g is None or torch.isfinite(g).all() for g in gradients(loss, e))


@pytest.mark.parametrize(
    "name", sorted(set(PAIRWISE) - {"sinkhorn_targets", "align_uniform", "spectral"})
)
def test_a_known_duplicate_is_no_negative(name: str) -> None:
    """Image 0 pushes text 5, which has its caption, less far away."""
    e = with_duplicates(embeddings(8, noise=3.0), [(0, 5)])
    options = {"triplet": {"margin": 1.0}, "vse++": {"margin": 1.0, "warmup": 1.0}}.get(name, {})
    masked = call(name, e, True, **options)
    plain = call(name, e, False, **options)
    assert masked["effective_negatives"].item() == pytest.approx(7 - 2 / 8)
    assert plain["effective_negatives"].item() == 7
    repelled = torch.autograd.grad(plain["loss"], [e.text])[0][5] @ e.image[0]
    spared = torch.autograd.grad(masked["loss"], [e.text])[0][5] @ e.image[0]
    assert repelled > spared


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_broken_row_is_not_hidden(name: str) -> None:
    """NaN in one feature gives a loss that is not finite, which stops training with a message
    (optim.check_finite).
    """
    e = embeddings(6)
    with torch.no_grad():
        e.image[2, 0] = torch.nan
    assert not torch.isfinite(call(name, e)["loss"])


# ---- precision


def lower(e: Embeddings, dtype: torch.dtype) -> Embeddings:
    features = {"image": e.image.detach().to(dtype), "text": e.text.detach().to(dtype)}
    rest = e._replace(
        logit_scale=e.logit_scale.detach().float(),
        logit_bias=e.logit_bias.detach().float(),
        extra={name: x.detach().float() for name, x in e.extra.items()},
    )
    return rest._replace(**features)


@pytest.mark.parametrize("name", PAIRWISE)
def test_float32_at_scale_100_matches_float64(name: str) -> None:
    e = embeddings(64, noise=0.5, scale=100.0)
    low = call(name, lower(e, torch.float32))["loss"]
    high = call(name, e)["loss"].detach()
    torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_and_autocast_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    half = lower(embeddings(32, scale=100.0), dtype)
    upcast = half._replace(image=half.image.float(), text=half.text.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(name, half)["loss"]
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, call(name, upcast)["loss"], rtol=1e-5, atol=1e-5)


# ---- somebody else's


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_parity_with_open_clip(name: str) -> None:
    import open_clip

    e = embeddings(17)
    if name == "softmax":
        theirs = open_clip.loss.ClipLoss()(e.image, e.text, e.logit_scale)
    else:
        theirs = open_clip.loss.SigLipLoss()(e.image, e.text, e.logit_scale, e.logit_bias)
    assert_same(call(name, e, mask=False)["loss"], theirs, e, rtol=1e-10)


# ---- what the losses promise
