"""A comparison's grid, budgets and runs: what is run, once, and what becomes of runs that fail,
wait or are killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from clipsmall.compare import __main__ as compare
from clipsmall.compare.budgets import Budgets
from clipsmall.compare.grid import Comparison, grid_settings, load_comparison
from clipsmall.compare.launcher import training_environment
from clipsmall.compare.run_tables import tables_of_runs
from clipsmall.compare.runs import config_digest, make_run
from tests.shards_for_tests import write_glyphs

# Stands in for the trainer: leaves what a run leaves, in no time. Its recall is best at lr 2e-3 and
# for large batches.
TRAINER = """
import json, pathlib, signal, sys, time, yaml
words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
out, given = pathlib.Path(words["out"]), yaml.safe_load(open(words["config"]))
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(out.name + "\\n")
(out / "run.yaml").touch()
objective = given.get("objective", {}).get("name", "softmax")
batch, lr = given["data"]["batch_size"], given["optim"].get("lr", 1e-3)
if objective == "dcl" and not (here / "mended").exists():
    print("error: <b>no such shard</b>"); sys.exit(2)
if (here / "queue").exists():
    sys.exit(0)
def stop(*_):
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
while (here / "slow").exists():
    time.sleep(0.02)
steps = given["optim"]["pairs"] // batch
seed = given["seed"] % 1000
rate = 50 * batch + seed
recall = 0.5 - abs(lr - 2e-3) * 10 + batch / 1000 + seed / 10_000
lines = [{"step": step, "pairs": step * batch, "loss": 1 / step, "logit_scale": 10.0 + step,
          "logit_bias": 0.0, "pairs_per_second": rate, "skipped": 2}
         for step in range(1, steps + 1)]
