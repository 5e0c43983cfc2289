"""The synthetic study: the paper's ranking of selections, closed forms, the other losses, and the
command's files.

Seen to fail when: a loss forgets a direction, its own pair, or the size of the batch; the vectors
are not made unit length; SGD climbs; osgd takes the mildest batch, or one decided before the
update; sc_even clusters once for all; f deals again, or s does not; a mean stands for all batches
that is one of some; updates or pairs are counted for others; the simplex has a cosine of −1/N, the
polytope's opposites lie elsewhere; rows are not sorted; selections share a generator, or start from
different numbers; NaN is written for what is not known; a wrong option is found too late.
"""

import json
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from clipsmall.synthetic import free_embeddings
from clipsmall.synthetic.__main__ import main
from clipsmall.synthetic.free_embeddings import (
    LOSSES,
    SELECTIONS,
    FreeEmbeddings,
    choose_batches,
    cross_polytope,
    known_optimum,
    optimum_distances,
    simplex,
    train_free_embeddings,
)

Rows = list[dict[str, float]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def begun(pairs: int = 8, width: int = 16, seed: int = 0, **options: float | str) -> FreeEmbeddings:
    return FreeEmbeddings(
        *np.random.default_rng(seed).standard_normal((2, pairs, width)), **options
    )  # type: ignore[arg-type]


def curve(
    free: FreeEmbeddings, selection: str, size: int = 2, steps: int = 300, seed: int = 0
) -> Rows:
    generator = np.random.default_rng([seed, 1])
    return list(train_free_embeddings(free, selection, size, steps, generator))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("selection", "low", "high", "loss"),
    [
        ("osgd_NcB", 0, 0.2, 2.350),
        ("sc_even", 0, 0.3, 2.350),
        ("s", 0.8, 2.2, 2.45),
        ("f", 2.5, 3.6, 2.6),
    ],
)
def test_the_hardest_batches_find_the_simplex(
    selection: str, low: float, high: float, loss: float
) -> None:
    """As in Cho et al.'s figure, 8 pairs in 16 dimensions: SGD is slow, fixed batches never get
    there.
    """
    rows = curve(begun(), selection)
    assert low < rows[-1]["row_distance"] < high
    assert 2.3464 < rows[-1]["full_loss"] < loss
    assert rows[0]["row_distance"] > 2


@pytest.mark.parametrize("selection", SELECTIONS)
def test_batches_of_four_work_too(selection: str) -> None:
    rows = curve(begun(), selection, size=4, steps=100)
    assert rows[-1]["full_loss"] < rows[0]["full_loss"] - 0.5
    one = selection in ("full", "NcB")
    assert rows[-1]["updates"] == (100 if one else 200)
    assert rows[-1]["pairs"] == 100 * {"NcB": 70 * 4}.get(selection, 8)


@pytest.mark.parametrize(("width", "loss"), [(16, 2.34642), (7, 2.34642), (4, 2.41351)])
def test_closed_forms_are_minima(width: int, loss: float) -> None:
    """Stationary, and where gradient descent ends that starts nearby."""
    points = known_optimum(8, width)
    assert points is not None
    assert points.shape == (8, width)
    assert torch.allclose(points.norm(dim=1), torch.ones(8, dtype=torch.float64))
    best = FreeEmbeddings(points.numpy(), points.numpy(), lr=2)
    assert best.full_loss() == pytest.approx(loss, abs=5e-6)
    before = best.free.detach().clone()
    best.update(np.arange(8)[None])
    assert torch.allclose(best.free, before, atol=1e-12)
    near = points.numpy() + np.random.default_rng(0).standard_normal((2, 8, width)) * 0.1
    free = FreeEmbeddings(*near, lr=2)
    assert free.full_loss() > loss + 1e-3
    end = curve(free, "full", steps=1500)[-1]
    assert end["full_loss"] == pytest.approx(loss, abs=2e-4)
    assert end["full_loss"] > best.full_loss() - 1e-9
    assert end["row_distance"] < 0.06


