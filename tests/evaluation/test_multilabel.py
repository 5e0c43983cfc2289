"""Tests of multi-label sets against scikit-learn, CLIP_benchmark's own loop and the definition, on
several ranks.

Seen to fail when: targets are taken in the tar's order; pickles, NaN, other shapes, long members
pass; a promise of terabytes ends the run; ties are taken in the order of a sort; a class scores by
another's column; classes without an image count as 0, or in the chance; broken images keep their
targets; the kind of a set is no part of a key; DataComp's line wants acc1; tasks that need one
class an image are not refused.
"""

import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from clipsmall.data import open_catalog
from clipsmall.evaluation import multilabel, suite
from clipsmall.evaluation.sets import open_set
from clipsmall.evaluation.suite import NamedModel, option_values
from clipsmall.evaluation.tasks import TASKS
from clipsmall.evaluation.top_k import scores
from clipsmall.evaluation.view import DataView
from tests.evaluation.test_evaluation import BROKEN, COLOURS, picture, small_encoder, unit_rows
from tests.evaluation.test_suite import cells, load, run, write_model
from tests.shard_samples import write_tar

NAMES = COLOURS[:5]
# of 20 images; each class has some
SHOWN = np.random.default_rng(3).integers(0, 2, (20, 5))


def npy(array: Any, **options: Any) -> bytes:
    out = BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def write_voc(
    folder: Path, targets: dict[int, bytes] | None = None, broken: tuple[int, ...] = ()
) -> Path:
    """CLIP_benchmark's layout, nothing indexed: 20 images in two tars, webdataset's order of
    members.
    """
    for number in range(2):
        members: list[tuple[str, bytes]] = []
        for i in range(10 * number, 10 * number + 10):
            told = (targets or {}).get(
                i, npy(SHOWN[i].astype([np.int64, np.float32, np.bool_][i % 3]))
            )
            members += [(f"s{i:07d}.npy", told)] if told else []
            members += [(f"s{i:07d}.png", BROKEN if i in broken else picture(i))]
        write_tar(folder / "test" / f"{number}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a picture {c}\n{c}\n")
    (folder / "dataset_type.txt").write_text("multilabel\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


# ---- average precision ----


def by_definition(values: list[float], truth: list[bool]) -> float:
    """The sum over distinct scores, from the highest down, of precision times the recall that is
    gained there.
    """
    total = gained = 0.0
    for score in sorted(set(values), reverse=True):
        taken = [true for value, true in zip(values, truth, strict=True) if value >= score]
        total += sum(taken) / len(taken) * (sum(taken) / sum(truth) - gained)
        gained = sum(taken) / sum(truth)
    return total


def clip_benchmarks(values: Tensor, truth: Tensor) -> float:
    """Its loop, of one class: precision at each positive, in the order of a sort."""
    sorted_truth = truth[values.argsort(descending=True)].double()
    precision = sorted_truth.cumsum(0) / torch.arange(1, len(values) + 1)
    return float((precision * sorted_truth).sum() / max(float(truth.sum()), 1))


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multilabel, "chunk_rows", lambda columns: 3)
    images = unit_rows(60, 8, seed=1)
    classes = unit_rows(7, 8, seed=2)
    if ties:
        # fours of equal images
        images = images[torch.arange(60) // 4]
    targets = torch.rand(60, 7, generator=torch.Generator().manual_seed(3)) < 0.3
    targets[:, 4] = False
    values = scores(images, classes)
    found = multilabel.average_precisions(images, classes, targets)
    here = [0, 1, 2, 3, 5, 6]
    assert found.isnan().nonzero().flatten().tolist() == [4]
    for c in here:
        assert found[c] == pytest.approx(
            by_definition(values[:, c].tolist(), targets[:, c].tolist())
        )
        if not ties:
            assert found[c] == pytest.approx(clip_benchmarks(values[:, c], targets[:, c]))
    theirs = average_precision_score(
        targets[:, here].numpy(), values[:, here].numpy(), average="macro"
    )
    assert found[here].mean().item() == pytest.approx(theirs)


def test_a_collapsed_model_gets_the_share_of_positives() -> None:
    targets = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1], [1, 0]]).bool()
    found = multilabel.average_precisions(unit_rows(1, 8).expand(5, -1), unit_rows(2, 8), targets)
    assert found.tolist() == pytest.approx([0.4, 0.6])


# ---- the whole way ----


