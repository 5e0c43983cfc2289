"""Tests of the suite: cells once and for all, tables others can read, failures told, the same on
several ranks.

Seen to fail when: a file that exists is a cell that is done; a key forgets weights, data,
preprocessing or settings; features are made anew for each task; every rank writes, or encodes all;
a failing cell ends the run, or the exit code is 0; classes without images pass; features that are
not finite pass; nshards.txt or dataset_type.txt is not read; tars without an index are refused;
metrics of ours are left out of the CSV; a block of scores is the whole matrix; two models share a
file; images that are no shards are refused without the commands that make them.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch

from clipsmall import evaluate
from clipsmall.data import open_catalog
from clipsmall.data.preprocess import ImageSpec
from clipsmall.distributed import world
from clipsmall.evaluation import Encoder, suite
from clipsmall.evaluation.recall import Relevance, recalls
from clipsmall.evaluation.sets import DataSet, given_set, open_set
from clipsmall.evaluation.suite import NamedModel, measure, option_values, requests
from clipsmall.evaluation.tables import FIRST, eval_results, write_tables
from clipsmall.evaluation.tasks import TASKS
from clipsmall.evaluation.tasks.zero_shot import zero_shot
from clipsmall.evaluation.view import DataView
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.load import save_model_files
from clipsmall.model.saved import load_model
from clipsmall.model.towers.small import SmallConfig, WordTokenizer, load_small
from clipsmall.storage import checkpoint
from data_tools import make_shards
from tests.evaluation.test_evaluation import (
    COLOURS,
    measure_retrieval,
    measure_zero_shot,
    picture,
    small_encoder,
    spoilt,
    unit_rows,
    write_pictures,
)
from tests.meter import Meter
from tests.model.test_towers import write_clip, write_open_clip_folder
from tests.shard_samples import write_tar
from tests.shards_for_tests import TOWERS

# no picture is pink
SEEN = COLOURS[:-1]
ALL = [*TASKS]
RESULT_NAMES = {task.result_name for task in TASKS.values()}
FEW = option_values(
    k=5, corruptions=("contrast", "jpeg_compression"), severities=(1, 5), candidates=6
)


def write_model(folder: Path, seed: int = 0, bias: float = 0.0) -> Path:
    """A checkpoint of ours."""
    torch.manual_seed(seed)
    config = SmallConfig.model_validate(TOWERS)
    loaded = load_small(
        config, WordTokenizer.train([*COLOURS, "picture", *map(str, range(100))], config.text)
    )
    model = DualEncoder(loaded.towers, loaded.spec, 10.0, bias, False)
    checkpoint.save(
        folder, {"model": model.state_dict()}, {}, lambda there: save_model_files(loaded, there)
    )
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures/{train,test}` with labels in the field `kind` and class names, `model`, `other`."""
    folder = tmp_path_factory.mktemp("home")
    write_pictures(folder / "pictures" / "test")
    write_pictures(folder / "pictures" / "train", 60)
    (folder / "pictures" / "classnames.txt").write_text("\n".join(SEEN) + "\n")
    write_model(folder / "model")
    write_model(folder / "other", seed=1, bias=-2.0)
    return folder


def run(*words: object) -> int:
    return evaluate.main([str(word) for word in words])


def options(home: Path, out: Path) -> list[str]:
    return [
        "--data",
        str(home / "pictures"),
        "--label",
        "kind",
        "--out",
        str(out),
        "--corruptions",
        "contrast",
        "--severities",
        "1",
        "5",
        "--k",
        "5",
        "--candidates",
        "6",
    ]


def cells(out: Path) -> dict[str, dict[str, Any]]:
    """By task; of one model and data set."""
    return {
        cell["task"]: cell for cell in (json.loads(path.read_text()) for path in out.glob("*.json"))
    }


# ---- what it writes ----


