"""Tests of the trainer as users see it: launchers, trackers, streams, bad pairs, NaN, report."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from clipsmall import retrieve, train
from clipsmall.data import Catalog, ShardError, open_catalog
from clipsmall.data.preprocess import ImageTransform
from clipsmall.evaluation.features import read_texts
from clipsmall.evaluation.tasks import TASKS
from clipsmall.model.dual_encoder import unit
from clipsmall.model.saved import load_model
from clipsmall.objectives import OBJECTIVES, ObjectiveSpec
from clipsmall.objectives.softmax import softmax
from clipsmall.report_page import __main__ as report_page
from tests import ROOT
from tests.data.test_reader import damaged
from tests.shards_for_tests import config


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinkhorn", "gcl", "bce"])
def test_a_good_objective_learns_and_evaluates(glyphs: Path, tmp_path: Path, name: str) -> None:
    data = glyphs / "train"
    names = glyphs / "classnames.txt"
    changes = {
        "objective.name": name,
        "optim.pairs": 32 * 150,
        "optim.lr": 5e-3,
        "run.log_every": 5,
        "run.evaluate_every": 100,
        "evaluate.zero_shot": f"[{{name: train, data: [{data}], classes: {names}}}]",
        "evaluate.retrieval": f"[{{name: train, data: [{data}]}}]",
    }
    out = tmp_path / "run"
    assert train.main(config(glyphs, out, **changes)) == 0
    logged = rows(out)
    trained = [row for row in logged if "loss" in row]
    assert trained[-1]["loss"] < 0.7 * trained[0]["loss"]
    assert {"lr", "logit_scale", "pairs_per_second", "data_wait", "chance", "grad_norm"} <= set(
        trained[0]
    )
    assert trained[0]["effective_negatives"] == 31
    assert (trained[-1]["logit_bias"] != trained[0]["logit_bias"]) == (name in ("sigmoid", "bce"))
    measured = [row for row in logged if "train/acc1" in row]
    assert [row["step"] for row in measured] == [100, 150]
    assert measured[-1]["train/acc1"] > 10 * measured[-1]["train/acc1/chance"]
    cell = json.loads(next((out / "eval").glob("train_*_zeroshot_classification.json")).read_text())
    assert cell["metrics"]["acc1"] == measured[-1]["train/acc1"]
    assert yaml.safe_load((out / "run.yaml").read_text())["objective"]["name"] == name


MIXES = ["{sinkhorn: 0.5, softmax: 0.5}", "{softmax: 1, superclass: 0.2}", "{byol: 1, simsiam: 1}"]


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning", "error::FutureWarning")
@pytest.mark.parametrize(
    "name", [*(n for n in OBJECTIVES if n not in ("superclass", "swav")), "swav", *MIXES]
)
def test_every_objective_trains_and_its_model_is_evaluated_alike_from_its_file(
    glyphs: Path, tmp_path: Path, name: str
) -> None:
    """No warning, a finite loss; retrieval while training equals that of the saved model (through
    its predictors).
    """
    out = tmp_path / "run"
    changes: dict[str, object] = {
        "objective.name": name,
        "objective.swav.prototypes": 16,
        "optim.pairs": 32 * 6,
        "evaluate.retrieval": f"[{{name: here, data: [{glyphs / 'test'}]}}]",
    }
    assert train.main(config(glyphs, out, **changes)) == 0
    logged = rows(out)
    assert all(math.isfinite(row["loss"]) for row in logged[:-1])
    measured = {
        key.removeprefix("here/"): value for key, value in logged[-1].items() if "recall" in key
    }
    assert retrieve.main(
        [str(out), "--data", str(glyphs / "test"), "--out", str(tmp_path / "eval")]
    ) in (0, None)
    cell = json.loads(next((tmp_path / "eval").glob("*retrieval.json")).read_text())
    for key, value in cell["metrics"].items():
        assert measured[key] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", ["simsiam", "{byol: 1, superclass: 0.1}"])
def test_models_trained_through_predictors_retrieve_through_them(
    glyphs: Path, tmp_path: Path, name: str
) -> None:
    """Predictions are matched: plain cosines of the towers stay at chance, those of what `encode_*`
    returns do not.
    """
    out = tmp_path / "run"
    assert (
        train.main(
            config(
                glyphs, out, **{"objective.name": name, "optim.pairs": 32 * 400, "optim.lr": 5e-3}
            )
        )
        == 0
    )
    model, loaded = load_model(str(out))
    model.eval()
    catalog = open_catalog([str(glyphs / "train")])
    pixels = torch.stack(
        [ImageTransform(model.spec)(catalog.read(row).image) for row in range(200)]
    )
    ids = loaded.tokenize(read_texts(catalog, rows=range(200)).labels)
    with torch.no_grad():
        image = model.encode_image(pixels)
        text = model.encode_text(ids)
        plain_image = unit(model.towers.image(model.normalised(pixels)))
        plain_text = unit(model.towers.text(ids))
    own = torch.arange(200)
    through, plain = (
        ((i @ t.T).argmax(dim=1) == own).float().mean()
        for i, t in ((image, text), (plain_image, plain_text))
    )
    assert image.shape[1] == 2 * plain_image.shape[1]
    torch.testing.assert_close(image.norm(dim=1), torch.ones(200))
    assert through > 5 * max(plain, 1 / 200)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective=superclass"], "does not train the text tower"),
        (["--objective=nn", "--objective.nn.images=false"], "does not train the text tower"),
        (
            ["--objective={byol: 1, sinkhorn_targets: 1}"],
            "two parts of byol + sinkhorn_targets need the head momentum",
        ),
        (
            ["--objective=gcl", "--objective.gcl.variant=sogclr", "--objective.gcl.rho=3"],
            "sogclr has no rho",
        ),
        (["--objective=vse++", "--objective.exchange=ring"], "vse++ needs all columns"),
        (
            ["--objective={simsiam: 1, vicreg: 1}", "--objective.vicreg.widths=[8]"],
            "no common embedding for retrieval",
        ),
    ],
)
def test_objectives_that_cannot_train_are_refused(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        train.main([*config(glyphs, tmp_path / "run"), *words])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_the_page_of_a_run(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    test = (
        f"[{{name: unseen face, data: [{glyphs / 'test'}], classes: {glyphs / 'classnames.txt'}}}]"
    )
    assert train.main(config(glyphs, out, **{"evaluate.zero_shot": test})) == 0
    assert report_page.main([str(out)]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    page = (out / "report.html").read_text()
    for needed in (
        "unseen face",
        "acc1",
        "latin capital letter",
        "data:image",
        "softmax",
        "classnames.txt",
    ):
        assert needed in page, needed
    with pytest.raises(SystemExit) as left:
        report_page.main([str(tmp_path)])
    assert left.value.code == 2


def test_a_run_of_fewer_steps_than_the_log_waits_for_has_a_page(
    glyphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert train.main(config(glyphs, out, **{"optim.pairs": 96, "run.log_every": 1000})) == 0
    assert [row["step"] for row in rows(out) if "loss" in row] == [3]
    assert report_page.main([str(out)]) == 0
    (out / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as left:
        report_page.main([str(out)])
    assert left.value.code == 2


def test_the_speed_knows_nothing_of_evaluations(
    glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.perf_counter
    late = [0.0]

    def slow(*arguments: object, **options: object) -> object:
        # seconds
        late[0] += 10_000
        return task.measure(*arguments, **options)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    task = TASKS["retrieval"]
    monkeypatch.setitem(TASKS, "retrieval", replace(task, measure=slow))
    changes = {
        "run.evaluate_every": 5,
        "evaluate.retrieval": f"[{{name: test, data: [{glyphs / 'test'}]}}]",
    }
    assert train.main(config(glyphs, tmp_path / "run", **changes)) == 0
    assert late[0] == 10_000 * 5
    assert (
        min(row["pairs_per_second"] for row in rows(tmp_path / "run") if "loss" in row) > 32 / 1000
    )


@pytest.mark.parametrize("launcher", ["accelerate", "python"])
def test_it_starts_from_anywhere_without_any_set_up(
    glyphs: Path, tmp_path: Path, launcher: str
) -> None:
    """From another folder, with a space in the path, no accelerate config file, and not as an
    installed package.
    """
    place = tmp_path / "a b"
    out = tmp_path / "run"
    shutil.copytree(
        ROOT / "clipsmall", place / "clipsmall", ignore=shutil.ignore_patterns("__pycache__")
    )
    script = [str(place / "clipsmall" / "train.py"), *config(glyphs, out)]
    start = (
        ["-m", "accelerate.commands.launch", "--num_processes", "1"]
        if launcher == "accelerate"
        else []
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, *start, *script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(out)) == 24
    assert "done: 768 pairs, 24 steps" in done.stderr


def test_bad_pairs_are_counted_to_the_end_and_over_the_rate_stop_the_run(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = damaged(glyphs, tmp_path / "bad", [5, 77, 205])
    words = {"data.train": f"[{data}]"}
    assert (
        train.main(config(glyphs, tmp_path / "few", **words, **{"data.max_error_rate": 0.2})) == 0
    )
    said = capsys.readouterr().err
    assert "replaced by other pairs" in said
    assert "x not an image (e.g." in said
    assert rows(tmp_path / "few")[-1]["skipped"] > 0
    with pytest.raises(SystemExit) as left:
        train.main(config(glyphs, tmp_path / "many", **words, **{"data.max_error_rate": 0.005}))
    assert left.value.code == 2
    assert "over data.max_error_rate=0.005" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_before_the_weights(
    glyphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = iter(range(100))

    def breaks(rows, columns, **options):  # type: ignore[no-untyped-def]
        found = softmax(rows, columns, **options)
        return {**found, "loss": found["loss"] * (float("nan") if next(calls) == 7 else 1.0)}

    monkeypatch.setitem(OBJECTIVES, "softmax", ObjectiveSpec(breaks, "softmax"))
    with pytest.raises(SystemExit) as left:
        train.main(config(glyphs, tmp_path / "run"))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "not finite" in said
    assert "index [" in said
    assert rows(tmp_path / "run")[-1]["step"] == 7


def test_a_stream_trains_and_says_what_it_does_not_promise(glyphs: Path, tmp_path: Path) -> None:
    towers = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    (tmp_path / "tiny-stream.json").write_text(json.dumps(towers))
    changes = {
        "data.streaming": True,
        "model.name": str(tmp_path / "tiny-stream.json"),
        "optim.pairs": 32 * 6,
    }
    with pytest.warns(UserWarning, match="not exactly"):
        assert train.main(config(glyphs, tmp_path / "run", **changes)) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    mining = {"mining.method": "groups", "mining.pool": 64, "mining.start": 0.2}
    with pytest.warns(UserWarning, match="not exactly"):
        assert train.main(config(glyphs, tmp_path / "mined", **changes, **mining)) == 0
    mined = rows(tmp_path / "mined")
    assert ["mined_loss" in row for row in mined] == [False, False, True, True, True, True]
    # images are told apart, too
    assert mined[-1]["blocked"] < 0.1
    assert report_page.main([str(tmp_path / "run")]) == 0
    # nothing to look up
    assert "Batch matrix" not in (tmp_path / "run" / "report.html").read_text()


def test_a_loader_workers_error_is_told_without_its_traceback(
    glyphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cut(catalog: Catalog, row: int) -> None:
        raise ShardError("00001.tar: ends before its index says\nit was cut while in use")

    monkeypatch.setattr(Catalog, "read", cut)
    with pytest.raises(SystemExit) as left:
        train.main(config(glyphs, tmp_path / "run", **{"data.workers": 1}))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert (
        "\nerror: 00001.tar: ends before its index says\nerror: it was cut while in use\n" in said
    )
    assert "Traceback" not in said


def test_accelerates_accumulation_is_refused(
    glyphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SystemExit) as left:
        train.main(config(glyphs, tmp_path / "run"))
    assert left.value.code == 2
    assert "gradient_accumulation_steps=4 of Accelerate: not supported" in capsys.readouterr().err


def test_tensorboard_gets_the_numbers(glyphs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert (
        train.main(config(glyphs, out, **{"run.trackers": "[tensorboard]", "optim.pairs": 32 * 3}))
        == 0
    )
    events = EventAccumulator(str(next(out.rglob("events.out.tfevents.*")).parent)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert events.Scalars("loss")[2].value == pytest.approx(rows(out)[2]["loss"])


def test_a_tracker_that_is_not_there_is_named(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed here")
    with pytest.raises(SystemExit) as left:
        train.main(config(glyphs, tmp_path / "run", **{"run.trackers": "[trackio]"}))
    assert left.value.code == 2
    assert "trackio is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_end_the_run(
    glyphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise ConnectionError("no login")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fails)
    assert train.main(config(glyphs, tmp_path / "run", **{"optim.pairs": 32 * 2})) == 0
    assert "no login" in capsys.readouterr().err
    assert len(rows(tmp_path / "run")) == 2


def test_bf16_trains_and_fp16_on_a_cpu_is_refused(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.state import AcceleratorState

    # precision is fixed once a process
    AcceleratorState._reset_state(True)
    assert (
        train.main(
            config(glyphs, tmp_path / "bf16", **{"run.precision": "bf16", "optim.pairs": 32 * 10})
        )
        == 0
    )
    losses = [row["loss"] for row in rows(tmp_path / "bf16")]
    assert losses[-1] < losses[0]
    AcceleratorState._reset_state(True)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as left:
            train.main(config(glyphs, tmp_path / "fp16", **{"run.precision": "fp16"}))
        assert left.value.code == 2
        assert "needs a GPU" in capsys.readouterr().err
        assert not (tmp_path / "fp16").exists()
        AcceleratorState._reset_state(True)