if given.get("evaluate", {}).get("retrieval"):
    lines.append({"step": steps, "pairs": steps * batch, "test/image_retrieval_recall@1": recall,
                  "test/image_retrieval_recall@5": 1 - recall})
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
saved = out / "checkpoints" / f"step_{steps:08d}"
saved.mkdir(parents=True)
(saved / "manifest.json").touch()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config on small shards."""
    folder = tmp_path_factory.mktemp("base")
    write_glyphs(folder)
    tree = {
        "data": {"train": [str(folder / "train")], "workers": 0},
        "model": {"name": str(folder / "towers.json")},
        "run": {"log_every": 5},
        "evaluate": {"retrieval": [{"name": "test", "data": [str(folder / "test")]}]},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    return folder / "base.yaml"


@pytest.fixture
def grid(base: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return {
        "title": "Two <objectives>",
        "out": str(tmp_path / "out"),
        "config": str(base),
        "axes": {"objective": ["softmax", "sigmoid"], "batch_size": [8, 16]},
        "seeds": [0, 1],
        "budget": {"pairs": 640},
        "metrics": {"recall@1": "test/image_retrieval_recall@1"},
        "launch": f"{sys.executable} {tmp_path / 'trainer.py'}",
    }


def written(grid: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return str(path)


def made(grid: dict[str, Any], tmp_path: Path) -> Comparison:
    return load_comparison(written(grid, tmp_path))


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().split() if path.exists() else []


def table(grid: dict[str, Any], tmp_path: Path) -> pd.DataFrame:
    comparison = made(grid, tmp_path)
    return tables_of_runs(comparison, Budgets(comparison).cells())[0]


def test_a_grid_is_the_product_of_its_axes(grid: dict[str, Any], tmp_path: Path) -> None:
    grid["axes"] = {
        "objective": {
            "softmax": None,
            "mixed": {"objective": {"softmax": 1, "vicreg": 0.1}},
            "moco": {"objective.queue": "moco"},
        },
        "batch_size": [8, 16],
        "trick": {
            "none": {},
            "mined": {
                "mining": {"method": "groups"},
                "mining.group": 4,
                "optim": {"pairs": 320, "warmup_pairs": 7},
            },
        },
    }
    grid["common"] = {"optim.lr": 0.5, "optim": {"clip": 2.0}}
    found = grid_settings(made(grid, tmp_path))
    assert len(found) == 12
    assert Budgets(made(grid, tmp_path)).pairs_of(found[0]) == 640
    assert found[0].title == "softmax, 8, none"
    assert found[-1].levels == {"objective": "moco", "batch_size": "16", "trick": "mined"}
    assert found[-1].tree["mining"] == {"method": "groups", "group": 4}
    assert found[-1].tree["data"]["batch_size"] == 16
    assert found[-1].tree["optim"] == {"lr": 0.5, "clip": 2.0, "pairs": 320, "warmup_pairs": 7}
    budgets = Budgets(made(grid, tmp_path))
    # the grid's own word
    assert budgets.pairs_of(found[-1]) == 320
    warmups = [cell.runs[0].config.optim.warmup_pairs for cell in budgets.cells()]
    assert (warmups[0], warmups[-1]) == (32, 7)
    assert (
        made(grid, tmp_path).budget_words
        == "640 pairs per run, where the grid does not say otherwise"
    )
    assert found[4].tree["objective"] == {"name": {"softmax": 1, "vicreg": 0.1}}
    assert found[-1].tree["objective"] == {"queue": "moco"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": {"objective": ["softmax", "sofmax"]}}, "sofmax: objective"),
        ({"axes": {"batchsize": [8]}}, "batchsize: no such key; did you mean data.batch_size?"),
        ({"axes": {}}, "axes"),
        ({"axes": {"objective": {"softmax": 3}}}, "must hold `section.field: value`, not 3"),
        (
            {"axes": {"objective": [{"softmax": 1}]}},
            "needs a name, as in objective: {NAME: {section.field: value}}",
        ),
        ({"axes": {"trick": {"none": {}, "no more": None}}}, "no more: trains the same as none"),
        (
            {"axes": {"trick": {"late": {"seed": 7}}}},
            "trick=late sets seed, which the comparison sets",
        ),
        (
            {
                "axes": {"trick": {"fast": {"optim.lr": 7}}},
                "lr": {"values": [1e-3, 2e-3], "pairs": 64},
            },
            "trick=fast sets optim.lr, and `lr` would try others",
        ),
        ({"lr": {"values": [1e-3, 0], "pairs": 64}}, "lr.values"),
        ({"lr": {"values": [1e-3, 2e-3], "pairs": 64, "seed": 1}}, "lr.seed=1 is one of seeds"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"launch": "sbatch 'launch"}, "No closing quotation"),
        ({"metrics": {"r": "test/acc1"}}, "there is test/image_retrieval_recall@1"),
        (
            {"baseline": {"objective": "dcl"}},
            "baseline: objective=dcl is not in the grid; there is softmax",
        ),
        ({"baseline": {"size": "8"}}, "there is objective, batch_size"),
        (
            {"lr": {"values": [1e-3, 2e-3], "pairs": 64, "at": {"batch_size": 4}}},
            "lr.at: batch_size=4",
        ),
        (
            {"lr": {"values": [1e-3, 2e-3], "pairs": 64, "metric": "acc1"}},
            "lr.metric=acc1 is not a metric here",
        ),
        ({"budget": {"pairs": 64, "seconds": 3}}, "either pairs (equal samples) or seconds"),
        ({"budget": {}}, "either pairs"),
        (
            {"budget": {"pairs": 15}},
            "softmax, 16: 15 pairs (budget.pairs, lr.pairs) are less than one batch of 16",
        ),
        (
            {"axes": {"pairs": {"few": {"optim.pairs": 64}}}},
            "'pairs' is a column of the table already",
        ),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"seed": [1]}, "seed: no such key; did you mean seeds?"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: No such file"),
    ],
)
def test_a_wrong_grid_is_refused_with_its_file_and_nothing_written(
    grid: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        compare.main([written(grid | changes, tmp_path)])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert "grid.yaml" in said or "config" in changes
    assert not (tmp_path / "out").exists()


def test_a_run_is_known_by_what_it_learns_from(grid: dict[str, Any], tmp_path: Path) -> None:
    setting = grid_settings(made(grid, tmp_path))[0]
    folder = make_run("out", setting, 0, []).folder
    assert folder.parent == Path("out/runs")
    assert folder.name == f"softmax-8-s0-{config_digest(setting.tree | {'seed': 0})}"
    assert (
        make_run("out", setting, 0, [{"run": {"log_every": 7}, "data": {"workers": 3}}]).folder
        == folder
    )
    for changes in (
        {"run": {"precision": "bf16"}},
        {"optim": {"lr": 0.1}},
        {"data": {"crop_scale": 0.5}},
        {"evaluate": {"retrieval": []}},
    ):
        assert make_run("out", setting, 0, [changes]).folder != folder


def test_every_run_is_made_once(grid: dict[str, Any], tmp_path: Path) -> None:
    path = written(grid, tmp_path)
    assert compare.main([path, "--tell"]) == 1
    assert not calls(tmp_path)
    assert (
        compare.main([path, "--only", "objective=softmax", "batch_size=8,16", "--seeds", "1"]) == 1
    )
    assert [name[:13] for name in calls(tmp_path)] == ["softmax-8-s1-", "softmax-16-s1"]
    assert compare.main([path, "--jobs", "3"]) == 0
    assert compare.main([path]) == 0
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 8
    found = table(grid, tmp_path)
    assert found["state"].eq("done").all()
    row = found[
        (found["objective"] == "sigmoid") & (found["batch_size"] == "16") & (found["seed"] == 1)
    ].iloc[0]
    assert row["recall@1"] == pytest.approx(0.5 - 0.01 + 0.016 + 1e-4)
    assert (row["pairs"], row["steps"], row["lr"], row["logit_scale"], row["skipped"]) == (
        640,
        40,
        1e-3,
        50,
        2,
    )
    assert row["seconds"] == pytest.approx(640 / 801)
    assert row["memory"] > 0
    saved = pd.read_parquet(tmp_path / "out" / "runs.parquet")
    pd.testing.assert_frame_equal(saved, found, check_dtype=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "7"], "--seeds 7: not a seed of this grid; there is [0, 1]"),
        (
            ["--only", "objective=dcl"],
            "there is no objective=dcl in this grid; there is softmax, sigmoid",
        ),
        (["--only", "size=8"], "there is objective, batch_size"),
        (["--jobs", "0"], "--jobs=0: at least one"),
    ],
)
def test_what_is_not_in_the_grid_cannot_be_picked(
    grid: dict[str, Any],
    tmp_path: Path,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # told before anything is tried
    grid["lr"] = {"values": [1e-3, 2e-3], "pairs": 64}
    with pytest.raises(SystemExit) as left:
        compare.main([written(grid, tmp_path), *words])
    assert left.value.code == 2
    assert told in capsys.readouterr().err
    assert not calls(tmp_path)


def test_a_command_that_is_not_there_is_told(
    grid: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid["launch"] = "/nowhere/launcher"
    with pytest.raises(SystemExit) as left:
        compare.main([written(grid, tmp_path)])
    assert left.value.code == 2
    assert "/nowhere/launcher" in capsys.readouterr().err


def test_a_failing_run_is_told_and_only_made_again_when_asked(
    grid: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid["axes"]["objective"] = ["softmax", "dcl"]
    path = written(grid, tmp_path)
    assert compare.main([path]) == 1
    assert "dcl, 8, seed 0: failed" in capsys.readouterr().err
    found = table(grid, tmp_path)
    assert found[found["objective"] == "dcl"]["error"].unique().tolist() == [
        "error: <b>no such shard</b>"
    ]
    assert found["state"].value_counts().to_dict() == {"done": 4, "failed": 4}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;b&gt;no such shard" in page
    assert "<b>no such shard" not in page
    assert compare.main([path]) == 1
    assert len(calls(tmp_path)) == 8
    (tmp_path / "mended").touch()
    assert compare.main([path, "--again"]) == 0
    assert len(calls(tmp_path)) == 12
    assert table(grid, tmp_path)["error"].eq("").all()


def test_runs_handed_to_a_queue_are_waited_for_not_handed_over_again(
    grid: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "queue").touch()
    path = written(grid, tmp_path)
    assert compare.main([path]) == 1
    assert table(grid, tmp_path)["state"].eq("submitted").all()
    assert compare.main([path]) == 1
    assert len(calls(tmp_path)) == 8
    (tmp_path / "queue").unlink()
    comparison = made(grid, tmp_path)
    for cell in Budgets(comparison).cells():
        # the queue's turn
        for run in cell.runs:
            words = [f"--config={run.folder / 'given.yaml'}", f"--out={run.folder}"]
            subprocess.run([*comparison.launch.split(), *words], check=True)
    assert compare.main([path]) == 0


def test_what_lies_broken_in_a_folder_stops_no_other_run(
    grid: dict[str, Any], tmp_path: Path
) -> None:
    path = written(grid, tmp_path)
    assert compare.main([path]) == 0
    runs = [run for cell in Budgets(made(grid, tmp_path)).cells() for run in cell.runs]
    with runs[0].files.metrics.open("ab") as log:
        # the disk was full
        log.write(b'{"step": 41, "test/image_retr\xff')
    (runs[1].folder / "failed.json").touch()
    runs[1].files.metrics.unlink()
    found = table(grid, tmp_path)
    assert found["state"].value_counts().to_dict() == {"done": 7, "failed": 1}
    assert "log.txt" in found[found["state"] == "failed"]["error"].iloc[0]
    assert compare.main([path, "--again"]) == 0


def test_a_disk_without_locks_is_no_reason_to_wait(
    grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("clipsmall.storage.locks.fcntl.flock", refuses)
    assert compare.main([written(grid, tmp_path)]) == 0


def test_trials_in_a_queue_are_told_as_what_is_waited_for(
    grid: dict[str, Any], tmp_path: Path
) -> None:
    grid["lr"] = {"values": [1e-3, 2e-3], "pairs": 160, "at": {"batch_size": 16}}
    (tmp_path / "queue").touch()
    assert compare.main([written(grid, tmp_path)]) == 1
    found = table(grid, tmp_path)
    assert found["state"].eq("missing").all()
    assert found["error"].eq("waits for trials of its learning rate or speed: 2 submitted").all()


def test_a_run_that_was_stopped_through_a_launcher_has_not_failed(
    grid: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "launcher.py").write_text(
        "import pathlib, sys\nout = [w for w in sys.argv if w.startswith('--out=')][0][6:]\n"
        "(pathlib.Path(out) / 'run.yaml').touch()\n"
        "print('stopped; continue with --resume=auto')\nsys.exit(1)\n"
    )
    grid["launch"] = f"{sys.executable} {tmp_path / 'launcher.py'}"
    assert compare.main([written(grid, tmp_path)]) == 1
    assert table(grid, tmp_path)["state"].eq("begun").all()


def test_two_grids_do_not_share_a_folder(
    grid: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(grid, tmp_path)
    with pytest.raises(SystemExit):
        compare.main([path, path, "--tell"])
    assert "two of the grids write to" in capsys.readouterr().err


def test_rates_are_tuned_on_a_seed_of_their_own(grid: dict[str, Any], tmp_path: Path) -> None:
    grid["lr"] = {"values": [1e-3, 2e-3, 4e-3], "pairs": 160, "at": {"batch_size": 16}}
    comparison = made(grid, tmp_path)
    # not before their rates are known
    assert not any(cell.runs for cell in Budgets(comparison).cells())
    assert compare.main([written(grid, tmp_path)]) == 0
    tried = Budgets(comparison).rate_trials(grid_settings(comparison))
    assert len(tried) == 6
    assert {(run.seed, run.config.data.batch_size, run.config.optim.pairs) for run in tried} == {
        (1000, 16, 160)
    }
    assert table(grid, tmp_path)["lr"].unique().tolist() == [2e-3]
    assert Budgets(comparison).rates_at_the_edge() == []
    # softmax at 2e-3
    lines = tried[1].files.metrics.read_text()
    tried[1].files.metrics.write_text(lines.replace("0.516", "null"))
    rates = [Budgets(comparison).learning_rate(setting) for setting in grid_settings(comparison)]
    # a metric that is no number wins nothing
    assert rates == [1e-3, 1e-3, 2e-3, 2e-3]
    tried[1].files.metrics.write_text(lines)
    grid["metrics"]["recall@5"], grid["lr"]["metric"] = "test/image_retrieval_recall@5", "recall@5"
    asked = Budgets(made(grid, tmp_path))
    # where the stand-in's is highest
    assert [asked.learning_rate(setting) for setting in asked.settings] == [4e-3] * 4
    del grid["lr"]["metric"]
    grid["lr"]["values"] = [2e-3, 4e-3]
    assert compare.main([written(grid, tmp_path)]) == 0
    # another grid of rates: the same trials, the same runs
    assert len(calls(tmp_path)) == 14
    assert Budgets(made(grid, tmp_path)).rates_at_the_edge() == ["softmax: 0.002", "sigmoid: 0.002"]


def test_where_no_rate_can_be_tried_nothing_is_run(grid: dict[str, Any], tmp_path: Path) -> None:
    grid["axes"]["objective"] = ["dcl", "softmax"]
    grid["lr"] = {"values": [1e-3, 2e-3], "pairs": 160, "at": {"batch_size": 16}}
    assert compare.main([written(grid, tmp_path)]) == 1
    found = table(grid, tmp_path)
    assert found[found["objective"] == "dcl"]["state"].eq("failed").all()
    assert (
        found[found["objective"] == "dcl"]["error"]
        .str.contains("could not be tried: error: <b>no such shard")
        .all()
    )
    assert found[found["objective"] == "softmax"]["state"].eq("done").all()


def test_equal_time_gives_each_setting_the_pairs_that_its_speed_allows(
    grid: dict[str, Any], tmp_path: Path
) -> None:
    grid["budget"] = {"seconds": 3.01, "trial": 320}
    assert compare.main([written(grid, tmp_path)]) == 0
    found = table(grid, tmp_path)
    assert found.groupby("batch_size")["pairs"].unique().map(list).to_dict() == {
        "8": [1200.0],
        "16": [2400.0],
    }
    # a trial for a setting, not for a seed
    assert len(calls(tmp_path)) == 4 + 8
    assert found["seconds"].between(2.9, 3.1).all()


def test_equal_memory_gives_each_setting_its_largest_batch(
    grid: dict[str, Any], tmp_path: Path
) -> None:
    grid["axes"]["batch_size"], grid["budget"] = [8, 256, 1024], {"pairs": 2048}
    needs = table(grid, tmp_path).groupby("batch_size")["memory"].max()
    assert needs["8"] < needs["256"] < needs["1024"]
    grid["budget"] = {"pairs": 2048, "memory": float(needs["256"]) * 1.01}
    assert compare.main([written(grid, tmp_path)]) == 0
    found = table(grid, tmp_path)
    assert found["batch_size"].unique().tolist() == ["256"]
    summary = pd.read_parquet(tmp_path / "out" / "summary.parquet")
    # what was left out on purpose is not missing
    assert summary["n"].tolist() == [2, 2]
    tests = pd.read_parquet(tmp_path / "out" / "contrasts.parquet")
    assert tests[["objective", "difference"]].to_numpy().tolist() == [["sigmoid", pytest.approx(0)]]
    grid["axes"]["batch_size"] = {8: {"data.batch_size": 8}, 1024: {"data.batch_size": 1024}}
    grid["axes"]["objective"] = {"softmax": {}, "chunked": {"model.chunk_size": 8}}
    most = table(grid | {"budget": {"pairs": 2048}}, tmp_path).groupby("objective")["memory"].max()
    grid["budget"]["memory"] = float(most.mean())
    assert compare.main([written(grid, tmp_path)]) == 0
    # rivals of different batches
    tests = pd.read_parquet(tmp_path / "out" / "contrasts.parquet")
    assert tests[["objective", "batch_size"]].to_numpy().tolist() == [["chunked", "1024"]]
    assert tests["difference"].tolist() == [pytest.approx(1.016)]
    grid["axes"] = {"objective": ["softmax", "sigmoid"], "batch_size": [8, 256, 1024]}
    grid["budget"]["memory"] = float(needs["8"]) / 2
    assert compare.main([written(grid, tmp_path)]) == 0
    found = table(grid, tmp_path)
    assert found["state"].eq("unfit").all()
    assert found["batch_size"].unique().tolist() == ["8"]
    assert len(calls(tmp_path)) == 8


def start(path: str, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "clipsmall.compare", path, *more],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def until(condition: Any) -> None:
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def test_stopped_and_killed_it_goes_on_where_it_was(grid: dict[str, Any], tmp_path: Path) -> None:
    path = written(grid, tmp_path)
    (tmp_path / "slow").touch()
    first = start(path, "--jobs", "2")
    until(lambda: len(calls(tmp_path)) == 2)
    first.send_signal(signal.SIGTERM)
    assert "stopped; run the same command to continue" in first.communicate()[1]
    assert first.returncode == 128 + signal.SIGTERM
    # the runs were stopped, too
    assert set(table(grid, tmp_path)["state"]) == {"begun", "missing"}

    second = start(path)
    until(lambda: len(calls(tmp_path)) == 3)
    # what it started goes on alone
    second.kill()
    second.wait()
    assert table(grid, tmp_path)["state"].value_counts()["running"] == 1
    third = start(path, "--seeds", "1")
    until(lambda: len(calls(tmp_path)) == 4)
    (tmp_path / "slow").unlink()
    third.wait()
    until(lambda: "running" not in set(table(grid, tmp_path)["state"]))
    assert compare.main([path]) == 0
    assert len(set(calls(tmp_path))) == 8
    # the two that were stopped, begun again
    assert len(calls(tmp_path)) == 8 + 2


def test_two_commands_share_the_work(grid: dict[str, Any], tmp_path: Path) -> None:
    path = written(grid, tmp_path)
    both = [start(path), start(path)]
    for each in both:
        each.communicate()
    assert compare.main([path]) == 0
    assert sorted(calls(tmp_path)) == sorted(set(calls(tmp_path)))


def test_trials_of_another_command_are_waited_for(grid: dict[str, Any], tmp_path: Path) -> None:
    grid["lr"] = {
        "values": [1e-3, 2e-3],
        "pairs": 160,
        "at": {"batch_size": 16, "objective": "softmax"},
    }
    path = written(grid, tmp_path)
    (tmp_path / "slow").touch()
    first = start(path, "--jobs", "2")
    until(lambda: len(calls(tmp_path)) == 2)
    # its trials go on alone
    first.kill()
    second = start(path)
    assert second.stderr is not None
    until(lambda: "waiting" in str(second.stderr and second.stderr.readline()))
    (tmp_path / "slow").unlink()
    second.communicate()
    assert second.returncode == 0
    assert len(calls(tmp_path)) == 2 + 8


def test_folders_of_a_former_grid_are_listed(
    grid: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([written(grid, tmp_path)]) == 0
    grid["axes"]["batch_size"] = [8, 32]
    capsys.readouterr()
    assert compare.main([written(grid, tmp_path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["done", "done", "missing", "missing"] * 2 + [
        "former"
    ] * 4
    assert all("-16-s" in line for line in lines[8:])


def test_real_runs(grid: dict[str, Any], tmp_path: Path) -> None:
    """The trainer itself, with a setting that only fails once it runs, up to the page."""
    grid |= {"launch": "", "seeds": [0], "curve": 2, "budget": {"pairs": 320}}
    grid["axes"] = {
        "objective": {
            "softmax": {},
            "missing words": {"model.name": str(tmp_path / "nowhere.json")},
            "sigmoid": {"objective": "sigmoid"},
        },
        "batch_size": [16],
    }
    assert compare.main([written(grid, tmp_path), "--jobs", "3"]) == 1
    found = table(grid, tmp_path)
    assert found["state"].tolist() == ["done", "failed", "done"]
    assert "nowhere.json" in found["error"][1]
    for row in found[found["state"] == "done"].itertuples():
        lines = [
            json.loads(line)
            for line in (Path(row.folder) / "metrics.jsonl").read_text().splitlines()
        ]
        measured = [line for line in lines if "loss" not in line]
        assert [line["step"] for line in measured] == [10, 20]
        assert found.loc[row.Index, "recall@1"] == measured[-1]["test/image_retrieval_recall@1"]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "nowhere.json" in page
    assert "data:image/svg+xml" in page or "data:image/png" in page


def test_a_run_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert training_environment(10_000, "")["OMP_NUM_THREADS"] == "1"
    assert training_environment(1, "")["OMP_NUM_THREADS"] == str(os.cpu_count())
    assert "OMP_NUM_THREADS" not in training_environment(1, "torchrun")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert training_environment(1, "")["OMP_NUM_THREADS"] == "7"