def test_a_multi_label_set_has_clip_benchmarks_cell(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_voc(tmp_path / "voc", broken=(3, 17))
    out = tmp_path / "out"
    assert run(model, "--data", folder, "--out", out) == 0
    (path,) = out.glob("*.json")
    cell = json.loads(path.read_text())
    assert path.name == f"voc_{cell['pretrained']}_model_en_zeroshot_classification.json"
    encoder = load(model)
    rows = [i for i in range(20) if i not in (3, 17)]
    images = encoder.images(open_catalog(str(folder / "test"), captions=False))[0]
    parts = [encoder.texts([f"a picture {name}", name]).mean(dim=0) for name in NAMES]
    values = images.double() @ torch.nn.functional.normalize(torch.stack(parts), dim=1).double().T
    theirs = average_precision_score(SHOWN[rows], values.numpy(), average="macro")
    assert cell["metrics"] == {"mean_average_precision": pytest.approx(theirs)}
    assert cell["chance"] == {"mean_average_precision": pytest.approx(SHOWN[rows].mean())}
    assert cell["counts"] == {"images": 18, "classes": 5, "labels": SHOWN[rows].sum(), "skipped": 2}

    (row,) = pd.read_csv(out / "benchmark.csv").to_dict("records")
    assert row["mean_average_precision"] == pytest.approx(theirs)
    assert np.isnan(row["acc1"])
    (line,) = map(json.loads, next(out.glob("*/eval_results.jsonl")).read_text().splitlines())
    assert line["key"] == "voc"
    assert line["metrics"]["main_metric"] == pytest.approx(theirs)
    assert f"{theirs:.4f}" in capsys.readouterr().out

    before = path.stat().st_mtime_ns
    assert run(model, "--data", folder, "--out", out) == 0
    assert path.stat().st_mtime_ns == before
    single = open_set(str(folder)).digest(False)
    (folder / "dataset_type.txt").unlink()
    assert open_set(str(folder)).digest(False) != single


def test_targets_are_told_by_their_own_images(tmp_path: Path) -> None:
    """Some samples are left out of the catalog, names repeat in both tars, members stand in any
    order.
    """
    for number in range(2):
        members = []
        for i in range(6):
            mine = [
                ("npy", npy(SHOWN[6 * number + i])),
                ("png", b"" if i == 2 else picture(i)),
                ("json", b"{}"),
            ]
            members += [(f"{i}.{suffix}", data) for suffix, data in (mine if i % 2 else mine[::-1])]
        write_tar(tmp_path / "voc" / f"{number}.tar", members)
    catalog = open_set(str(tmp_path / "voc")).catalog
    assert catalog.left_out == {"no image": 2}
    kept = [i for i in range(12) if i % 6 != 2]
    assert torch.equal(multilabel.read_targets(catalog, 5), torch.from_numpy(SHOWN[kept]).bool())


BAD_TARGETS: dict[str, tuple[bytes, str]] = {
    "not a number": (npy(np.array([0, 1, np.nan, 0, 0])), r"holds nan, neither 0 nor 1"),
    "a count": (npy(np.array([0, 1, 2, 0, 0])), r"holds 2, neither 0 nor 1"),
    "too few": (npy(np.ones(4)), r"has shape \(4,\) for 5 classes"),
    "another shape": (npy(np.ones((1, 5))), r"has shape \(1, 5\) for 5 classes"),
    "a pickle": (
        npy(np.array([0, 1, None, 0, 0]), allow_pickle=True),
        "Object arrays cannot be loaded",
    ),
    "no array": (b"nothing that NumPy wrote", "magic string"),
    "too big": (npy(np.ones(200_000)), "has 1,600,128 bytes"),
    "none": (b"", "is not there"),
    "promises": (
        npy(np.ones(5)).replace(b"(5,), }", b"(9000000000000,), }"),
        "Unable to allocate|EOF",
    ),
}


@pytest.mark.parametrize("what", BAD_TARGETS)
def test_bad_targets_fail_with_the_members_name(
    what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, said = BAD_TARGETS[what]
    folder = write_voc(tmp_path / "voc", {13: data})
    assert run(model, "--data", folder, "--out", tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    name = r"1\.tar:s0000013" + (r"\.npy" if data else "")
    assert re.search(rf"{name}: .*({said}).*; a multi-label image needs a \.npy of 5 numbers", line)


def test_classes_without_an_image_are_refused_or_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = SHOWN * [1, 1, 0, 1, 1]
    folder = write_voc(tmp_path / "voc", {i: npy(shown[i]) for i in range(20)})
    out = tmp_path / "out"
    assert run(model, "--data", folder, "--out", out) == 1
    assert "class 'blue' has no image, like 1 of 5 classes in" in capsys.readouterr().err
    assert run(model, "--data", folder, "--out", out, "--empty_classes") == 0
    view = DataView(load(model), open_set(str(folder)), empty_classes=True)
    each = [
        average_precision_score(shown[:, c], scores(view.images, view.class_features)[:, c].numpy())
        for c in (0, 1, 3, 4)
    ]
    found = cells(out)["zeroshot_classification"]
    assert found["metrics"]["mean_average_precision"] == pytest.approx(np.mean(each))
    assert found["chance"]["mean_average_precision"] == pytest.approx(shown[:, [0, 1, 3, 4]].mean())

    write_voc(tmp_path / "none", dict.fromkeys(range(20), npy(np.zeros(5))))
    assert run(model, "--data", tmp_path / "none", "--out", out, "--empty_classes") == 1
    assert "none: no class has an image" in capsys.readouterr().err
    (folder / "classnames.txt").unlink()
    assert run(model, "--data", folder, "--out", tmp_path / "nameless") == 1
    assert "voc: no class names; give a classnames.txt" in capsys.readouterr().err


def test_tasks_that_need_one_class_an_image_say_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_voc(tmp_path / "voc")
    out = tmp_path / "out"
    few = ["--corruptions", "contrast", "--severities", "1"]
    assert run(model, "--data", folder, "--out", out, "--tasks", *TASKS, *few) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    others = [name for name, task in TASKS.items() if not task.multilabel]
    assert failed == [
        f"failed: model on voc, {task}: this task cannot run on a multi-label set; "
        "use zero_shot and top1"
        for task in others
    ]
    assert set(cells(out)) == {"zeroshot_classification", "top1"}
    assert set(cells(out)["top1"]["metrics"]) == {"top1_accuracy", "corrupted_top1_accuracy/1"}


def on_a_rank(folder: Path, out: Path) -> list[str]:
    return suite.evaluate(
        NamedModel("m", "", small_encoder(7)), [open_set(str(folder))], [], option_values(), out
    )


def test_the_cell_is_the_same_on_any_number_of_ranks(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    folder = write_voc(tmp_path / "voc", broken=(0, 9))
    for world in (1, 3):
        assert ranks(world, on_a_rank, folder, tmp_path / str(world)) == [[]] * world
    assert cells(tmp_path / "3") == cells(tmp_path / "1")
    assert set(cells(tmp_path / "1")) == {"zeroshot_classification"}
