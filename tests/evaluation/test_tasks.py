"""Tests of what tasks share: their entries, options and keys, and that all run in training, too.

Seen to fail when: an option is left out of a key, or comes in another order; a task in training is
measured on other images than by `evaluate`; its options are not read; a wrong one ends the run
after training; a task of the dict is missing in the parser, the log, or on the page.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipsmall import evaluate, train
from clipsmall.compare.grid import Comparison, check_run
from clipsmall.config.reader import ConfigError, validated
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.sets import DataSet
from clipsmall.evaluation.suite import TaskRequest, key_of, option_values
from clipsmall.evaluation.task import Task, TaskOption
from clipsmall.evaluation.tasks import TASKS, task_options
from clipsmall.evaluation.view import DataView
from clipsmall.report_page import __main__ as report_page
from tests.evaluation.test_evaluation import write_pictures
from tests.evaluation.test_suite import SEEN, cells
from tests.shards_for_tests import config

# ---- keys ----

GIVEN = {
    "k": 5,
    "temperature": 0.0,
    "corruptions": ("fog",),
    "severities": (1, 5),
    "empty_classes": True,
    "candidates": 7,
}
TWO = ("zero_shot", "retrieval")
FOUR = ("knn", "linear_probe", "retrieval", "zero_shot")
# as finished results have them: made before tasks had entries
KEYS: dict[tuple[str, str, tuple[str, ...]], str] = {
    ("default", "zero_shot", ()): "18031527e11576d3",
    ("default", "retrieval", ()): "864711809aee890c",
    ("default", "linear_probe", ()): "677aff74ab65eebb",
    ("default", "knn", ()): "476599cdfae16ae8",
    ("default", "robustness", ("zero_shot",)): "d89bd103cec438d4",
    ("default", "robustness", TWO): "32730923f2c0d3a0",
    ("default", "robustness", FOUR): "2fd24c7e64d3dc84",
    ("default", "calibration", ()): "d84d776692325ca6",
    ("default", "geometry", ()): "25f0188c431d518d",
    ("default", "matching", ()): "38ea7ad87d013b05",
    ("default", "top1", ()): "b97bb593659e6c2d",
    ("default", "candidates", ()): "c6dc8cb8ede600db",
    ("given", "zero_shot", ()): "14c9f332212c4ff5",
    ("given", "retrieval", ()): "864711809aee890c",
    ("given", "linear_probe", ()): "677aff74ab65eebb",
    ("given", "knn", ()): "e91f24644ebc75e4",
    ("given", "robustness", ("zero_shot",)): "eea012184dd9659b",
    ("given", "robustness", TWO): "df296a048256c093",
    ("given", "robustness", FOUR): "4dbd0bbb36e42cc4",
    ("given", "calibration", ()): "b6182c55236a0e5d",
    ("given", "geometry", ()): "25f0188c431d518d",
    ("given", "matching", ()): "38ea7ad87d013b05",
    ("given", "top1", ()): "900cda1b9cb39f90",
    ("given", "candidates", ()): "813a6f757b2e7343",
}


class NamedData:
    """A data set that is its own digest."""

    def digest(self, learns: bool) -> str:
        return f"data {learns}"


@pytest.mark.parametrize("which", KEYS, ids=str)
def test_keys_of_finished_results_stay(which: tuple[str, str, tuple[str, ...]]) -> None:
    options, task, repeated = which
    values = option_values(**(GIVEN if options == "given" else {}))
    request = TaskRequest(task, NamedData(), values, repeated)  # type: ignore[arg-type]
    assert key_of("model", request)[:16] == KEYS[which]


def test_digests_of_data_sets_stay() -> None:
    found = []
    for kind in ("", "multilabel"):
        data = DataSet("n", ("s",), (), kind, "captions", "plain", "kind")
        data.__dict__["catalog"] = SimpleNamespace(fingerprint="abc")
        data.__dict__["training"] = SimpleNamespace(fingerprint="xyz")
        found += [data.digest(False)[:16], data.digest(True)[:16]]
    assert found == ["0374a046781a6f76", "9e196ffa63beeea0", "f2ef22f6eeee4b50", "fd4241c12f74c253"]


# ---- options ----


def test_an_option_takes_what_it_says() -> None:
    count = TaskOption(20, "", least=1)
    assert count.value("k", 1) == 1
    for odd in (0, True, 1.5, "3", None):
        with pytest.raises(ValueError, match=f"^k={odd}: must be "):
            count.value("k", odd)
    fraction = TaskOption(0.07, "", least=0)
    assert isinstance(fraction.value("t", 1), float)
    for odd in (-0.1, math.nan, math.inf, False, "0.1"):
        with pytest.raises(ValueError, match=f"^t={odd}: must be "):
            fraction.value("t", odd)
    several = TaskOption((1, 2), "", choices=(1, 2, 3))
    assert several.value("s", [3, 1]) == (3, 1)
    assert several.value("s", 2) == (2,)
    with pytest.raises(ValueError, match=r"^s=4: must be one of 1, 2, 3"):
        several.value("s", [1, 4])
    with pytest.raises(ValueError, match=r"^s: must hold one value at least"):
        several.value("s", [])


def test_two_tasks_with_one_option_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Task("other", toy, options={"k": TaskOption(3, "another k")})
    monkeypatch.setitem(TASKS, "other", other)
    with pytest.raises(TypeError, match=r"option k of other"):
        task_options()


@pytest.mark.parametrize("name", TASKS)
def test_an_entry_names_parameters_of_its_function(name: str) -> None:
    task = TASKS[name]
    code = task.measure.__code__  # type: ignore[attr-defined]
    parameters = code.co_varnames[: code.co_argcount]
    assert set(task.options) <= set(parameters)
    assert ("tasks" in parameters) == task.repeats


# ---- in training ----


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`test` and `train` with captions, labels in the field `kind`, and class names."""
    folder = tmp_path_factory.mktemp("tasks") / "pictures"
    write_pictures(folder / "test")
    write_pictures(folder / "train", 60)
    (folder / "classnames.txt").write_text("\n".join(SEEN))
    return folder