def test_cells_and_tables_are_clip_benchmarks_and_datacomps(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home / "model", home / "other", *options(home, tmp_path), "--tasks", *ALL) == 0
    digest = {name: load(home / name).digest()[:8] for name in ("model", "other")}
    assert {path.name for path in tmp_path.glob("*.json")} == {
        f"pictures_{digest[name]}_{name}_en_{task}.json" for name in digest for task in RESULT_NAMES
    }
    pngs = {path.name for path in tmp_path.glob("*.png")}
    assert pngs == {f"pictures_{digest[name]}_{name}_en_calibration.png" for name in digest}

    table = pd.read_csv(tmp_path / "benchmark.csv", dtype={"pretrained": str})
    assert [*table.columns[: len(FIRST)]] == FIRST
    assert len(table) == 2 * len(ALL)
    for path in tmp_path.glob("*.json"):
        cell = json.loads(path.read_text())
        (row,) = table[(table.task == cell["task"]) & (table.model == cell["model"])].to_dict(
            "records"
        )
        assert (row["dataset"], row["language"]) == ("pictures", "en")
        assert row["model_fullname"] == f"{cell['model']} {cell['pretrained']}"
        for name, value in cell["metrics"].items():
            assert row[name] == pytest.approx(value, abs=1e-12)

    lines = [
        *map(
            json.loads,
            (tmp_path / f"model_{digest['model']}" / "eval_results.jsonl").read_text().splitlines(),
        )
    ]
    by_key = {line["key"]: line for line in lines}
    assert set(by_key) == {"pictures", "retrieval/pictures"}
    assert by_key["pictures"]["metrics"]["main_metric"] == by_key["pictures"]["metrics"]["acc1"]
    found = by_key["retrieval/pictures"]["metrics"]
    assert (
        found["main_metric"]
        == (found["image_retrieval_recall@1"] + found["text_retrieval_recall@1"]) / 2
    )
    said = capsys.readouterr().out
    assert all(task in said for task in RESULT_NAMES)
    assert f"{table.acc1.dropna().iloc[0]:.4f}" in said


def load(folder: Path) -> Encoder:
    model, loaded = load_model(str(folder))
    return Encoder(model.eval(), loaded.tokenize, torch.device("cpu"), 16)


def test_a_set_as_given_is_measured_as_one_that_is_looked_up(home: Path) -> None:
    """As training and the single commands open it, and as `evaluate` does."""
    encoder = load(home / "model")
    found = open_set(str(home / "pictures"), label="kind")
    shards = [str(home / "pictures" / "test")]
    classes = str(home / "pictures" / "classnames.txt")
    given = given_set("pictures", shards, classes=classes, label="kind")
    captioned = given_set("pictures", shards, only_captioned=True)
    for task, data in (("zero_shot", given), ("retrieval", captioned)):
        (asked,) = requests(data, [task], FEW)
        result = measure(DataView(encoder, found), asked)
        assert measure(DataView(encoder, data, empty_classes=True), asked) == result


