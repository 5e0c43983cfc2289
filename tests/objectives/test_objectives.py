"""Each pair objective against its dense oracle, and against somebody else's: open_clip, lightly,
metric learning, POT.

Seen to fail when: own pairs are not left out, or equal captions are; a column's log sum is taken
for a row's; the tile's slopes are added to another tile's rows; sinkhorn's value uses the f of
another iteration.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.objectives import OBJECTIVES
from clipsmall.objectives.sinkhorn import sinkhorn
from tests.dense import CASES, logits

PAIRWISE = sorted({name for name, _, _ in CASES})
SETTING = RunContext(width=12, batch_size=17, steps=10)


def embeddings(
    size: int, noise: float = 1.0, scale: float = 14.3, bias: float = -3.0, seed: int = 0
) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    text = image + noise * torch.randn(size, 12, generator=generator, dtype=torch.float64)
    leaf: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    # losses may differ along the length of a feature
    image = image.requires_grad_()
    text = text.requires_grad_()
    return Embeddings(
        F.normalize(image, dim=-1),
        F.normalize(text, dim=-1),
        torch.randperm(size, generator=generator) * 7,
        torch.arange(size) - 2**40,
        torch.tensor(scale, **leaf),
        torch.tensor(bias, **leaf),
        {
            "raw_image": image,
            "raw_text": text,
            "image_target": image.detach()
            + torch.randn(size, 12, generator=generator, dtype=torch.float64),
            "text_target": text.detach()
            + torch.randn(size, 12, generator=generator, dtype=torch.float64),
            "soft_scale": torch.tensor(5.0, **leaf),
        },
    )


def with_duplicates(e: Embeddings, equal: list[tuple[int, int]]) -> Embeddings:
    hashes = e.caption_hash.clone()
    for a, b in equal:
        hashes[b] = hashes[a]
    return e._replace(caption_hash=hashes)


def call(name: str, e: Embeddings, mask: bool = True, **options: Any) -> dict[str, Tensor]:
    make = OBJECTIVES[name].make
    if isinstance(make, type):
        return make(SETTING, mask_duplicates=mask, **options)(e, e)
    return make(e, e, mask, **options)


def gradients(loss: Tensor, e: Embeddings) -> list[Tensor | None]:
    leaves = [
        e.extra["raw_image"],
        e.extra["raw_text"],
        e.logit_scale,
        e.logit_bias,
        e.extra["soft_scale"],
    ]
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True))


def assert_same(ours: Tensor, theirs: Tensor, e: Embeddings, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-13)
    for mine, other in zip(gradients(ours, e), gradients(theirs, e), strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (mine, other))
        assert (a.shape == b.shape) or not (a.any() or b.any())
        if a.shape == b.shape:
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=1e-13 if a.dtype == torch.float64 else 1e-6
            )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(similarity.TILE, "cpu", (5, 7))


# ---- dense oracles
# -----------------------------------------------------------------------------------------------


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
# ---------------------------------------------------------------------------------------------------


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
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_parity_with_open_clip(name: str) -> None:
    import open_clip

    e = embeddings(17)
    if name == "softmax":
        theirs = open_clip.loss.ClipLoss()(e.image, e.text, e.logit_scale)
    else:
        theirs = open_clip.loss.SigLipLoss()(e.image, e.text, e.logit_scale, e.logit_bias)
    assert_same(call(name, e, mask=False)["loss"], theirs, e, rtol=1e-10)


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


def test_parity_with_metric_learning() -> None:
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning import distances, reducers

    e = embeddings(13)
    labels = torch.arange(13)
    theirs = pml.TripletMarginLoss(
        0.2, distance=distances.CosineSimilarity(), reducer=reducers.DoNothingReducer()
    )
    total: Any = 0.0
    for x, y in ((e.image, e.text), (e.text, e.image)):
        total = (
            total + theirs(x, labels, ref_emb=y, ref_labels=labels.clone())["loss"]["losses"].sum()
        )
    assert_same(call("triplet", e, mask=False)["loss"], total / 13, e)
    ntxent = pml.SelfSupervisedLoss(pml.NTXentLoss(1 / 14.3), symmetric=False)
    both = (ntxent(e.image, e.text) + ntxent(e.text, e.image)) / 2
    torch.testing.assert_close(call("softmax", e, mask=False)["loss"], both, rtol=1e-9, atol=1e-9)


def test_parity_with_the_hypersphere_formula() -> None:
    """Uniformity as its authors compute it: the mean over i < j of pdist."""
    e = embeddings(11)
    spread = [torch.pdist(x).pow(2).mul(-2).exp().mean().log() for x in (e.image, e.text)]
    theirs = (e.image - e.text).norm(dim=1).pow(2).mean() + (spread[0] + spread[1]) / 2
    assert_same(call("align_uniform", e, mask=False)["loss"], theirs, e)


def test_spectral_is_the_loss_of_scaled_features() -> None:
    e = embeddings(11)
    mu = 10.0
    x = e.image * math.sqrt(mu)
    y = e.text * math.sqrt(mu)
    inner = x @ y.T
    off = inner[~torch.eye(11, dtype=torch.bool)]
    theirs = (-2 * inner.diagonal().mean() + off.square().mean()) / mu
    assert_same(call("spectral", e, mask=False, mu=mu)["loss"], theirs, e)


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


# ---- what the losses promise
# -------------------------------------------------------------------------------------


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


def test_a_wider_set_of_columns_is_compared_both_ways() -> None:
    """As a queue has it: rows are 5 pairs, columns those and 9 others; each direction by its own
    matrix.
    """
    wide = embeddings(14)
    rows = embeddings(14)._replace(index=wide.index)
    rows = rows._replace(
        image=rows.image[:5],
        text=rows.text[:5],
        index=wide.index[:5],
        caption_hash=rows.caption_hash[:5],
    )
    losses = OBJECTIVES["softmax"].make(rows, wide)
    target = torch.arange(5)
    forth = 14.3 * rows.image @ wide.text.T
    back = 14.3 * rows.text @ wide.image.T
    expected = (F.cross_entropy(forth, target) + F.cross_entropy(back, target)) / 2
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-10, atol=0)
    assert losses["effective_negatives"] == 13


def test_align_uniform_refuses_weights_that_drive_modalities_apart() -> None:
    e = embeddings(4)
    with pytest.raises(ValueError, match="opposite poles"):
        OBJECTIVES["align_uniform"].make(e, e, align=1.0, uniform=1.0, t=2.0, cross=True)


def test_dcl_refuses_a_batch_of_one() -> None:
    e = embeddings(1)
    with pytest.raises(ValueError, match="at least 2"):
        OBJECTIVES["dcl"].make(e, e)


def test_the_hardest_of_no_negatives_costs_nothing() -> None:
    e = with_duplicates(embeddings(6), [(0, i) for i in range(1, 6)])
    assert call("vse++", e, margin=1.9, warmup=0.0)["loss"] == 0


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


def test_vse_warms_up_and_then_takes_the_hardest() -> None:
    e = embeddings(9)
    made = OBJECTIVES["vse++"].make(SETTING, warmup=0.2)
    values = [made(e, e)["loss"].item() for _ in range(4)]
    assert values[0] == values[1] == call("triplet", e)["loss"].item()
    assert values[2] == values[3] == call("vse++", e, warmup=0.0)["loss"].item() < values[0]
    other = OBJECTIVES["vse++"].make(SETTING, warmup=0.2)
    other.load_state_dict(made.state_dict())
    assert other(e, e)["loss"].item() == values[3]