def entry(pictures: Path, task: str, **more: object) -> dict[str, object]:
    """A task of a run's config."""
    words = {"label": "kind", "classes": str(pictures / "classnames.txt")}
    train_shards = [str(pictures / "train")] if task in TASKS and TASKS[task].learns else []
    data = {"name": "pictures", "data": str(pictures / "test"), "train": train_shards}
    return {"task": task, **data, **words, **more}


def run_with(
    glyphs: Path, out: Path, entries: list[dict[str, object]], **changes: object
) -> list[dict[str, float]]:
    """A tiny run that evaluates these; returns the lines of its log."""
    tasks = {"evaluate.tasks": json.dumps(entries), "optim.pairs": 32 * 6, "optim.lr": 1e-2}
    assert train.main(config(glyphs, out, **tasks, **changes)) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


OPTIONS: dict[str, dict[str, object]] = {
    "knn": {"k": 3, "temperature": 0},
    "robustness": {"corruptions": ["fog"], "severities": 5},
    "top1": {"corruptions": ["fog"], "severities": [5]},
    "candidates": {"candidates": 4},
}


def test_training_measures_every_task_as_evaluate_does(
    glyphs: Path, pictures: Path, tmp_path: Path
) -> None:
    """The model in memory by the config's options, its checkpoint by the command's."""
    out = tmp_path / "run"
    entries = [entry(pictures, task, **OPTIONS.get(task, {})) for task in TASKS]
    last = run_with(glyphs, out, entries)[-1]
    in_training = cells(out / "eval")
    words = [out, "--data", pictures, "--label", "kind", "--out", tmp_path / "cells", "--k", 3]
    words += ["--temperature", 0, "--candidates", 4, "--corruptions", "fog", "--severities", 5]
    others = [task for task in TASKS if not TASKS[task].repeats]
    for tasks in (others, ["robustness"]):
        assert evaluate.main([*map(str, words), "--tasks", *tasks]) == 0
    measured = cells(tmp_path / "cells")
    assert set(measured) == {task.result_name for task in TASKS.values()}
    for name, cell in measured.items():
        for part in ("metrics", "chance", "counts"):
            assert in_training[name][part] == cell[part], (name, part)
    for task in TASKS.values():
        for metric, value in measured[task.result_name]["metrics"].items():
            assert last[task.log_name("pictures", metric)] == value
    assert (out / "eval" / "pictures_run_towers_en_calibration.png").exists()