def test_the_optimum_of_all_batches_is_the_full_loss_s() -> None:
    """Theorem 4: the simplex is stationary for the mean over all pairs, and not for a part of them
    (theorem 5).
    """
    points = simplex(8, 16).numpy()
    every = np.array(list(combinations(range(8), 2)))
    for batches, stays in ((every, True), (every[:10], False)):
        free = FreeEmbeddings(points, points)
        if stays:
            assert float(free.losses(batches).mean().detach()) == pytest.approx(0.55361, abs=5e-6)
        free.update(batches)
        assert torch.allclose(free.free[0], torch.from_numpy(points), atol=1e-12) == stays


def test_distances() -> None:
    wanted = simplex(4, 3) @ simplex(4, 3).T
    assert torch.allclose(wanted, torch.full((4, 4), -1 / 3).fill_diagonal_(1).double())
    assert optimum_distances(wanted, simplex(4, 3)) == pytest.approx(
        {"row_distance": 0, "distance": 0, "diagonal": 1}, abs=1e-9
    )
    # every image has its neighbour's text
    moved = optimum_distances(wanted.roll(1, 0), simplex(4, 3))
    assert moved["row_distance"] == pytest.approx(0, abs=1e-9)
    assert moved["distance"] == pytest.approx(np.sqrt(8) * 4 / 3)
    assert moved["diagonal"] == pytest.approx(-1 / 3)
    polytope = cross_polytope(3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found = optimum_distances(polytope[order] @ polytope[order].T, polytope)
    assert found == pytest.approx({"row_distance": 0, "distance": None, "diagonal": 1})
    assert optimum_distances(torch.eye(5), known_optimum(5, 3)) == {
        "row_distance": None,
        "distance": None,
        "diagonal": 1,
    }


def test_losses_are_those_of_a_plain_loop() -> None:
    free = begun(5, 3, scale=2.0, bias=-0.5, loss="sigmoid")
    logits = free.cosines().detach().numpy() * 2 - 0.5
    costs = np.log1p(np.exp(np.where(np.eye(5), -logits, logits)))
    assert free.full_loss() == pytest.approx(costs.sum() / 5)
    free = begun(5, 3, scale=2.0)
    z = np.exp(free.cosines().detach().numpy() * 2)
    both = -np.log(z.diagonal() / z.sum(0)) - np.log(z.diagonal() / z.sum(1))
    assert free.full_loss() == pytest.approx(both.mean())
    part = np.array([[3, 1], [0, 4]])
    # all batches at once are batches one by one
    for loss in LOSSES:
        free = begun(5, 3, loss=loss)
        alone = [begun(2, 3, loss=loss) for _ in part]
        for one, rows in zip(alone, part, strict=True):
            one.free = free.free[:, rows]
        assert free.losses(part).tolist() == pytest.approx([one.full_loss() for one in alone])


def test_sinkhorn_is_the_likelihood_of_a_plan_with_equal_margins() -> None:
    """And its envelope gradient that of finite differences."""
    free = begun(4, 3, loss="sinkhorn", scale=2.0)
    plan = torch.exp(2 * free.cosines().detach())
    for _ in range(200):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    assert free.full_loss() == pytest.approx(-float(plan.diagonal().log().mean()), abs=1e-6)
    (slope,) = torch.autograd.grad(free.losses(np.arange(4)[None]).sum(), free.free)
    step = (
        torch.randn(
            free.free.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        * 1e-4
    )
    ends = []
    for sign in (1, -1):
        moved = begun(4, 3, loss="sinkhorn", scale=2.0)
        moved.free = free.free.detach() + sign * step
        ends.append(moved.full_loss())
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float((slope * step).sum()), rel=1e-3)


@pytest.mark.parametrize("loss", ["sigmoid", "sinkhorn"])
def test_other_losses_descend_and_hard_batches_lead(loss: str) -> None:
    found = {
        name: curve(begun(loss=loss), name, steps=100) for name in ("s", "osgd_NcB", "sc_even")
    }
    assert found["s"][-1]["full_loss"] < 0.8 * found["s"][0]["full_loss"]
    for name in ("osgd_NcB", "sc_even"):
        assert found[name][-1]["row_distance"] < 0.8 * found["s"][-1]["row_distance"], name


def test_a_small_batch_of_sigmoid_wants_something_else_than_a_full_one() -> None:
    """A pair weighs its one true partner against one false, or against seven: theorem 4 is
    softmax's.
    """
    near = simplex(8, 16).numpy() + np.random.default_rng(0).standard_normal((2, 8, 16)) * 0.1
    full, pairs = (
        curve(FreeEmbeddings(*near, "sigmoid", lr=2), name)[-1] for name in ("full", "NcB")
    )
    assert full["distance"] > 0.5
    assert full["diagonal"] < 0.9
    assert pairs["distance"] < 0.1


def updates_needed(selection: str, seed: int) -> float:
    """Four pairs u = v at (±cos θ, ±sin θ), from θ = 0.1 to 0.1 before the square, θ = π/4. There
    all rows have cosines 1, c, −c, −1 with c = cos 2θ, and are at a distance of √8 c from the
    square's."""
    start = np.array([[np.cos(0.1), y] for y in (np.sin(0.1), -np.sin(0.1))])
    start = np.concatenate([start, -start])
    rows = train_free_embeddings(
        FreeEmbeddings(start, start, lr=0.05), selection, 2, 5000, np.random.default_rng(seed)
    )
    near = np.sqrt(8) * np.cos(2 * (np.pi / 4 - 0.1))
    return next(float(row["updates"] or 0) for row in rows if (row["row_distance"] or 0) < near)


def test_osgd_is_three_and_a_half_times_as_fast_as_sgd_on_a_square() -> None:
    """Of six batches two push θ, with 1 / (1 + e^(1 − cos 2θ)), and two pull it back: towards θ = 0
    the ratio is 3 (e² + 1) / (e² − 1) = 3.94, more from here."""
    sgd = np.mean([updates_needed("s", seed) for seed in range(4)])
    assert sgd > 3.5 * updates_needed("osgd_NcB", 0)


def test_what_is_chosen() -> None:
    def first(
        selection: str, updates: int, free: FreeEmbeddings | None = None
    ) -> list[list[list[int]]]:
        batches = choose_batches(free or begun(6, 4), selection, 2, np.random.default_rng(0))
        return [batch.tolist() for batch in islice(batches, updates)]

    fixed = first("f", 9)
    fresh = first("s", 9)
    assert fixed[:3] == fixed[3:6] == fixed[6:]
    assert fixed[:3] == fresh[:3]
    assert fresh[:3] != fresh[3:6] != fresh[6:]
    for part in (fresh[:3], fresh[3:6], first("sc_even", 3)):
        assert sorted(np.ravel(part)) == list(range(6))
    assert first("full", 2) == [[[0, 1, 2, 3, 4, 5]]] * 2
    assert first("NcB", 1)[0] == [list(pair) for pair in combinations(range(6), 2)]

    free = begun(6, 4)
    batches = choose_batches(free, "osgd_NcB", 2, np.random.default_rng(0))
    # decided after the last update
    for _ in range(20):
        losses = {pair: free.losses(np.array([pair])).item() for pair in combinations(range(6), 2)}
        picked = next(batches)
        assert tuple(picked[0]) == max(losses, key=lambda pair: losses[pair])
        assert torch.is_grad_enabled()
        free.update(picked)


def test_clusters_are_made_again_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    spectral = free_embeddings.spectral_groups

    def seen(*arguments: object) -> object:
        weights.append(arguments[-1])
        return spectral(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(free_embeddings, "spectral_groups", seen)
    curve(begun(6, 4), "sc_even", steps=4)
    assert len(weights) == 4
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    free = begun(6, 4, loss="sigmoid", scale=5.0, bias=-2.0)
    free.clusters(2, np.random.default_rng(0))
    z = free.cosines().detach().numpy() * 5 - 2
    assert weights[-1][0, 1] == pytest.approx(
        np.log1p(np.exp(z[0, 1])) + np.log1p(np.exp(z[1, 0])), rel=1e-4
    )


def command(out: Path, *more: str) -> pd.DataFrame:
    assert (
        main(["--pairs", "6", "--steps", "10", "--seeds", "3", "5", "--out", str(out), *more]) == 0
    )
    return pd.read_csv(out / "curves.csv")


def test_the_command_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = command(tmp_path / "made" / "out")
    assert list(curves) == [
        "selection",
        "seed",
        "step",
        "updates",
        "pairs",
        "row_distance",
        "distance",
        "diagonal",
        "full_loss",
    ]
    assert len(curves) == len(SELECTIONS) * 2 * 11
    assert not curves.isna().any(axis=None)
    starts = curves[curves.step == 0].groupby("seed").full_loss
    assert (starts.nunique() == 1).all(), "all selections start alike"
    assert starts.first().nunique() == 2
    found = json.loads((tmp_path / "made/out/summary.json").read_text())
    assert found["loss_at_target"] == pytest.approx(2 * np.log1p(5 * np.exp(-6 / 5)))
    last = curves[(curves.step == 10) & (curves.selection == "s")].full_loss
    assert found["final"]["s"]["full_loss"] == pytest.approx(
        {"mean": last.mean(), "std": last.std()}
    )
    maps = load_file(tmp_path / "made/out/heatmaps.safetensors")
    assert set(maps) == {f"{name}_{seed}" for name in SELECTIONS for seed in (3, 5)}
    last = curves[(curves.step == 10) & (curves.selection == "f") & (curves.seed == 5)]
    assert maps["f_5"].diagonal().mean() == pytest.approx(last.diagonal.item())
    assert (tmp_path / "made/out/curves.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert "osgd_NcB" in printed.out
    assert str(tmp_path / "made/out") in printed.err


def test_a_seed_gives_one_curve_whatever_else_runs(tmp_path: Path) -> None:
    curves = command(tmp_path / "all")
    alone = command(tmp_path / "one", "--selections", "sc_even", "s")
    for name in ("sc_even", "s"):
        assert (
            alone[alone.selection == name]
            .reset_index(drop=True)
            .equals(curves[curves.selection == name].reset_index(drop=True))
        )


def test_without_a_known_optimum_there_is_no_distance(tmp_path: Path) -> None:
    curves = command(tmp_path, "--width", "4", "--selections", "s", "--seeds", "3")
    assert curves.row_distance.isna().all()
    assert curves.distance.isna().all()
    assert not curves.diagonal.isna().any()
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["loss_at_target"] is None
    curves = command(tmp_path, "--width", "3", "--selections", "s")
    assert not curves.row_distance.isna().any()
    assert curves.distance.isna().all(), "a cross-polytope's corners have opposites"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "4"], "divide the 6"),
        (["--batch_size", "1"], "2 or more"),
        (["--pairs", "30", "--batch_size", "10"], "30,045,015"),
        (["--width", "0"], "--width 0"),
        (["--steps", "0"], "--steps 0"),
        (["--lr", "-1"], "--lr -1"),
        (["--lr", "nan"], "--lr nan"),
        (["--scale", "inf"], "--scale inf"),
        (["--bias", "nan"], "--bias nan"),
        (["--seeds", "1", "1"], "--seeds 1 1"),
        (["--seeds", "-1"], "--seeds -1"),
        (["--out", __file__], "is a file"),
        (["--out", f"{__file__}/deeper"], "Not a directory"),
        (["--selections", "sgd"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--pairs", "6", "--out", str(tmp_path / "out"), *words])
    assert left.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "out").exists()


def test_many_pairs_run_without_looking_at_all_batches(tmp_path: Path) -> None:
    words = [
        "--pairs",
        "30",
        "--batch_size",
        "10",
        "--selections",
        "f",
        "s",
        "full",
        "sc_even",
        "--steps",
        "2",
    ]
    assert main([*words, "--seeds", "0", "--out", str(tmp_path)]) == 0