def test_features_are_made_once_for_all_tasks(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []
    texts = []
    real_images = Encoder.images
    real_texts = Encoder.texts
    monkeypatch.setattr(Encoder, "images", lambda *a, **k: images.append(a) or real_images(*a, **k))
    monkeypatch.setattr(Encoder, "texts", lambda *a: texts.append(a) or real_texts(*a))
    tasks = [
        "zero_shot",
        "retrieval",
        "knn",
        "linear_probe",
        "robustness",
        "calibration",
        "geometry",
        "matching",
    ]
    assert run(home / "model", *options(home, tmp_path), "--tasks", *tasks) == 0
    # test, train; contrast at two severities
    assert len(images) == 2 + 2
    # captions, prompts
    assert len(texts) == 2


@pytest.mark.parametrize("kind", ["hf", "open_clip"])
def test_models_of_other_libraries_have_cells_too(kind: str, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    write_clip(folder) if kind == "hf" else write_open_clip_folder(folder, {})
    out = tmp_path / "out"
    assert (
        run(
            folder,
            *options(home, out),
            "--tasks",
            "zero_shot",
            "robustness",
            "calibration",
            "--workers",
            "2",
        )
        == 0
    )
    found = cells(out)
    assert {cell["model"] for cell in found.values()} == {"my model"}
    clean = found["zeroshot_classification"]["metrics"]["acc1"]
    assert found["robustness"]["metrics"]["zero_shot_clean"] == clean
    assert found["calibration"]["metrics"]["softmax_accuracy"] == pytest.approx(clean)


# ---- once and for all ----


def test_done_cells_are_not_made_again_and_lost_or_changed_ones_are(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*options(home, tmp_path), "--tasks", "zero_shot", "knn", "geometry"]
    assert run(home / "model", *words) == 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    with monkeypatch.context() as patch:
        # nothing may be encoded
        patch.setattr(Encoder, "images", None)
        assert run(home / "model", *words) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == before

    def renewed() -> set[str]:
        return {
            cell
            for cell, path in paths(tmp_path)
            if before.get(path.name) != path.stat().st_mtime_ns
        }

    def paths(out: Path) -> list[tuple[str, Path]]:
        return [(json.loads(path.read_text())["task"], path) for path in out.glob("*.json")]

    next(tmp_path.glob("*_knn.json")).unlink()
    assert run(home / "model", *words) == 0
    assert renewed() == {"knn"}
    # cut
    next(tmp_path.glob("*_geometry.json")).write_text("{")
    assert run(home / "model", *words) == 0
    assert renewed() == {"knn", "geometry"}
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    # named twice, measured once
    assert run(home / "model", *words, "knn", "--k", "6") == 0
    assert cells(tmp_path)["knn"]["counts"]["k"] == 6
    # what does not depend on k stays
    assert renewed() == {"knn"}
    for order in (["knn", "zero_shot", "robustness"], ["robustness", "zero_shot", "knn"]):
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
        assert run(home / "model", *options(home, tmp_path), "--tasks", *order, "--k", "6") == 0
        assert renewed() == ({"robustness"} if order[0] == "knn" else set())


def test_other_weights_other_data_other_classes_are_other_cells(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    shutil.copytree(home / "pictures", tmp_path / "pictures")
    out = tmp_path / "out"
    words = [tmp_path / "model", *options(tmp_path, out), "--tasks", "zero_shot"]
    keys = set[str]()

    def expect(count: int) -> None:
        assert run(*words) == 0
        keys.update(json.loads(path.read_text())["key"] for path in out.glob("*.json"))
        assert len(keys) == count

    expect(1)
    expect(1)
    (tmp_path / "pictures" / "classnames.txt").write_text("\n".join(name.upper() for name in SEEN))
    expect(2)
    (tmp_path / "pictures" / "zeroshot_classification_templates.txt").write_text("a {c} picture\n")
    expect(3)
    write_pictures(tmp_path / "pictures" / "test", 44)
    expect(4)
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", seed=5)
    expect(5)
    # the model of before has its cell still
    assert len(list(out.glob("*.json"))) == 2


def test_a_failing_cell_is_told_and_the_others_are_made(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["knn", "zero_shot", "geometry"]
    words = [*options(home, tmp_path), "--tasks", *tasks, "--k", "61"]
    assert run(home / "model", tmp_path / "no-model", *words) == 1
    said = capsys.readouterr().err
    assert "failed: model on pictures, knn: k=61: there are 60 images to learn from" in said
    assert "failed: " in said
    assert "no-model" in said
    assert set(cells(tmp_path)) == {"zeroshot_classification", "geometry"}
    assert run(home / "model", *words, "--k", "60") == 0
    assert set(cells(tmp_path)) == {"zeroshot_classification", "geometry", "knn"}


def test_a_list_that_is_no_text_fails_its_task_with_its_name(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_wds(tmp_path / "cifar")
    (folder / "classnames.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    assert run(home / "model", "--data", folder, "--out", tmp_path / "out") == 1
    assert f"{folder}/classnames.txt: not UTF-8 text (byte 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k", "0"], "--k=0: must be at least 1"),
        (["--candidates", "1"], "--candidates=1: must be at least 2"),
        (["--batch_size", "0"], "--batch_size=0: must be at least 1"),
        (["--temperature", "-1"], "--temperature=-1.0: must be a finite number of at least 0"),
        (["--temperature", "nan"], "--temperature=nan: must be a finite number of at least 0"),
        (["--temperature", "inf"], "--temperature=inf: must be a finite number of at least 0"),
        (["--out", "file"], "--out=file: nothing can be written to file"),
        (["--out", "file/deeper"], "--out=file/deeper: nothing can be written to"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(
    words: list[str],
    said: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_encoder", None)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as left:
        run("model", *options(home, tmp_path / "out"), *words)
    assert left.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- data sets ----


def write_wds(folder: Path, kind: str = "", captions: bool = False) -> Path:
    """CLIP_benchmark's layout, nothing indexed: 20 images in two tars."""
    for number in range(2):
        members: list[tuple[str, bytes]] = []
        for i in range(10 * number, 10 * number + 10):
            words = (
                ("txt", f"picture {i}\n{COLOURS[i % 8]} {i}".encode())
                if captions
                else ("cls", str(i % 7).encode())
            )
            members += [(f"s{i:07d}.png", picture(i)), (f"s{i:07d}.{words[0]}", words[1])]
        write_tar(folder / "test" / f"{number}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(SEEN))
    (folder / "zeroshot_classification_templates.txt").write_text("a picture {c}\n{c}\n")
    if kind:
        (folder / "dataset_type.txt").write_text(kind + "\n")
    return folder


def test_clip_benchmarks_layout_is_read_as_it_is(home: Path, tmp_path: Path) -> None:
    named = write_wds(tmp_path / "cifar")
    paired = write_wds(tmp_path / "coco", "retrieval", captions=True)
    assert run(home / "model", "--data", named, paired, "--out", tmp_path / "out") == 0
    found = {
        cell["dataset"]: cell
        for cell in map(json.loads, (p.read_text() for p in (tmp_path / "out").glob("*.json")))
    }
    assert {name: cell["task"] for name, cell in found.items()} == {
        "cifar": "zeroshot_classification",
        "coco": "zeroshot_retrieval",
    }
    assert found["coco"]["counts"] == {"images": 20, "captions": 40, "skipped": 0}
    names = str(named / "classnames.txt")
    templates = str(named / "zeroshot_classification_templates.txt")
    catalog = open_catalog(str(named / "test"), captions=False)
    assert (
        found["cifar"]["metrics"]
        == measure_zero_shot(load(home / "model"), catalog, "x", names, templates).metrics
    )


def made_for(data: DataSet) -> list[str]:
    return [request.task for request in requests(data, [], FEW)]


def test_what_a_data_set_is_called_and_made_for(home: Path, tmp_path: Path) -> None:
    assert open_set(str(home / "pictures")).name == "pictures"
    part = open_set(str(home / "pictures" / "test"))
    assert (part.name, made_for(part)) == ("pictures/test", ["zero_shot", "retrieval"])
    assert part.train == (str(home / "pictures" / "train"),)
    assert part.classes == str(home / "pictures" / "classnames.txt")
    assert (
        open_set(str(home / "pictures" / "test" / "{00000..00001}.tar")).catalog.fingerprint
        == part.catalog.fingerprint
    )
    write_pictures(tmp_path / "plain")
    assert made_for(open_set(str(tmp_path / "plain"))) == ["retrieval"]
    assert made_for(open_set(str(tmp_path / "plain"), label="kind")) == ["zero_shot", "retrieval"]
    (write_wds(tmp_path / "nameless") / "classnames.txt").unlink()
    nameless = open_set(str(tmp_path / "nameless"))
    assert made_for(nameless) == ["zero_shot"]
    with pytest.raises(
        ValueError, match=r"classes=captions: labels are numbers here; give a classnames\.txt"
    ):
        zero_shot(DataView(small_encoder(), nameless))
    with pytest.raises(ValueError, match=r"has no training images .* --train"):
        _ = open_set(str(tmp_path / "plain")).training


def test_images_are_not_learned_from_and_asked_about(home: Path) -> None:
    data = open_set(str(home / "pictures" / "train"), label="kind")
    with pytest.raises(
        ValueError,
        match=r"pictures/train: .* is both training and test data; .*--train",
    ):
        _ = data.training


def test_no_image_is_left_out_in_silence(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ten, one has no caption, one a blank one, one a caption that is no text; all have a
    class.
    """
    words = {3: b" \n", 4: "caf\xe9".encode("latin-1")}
    members: list[tuple[str, bytes]] = []
    for i in range(10):
        caption = words.get(i, f"picture {i}".encode())
        members += [(f"{i}.png", picture(i)), (f"{i}.cls", str(i % 7).encode())]
        members += [(f"{i}.txt", caption)] if i != 5 else []
    write_tar(tmp_path / "set" / "test" / "0.tar", members)
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(SEEN))
    words = [
        "--data",
        tmp_path / "set",
        "--out",
        tmp_path / "out",
        "--empty_classes",
        "--corruptions",
        "contrast",
    ]
    assert run(home / "model", *words, "--tasks", "zero_shot", "retrieval", "matching", "top1") == 0
    found = {task: cell["counts"] for task, cell in cells(tmp_path / "out").items()}
    assert (
        found["zeroshot_classification"]["images"],
        found["zeroshot_classification"]["skipped"],
    ) == (9, 1)
    assert (found["zeroshot_retrieval"]["images"], found["zeroshot_retrieval"]["skipped"]) == (7, 3)
    assert (found["matching"]["skipped"], found["top1"]["skipped"]) == (3, 1)
    assert "zeroshot_retrieval (3 images could not be used" in capsys.readouterr().out
    catalog = open_catalog(str(tmp_path / "set" / "test"))
    assert measure_retrieval(load(home / "model"), catalog, "x").counts["skipped"] == 3


def trained_from_nothing(folder: Path) -> str:
    with pytest.raises(ValueError, match="no shards there") as error:
        _ = open_set(str(folder / "test"), label="kind").training
    return str(error.value)


def test_where_there_is_nothing_to_learn_from_no_rank_waits(
    home: Path, ranks: Any, tmp_path: Path
) -> None:
    shutil.copytree(home / "pictures" / "test", tmp_path / "set" / "test")
    (tmp_path / "set" / "train").mkdir()
    assert len(ranks(2, trained_from_nothing, tmp_path / "set")) == 2


def drop_tar(folder: Path) -> None:
    (folder / "test" / "1.tar").unlink()


BAD_SETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing tar": (drop_tar, r"nshards.txt says 2, 1 tars are there"),
    "no shards": (shutil.rmtree, "no shards there"),
    "cut": (
        lambda f: (f / "test" / "1.tar").write_bytes((f / "test" / "1.tar").read_bytes()[:3000]),
        r"1\.tar: .*truncated",
    ),
}


@pytest.mark.parametrize("what", BAD_SETS)
def test_a_bad_data_set_ends_with_2_before_a_model_is_loaded(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = BAD_SETS[what]
    spoil(write_wds(tmp_path / "cifar"))
    with pytest.raises(SystemExit) as left:
        run("no-model", "--data", tmp_path / "cifar", "--out", tmp_path / "out")
    assert left.value.code == 2
    assert re.search(f"error: .*{said}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def command(said: str) -> tuple[list[str], list[str]]:
    """The words of make_shards and of evaluate that a refusal names."""
    made = re.search(
        r"make them: python -m data_tools\.make_shards (.*); then evaluate with (.*)", said
    )
    assert made
    return shlex.split(made[1]), shlex.split(made[2])


def test_a_folder_of_class_folders_is_two_commands_away(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the refusal says is typed as it stands."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("test", 3), ("train", 6)):
        for number, colour in enumerate(SEEN):
            (tmp_path / "my pets" / split / colour).mkdir(parents=True)
            for i in range(count):
                image = picture(100 * number + 10 * i + len(split))
                (tmp_path / "my pets" / split / colour / f"{i}.png").write_bytes(image)
    with pytest.raises(SystemExit) as left:
        run("no-model", "--data", "my pets")
    assert left.value.code == 2
    making, data = command(capsys.readouterr().err)
    assert making == [
        str(tmp_path / "my pets" / "test"),
        "data/my pets-shards/test",
        "--label",
        "class",
    ]
    assert make_shards.main([*making, "--workers", "1"]) == 0
    assert (
        make_shards.main([re.sub("/test$", "/train", word) for word in [*making, "--workers", "1"]])
        == 0
    )
    assert data == ["--data", "data/my pets-shards/test", "--label", "label"]
    out = tmp_path / "out"
    assert run(home / "model", *data, "--out", out, "--tasks", "zero_shot", "knn", "--k", "5") == 0
    found = cells(out)
    assert found["zeroshot_classification"]["counts"] == {"images": 21, "classes": 7, "skipped": 0}
    assert found["knn"]["counts"] == {"images": 21, "train": 42, "classes": 7, "skipped": 0, "k": 5}


def test_what_has_to_become_shards_first_is_told_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^cats: no shards there \(\*\.tar\)$"):
        open_set("cats")
    (tmp_path / "cats" / "a" / "1.JPG").touch()
    (tmp_path / "photos.csv").touch()
    column = "--label COLUMN"
    columns = "--split test --caption COLUMN --label COLUMN"
    for given, out, how in (
        ("cats", "cats-shards", "--label class"),
        ("photos.csv", "photos-shards", column),
        ("hf:org/pets", "pets-shards", columns),
    ):
        with pytest.raises(ValueError, match=rf"^{given}: no shards ") as error:
            open_set(given)
        making, data = command(str(error.value))
        assert (making[:2], " ".join(making[2:])) == ([given, f"data/{out}"], how)
        assert data == ["--data", f"data/{out}", "--label", "label"]


@pytest.mark.parametrize(
    "what", ["a class without images", "a template without {c}", "a label without a class"]
)
def test_bad_words_fail_with_one_clear_message(
    what: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_wds(tmp_path / "cifar")
    said = ""
    encode = Encoder.images
    # told before anything is encoded
    monkeypatch.setattr(Encoder, "images", None)
    if what == "a class without images":
        (folder / "classnames.txt").write_text("\n".join([*SEEN, "pink", "puce"]))
        said = "class 'pink' has no image, like 2 of 9 classes in"
    elif what == "a template without {c}":
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na picture\n")
        said = "line 2: 'a picture' has no {c}"
    else:
        (folder / "classnames.txt").write_text("red\ngreen\n")
        said = "label 2 is none of the 2 classes"
    assert run(home / "model", "--data", folder, "--out", tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert said in line
    monkeypatch.setattr(Encoder, "images", encode)
    if what == "a class without images":
        assert (
            run(home / "model", "--data", folder, "--out", tmp_path / "out", "--empty_classes") == 0
        )
        assert cells(tmp_path / "out")["zeroshot_classification"]["counts"]["classes"] == 9


@pytest.mark.parametrize("side", ["image", "text"])
def test_features_that_are_not_finite_fail_every_task_that_needs_them(
    side: str, home: Path, tmp_path: Path
) -> None:
    encoder = load(home / "model")
    spoilt(encoder.model, side)
    data = open_set(str(home / "pictures"), label="kind")
    failures = suite.evaluate(NamedModel("broken", "", encoder), [data], ALL, FEW, tmp_path)
    told = {line.split(": ")[0].split(", ")[1] for line in failures}
    assert told == set(ALL) - ({"knn", "linear_probe"} if side == "text" else set())
    assert all("features are not finite" in line for line in failures)


# ---- ranks and memory ----


def on_a_rank(home: Path, out: Path) -> list[str]:
    encoder = small_encoder(7)
    data = open_set(str(home / "pictures"), label="kind")
    # nobody else may
    writes = suite.write_cell if world.rank() == 0 else None
    with mock.patch.object(suite, "write_cell", writes):
        return suite.evaluate(NamedModel("m", "", encoder), [data], ALL, FEW, out)


def test_cells_are_the_same_on_any_number_of_ranks(home: Path, ranks: Any, tmp_path: Path) -> None:
    assert ranks(1, on_a_rank, home, tmp_path / "1") == [[]]
    assert ranks(3, on_a_rank, home, tmp_path / "3") == [[]] * 3
    assert set(cells(tmp_path / "1")) == RESULT_NAMES
    assert cells(tmp_path / "3") == cells(tmp_path / "1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "3").iterdir()}
    assert ranks(2, on_a_rank, home, tmp_path / "3") == [[]] * 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "3").iterdir()} == before


def test_retrieval_among_100_000_takes_half_a_gib() -> None:
    """A few hundred of the queries: the others would take as much again, later."""
    n = 100_000
    own = torch.arange(100_000)
    answers = unit_rows(n, 16)
    belongs = Relevance(own, own, n, n)
    with Meter() as meter:
        found = recalls(answers[:400], answers, belongs, "image")
    assert found[1] == 1.0
    assert meter.peak_bytes < 512 << 20
    # of a matrix of 1e10
    assert meter.largest < 1 << 25


def test_a_spec_is_part_of_a_models_digest() -> None:
    encoder = small_encoder()
    digest = encoder.digest()
    assert small_encoder().digest() == digest
    encoder.model.spec = ImageSpec(16, resize="squash")
    assert encoder.digest() != digest
    other = small_encoder()
    other.model.logit_bias.data.fill_(-1.0)
    assert other.digest() != digest


def test_models_that_share_a_name_are_told_apart(home: Path, tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c/alone"):
        (tmp_path / name).mkdir(parents=True)
    given = [str(tmp_path / name) for name in ("a/run", "b/run", "c/alone")]
    assert evaluate.model_titles([*given, "ViT-B-32,openai", "org/name"]) == [
        (given[0].strip("/"), ""),
        (given[1].strip("/"), ""),
        ("alone", ""),
        ("ViT-B-32", "openai"),
        ("org/name", ""),
    ]


def test_a_cell_of_another_task_is_no_line_of_datacomps() -> None:
    cell = {
        "dataset": "d",
        "model": "m",
        "pretrained": "p",
        "task": "geometry",
        "metrics": {"alignment": 1.0},
    }
    assert eval_results([cell]) == []


def test_cells_of_clip_benchmark_and_cut_ones_do_not_stop_a_table(tmp_path: Path) -> None:
    cell = {
        "dataset": "d",
        "model": "m",
        "pretrained": "p",
        "task": "zeroshot_retrieval",
        "metrics": {"image_retrieval_recall@5": 0.5, "text_retrieval_recall@5": 0.25},
    }
    (tmp_path / "d_p_m_en_zeroshot_retrieval.json").write_text(json.dumps(cell))
    (tmp_path / ".tmp-1-d_p_m_en_zeroshot_retrieval.json").write_text(json.dumps(cell))
    write_tables(tmp_path)
    assert pd.read_csv(tmp_path / "benchmark.csv")["text_retrieval_recall@5"].tolist() == [0.25]
    assert not (tmp_path / "m_p").exists()