def test_metrics_that_an_entry_lists_are_those_it_may_give(
    glyphs: Path, pictures: Path, tmp_path: Path
) -> None:
    names = [name for name, task in TASKS.items() if task.metrics]
    entries = [entry(pictures, task, **OPTIONS.get(task, {})) for task in names]
    run_with(glyphs, tmp_path / "run", entries)
    found = cells(tmp_path / "run" / "eval")
    for name in names:
        assert set(found[TASKS[name].result_name]["metrics"]) <= set(TASKS[name].metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "knm"}, "evaluate.tasks.0.task: no such task: 'knm'; did you mean knn?"),
        (
            {"candidate": 4},
            "evaluate.tasks.0: no such key or option of candidates: 'candidate'; "
            "did you mean candidates?",
        ),
        ({"candidates": 1}, "evaluate.tasks.0.candidates=1: must be at least 2"),
        ({"candidates": "many"}, "evaluate.tasks.0.candidates=many: must be of type int"),
        ({"task": "knn", "train": []}, "pictures: has no training images"),
        ({"data": "nowhere"}, "nowhere: no shards there"),
        ({"kind": "single"}, "evaluate.tasks.0.kind: "),
    ],
)
def test_a_wrong_task_ends_a_run_before_it_begins(
    changes: dict[str, object],
    message: str,
    glyphs: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        run_with(glyphs, tmp_path / "run", [{**entry(pictures, "candidates"), **changes}])
    assert left.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- a new task ----


def toy(view: DataView, factor: float = 1.0) -> Result:
    """The norm of the first image's feature, which is 1."""
    return Result(view.data.name, "toy", {"length": factor * float(view.images[0].norm())})


@pytest.fixture
def toy_task(monkeypatch: pytest.MonkeyPatch) -> Task:
    option = TaskOption(1.0, "multiplies the length", least=0)
    task = Task("toy", toy, options={"factor": option}, metrics=("length",))
    monkeypatch.setitem(TASKS, "toy", task)
    return task


def test_a_line_in_the_dict_makes_a_task(
    toy_task: Task, glyphs: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the parser, in training with its log and page, in a comparison, as a finished result."""
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "multiplies the length" in capsys.readouterr().out

    out = tmp_path / "run"
    lines = run_with(glyphs, out, [entry(pictures, "toy", factor=3)], **{"run.evaluate_every": 3})
    measured = [line["toy/pictures/length"] for line in lines if "toy/pictures/length" in line]
    assert measured == pytest.approx([3, 3])
    assert cells(out / "eval")["toy"]["metrics"] == {"length": pytest.approx(3)}
    assert report_page.main([str(out)]) == 0
    assert "length" in (out / "report.html").read_text()

    words = [str(out), "--data", str(pictures), "--out", str(tmp_path / "cells")]
    for factor in ("3", "3", "2"):
        assert evaluate.main([*words, "--tasks", "toy", "--factor", factor]) == 0
    assert capsys.readouterr().err.count("written to") == 2
    assert cells(tmp_path / "cells")["toy"]["metrics"] == {"length": pytest.approx(2)}


def test_a_comparison_may_ask_for_any_tasks_metrics(toy_task: Task) -> None:
    tasks = [{"task": name, "name": "set", "data": "x"} for name in ("toy", "robustness")]
    run = validated({"data": {"train": ["x"]}, "evaluate": {"tasks": tasks}})
    comparison = {"title": "t", "out": "x", "config": ["x.yaml"], "axes": {"a": {"b": {}}}}

    def asks_for(metric: str) -> None:
        budget = {"pairs": 10_000}
        tree = {**comparison, "budget": budget, "metrics": {"m": metric}}
        check_run(Comparison.model_validate(tree), run)

    asks_for("toy/set/length")
    asks_for("robustness/set/zero_shot_relative")
    with pytest.raises(ConfigError, match="'set/length' is not measured; there is toy/set/length"):
        asks_for("set/length")
