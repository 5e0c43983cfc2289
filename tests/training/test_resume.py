"""Killed and resumed = uninterrupted, bit for bit: weights, optimizer, generators, sample ids, log.

Seen to fail when: the loader starts one batch late; RNG is not restored; the scheduler is left out;
metrics.jsonl is not cut back; a checkpoint is renamed before its manifest is written.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipsmall import train
from clipsmall.build import run as build
from clipsmall.config.reader import read
from clipsmall.distributed import world
from clipsmall.objectives import OBJECTIVES, ObjectiveSpec
from clipsmall.objectives.softmax import softmax
from clipsmall.storage import checkpoint
from clipsmall.storage.checkpoint import CheckpointError
from clipsmall.storage.run_folder import RunFolder
from tests import ROOT
from tests.distributed.test_world import run_trainer
from tests.shards_for_tests import config


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def last(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step_*"))[-1]


def same_state(a: Path, b: Path, exact: bool = True) -> None:
    """All tensors equal to the bit, and all JSON state but the config's `out` and `resume`."""
    for name in ("model", "optimizer", "objective"):
        left, right = (checkpoint.read_tensors(folder, name) for folder in (a, b))
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), key
    states = [checkpoint.read_state(folder) for folder in (a, b)]
    for state in states:
        del state["config"]
    assert states[0] == states[1]


def run(words: list[str]) -> int:
    return train.main(words)


@pytest.fixture(scope="module")
def whole(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 24 steps that saves every 5."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(config(glyphs, out, **{"data.crop_scale": 0.8})) == 0
    return out


@pytest.mark.parametrize(
    "step",
    [5, 10, 15],
    # an epoch has 9 batches: mid-epoch, just after one, mid-epoch
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(
    glyphs: Path, whole: Path, tmp_path: Path, step: int, workers: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    changes = {"data.crop_scale": 0.8, "resume": "auto", "data.workers": workers}
    assert run(config(glyphs, out, **changes)) == 0
    assert losses(out) == losses(whole)
    same_state(last(out), last(whole))


# every objective that remembers something, in the memory or in a head
MEMORIES = {
    "bce": "{bce: {mode: warmup}}",
    "vse++": "{triplet: {warmup: 0.5}}",
    "gcl": "{gcl: {variant: isogclr}}",
    "nn": "{nn: {size: 100, start: 40}}",
    "swav": "{swav: {prototypes: 20, queue: 50, freeze_steps: 5}}",
    "byol": "{}",
    "sinkhorn_targets": "{}",
    "{softmax: 1, superclass: 0.2, gcl: 0.5}": "{}",
    "softmax": "{queue: moco, moco: {size: 100, alpha: 0.3}}",
    "{dcl: 1, sinkhorn: 0.5}": "{queue: xbm, xbm: {size: 50}}",
}


@pytest.mark.parametrize("name", MEMORIES)
def test_what_an_objective_remembers_is_resumed(glyphs: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    folder = tmp_path / "options.yaml"
    folder.write_text(f"objective: {MEMORIES[name]}\n")
    words = [
        "--config",
        str(folder),
        *config(glyphs, out, **{"optim.pairs": 32 * 12, "objective.name": name}),
    ]
    assert run(words) == 0
    straight = tmp_path / "straight"
    shutil.copytree(out, straight)
    for step in (10, 12):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08}")
    assert run([*words, "--resume=auto"]) == 0
    assert losses(out) == losses(straight)
    same_state(last(out), last(straight))


def test_options_newer_than_a_checkpoint_have_no_say(glyphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(config(glyphs, out, **{"optim.pairs": 32 * 5})) == 0
    folder = out / "checkpoints/step_00000005"
    state = json.loads((folder / "state.json").read_text())
    del state["config"]["tune"], state["config"]["optim"]["layer_decay"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "state.json").read_bytes()
    manifest["files"]["state.json"] = {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run([*config(glyphs, out, **{"optim.pairs": 32 * 10}), "--resume=auto"]) == 0
    assert len(losses(out)) == 10


def test_another_memory_is_refused(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = config(
        glyphs, out, **{"optim.pairs": 32 * 12, "objective.name": "nn", "objective.nn.size": 50}
    )
    assert run(words) == 0
    for changed, said in (
        ("--objective.nn.size=60", "another run: objective.nn.size was 50, now 60"),
        ("--objective={nn: 1, softmax: 1}", "another run: objective.name"),
        ("--objective.mask_duplicates=false", "another run: objective.mask_duplicates was True"),
    ):
        with pytest.raises(SystemExit):
            run([*words, "--optim.pairs=640", "--resume=auto", changed])
        assert said in capsys.readouterr().err


def test_random_numbers_go_on_where_they_were(
    glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An objective that draws from every generator, as dropout does."""

    def noisy(rows: Any, columns: Any, **options: Any) -> dict[str, torch.Tensor]:
        drawn = random.random() + np.random.rand()
        image = torch.nn.functional.dropout(rows.image, 0.2) * (1 + 0.01 * drawn)
        return softmax(rows._replace(image=image), columns, **options)

    monkeypatch.setitem(OBJECTIVES, "softmax", ObjectiveSpec(noisy, "softmax"))
    out = tmp_path / "run"
    assert run(config(glyphs, out, **{"optim.pairs": 32 * 12})) == 0
    straight = losses(out)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    shutil.rmtree(out / "checkpoints" / "step_00000010")
    # whatever happened in between
    torch.rand(7)
    assert run(config(glyphs, out, **{"optim.pairs": 32 * 12, "resume": "auto"})) == 0
    assert losses(out) == straight


def test_an_earlier_checkpoint_named_sets_later_ones_aside(
    whole: Path, glyphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    words = {
        "data.crop_scale": 0.8,
        "resume": str(out / "checkpoints" / "step_00000010"),
        "run.keep_checkpoints": 2,
    }
    assert run(config(glyphs, out, **words)) == 0
    assert losses(out) == losses(whole)
    kept = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert [name for name in kept if name.startswith("step_")] == ["step_00000020", "step_00000024"]
    assert len([name for name in kept if name.startswith("aside_step_")]) == 3


def command(words: list[str], ranks: int = 0) -> list[str]:
    python = [sys.executable]
    if ranks:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*python, str(ROOT / "clipsmall" / "train.py"), *words]


def start(words: list[str], ranks: int = 0, session: bool = False) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("WORLD_SIZE", None)
    return subprocess.Popen(
        command(words, ranks),
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=session,
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.time() + 90
    while time.time() < deadline:
        if (out / "metrics.jsonl").exists() and any(s >= step for s, _ in losses_so_far(out)):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    raise AssertionError("the run did not get so far")


def losses_so_far(out: Path) -> list[tuple[int, float]]:
    try:
        return losses(out)
    except json.JSONDecodeError:
        # a line being written
        return []


LONG = {"optim.pairs": 32 * 400, "run.checkpoint_every": 50}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_continues_as_if_nothing_had_been(
    glyphs: Path, tmp_path: Path, number: signal.Signals
) -> None:
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    assert run(config(glyphs, straight, **LONG)) == 0
    process = start(config(glyphs, killed, **LONG, **{"data.workers": 1}))
    wait_for_step(killed, 60, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=180)
    assert process.returncode == (143 if number == signal.SIGTERM else -9), said
    saved = int(last(killed).name[5:])
    assert 50 <= saved < 400
    if number == signal.SIGTERM:
        assert "continue with --resume=auto" in said
        # nothing lost
        assert saved == losses(killed)[-1][0]
    assert run(config(glyphs, killed, **LONG, **{"resume": "auto"})) == 0
    assert losses(killed) == losses(straight)
    same_state(last(killed), last(straight))


def test_workers_outlive_a_signal_to_the_whole_group(glyphs: Path, tmp_path: Path) -> None:
    """SLURM, `timeout` and Ctrl-C signal every process at once; the trainer still finishes its step
    and saves.
    """
    out = tmp_path / "run"
    words = config(glyphs, out, **{"optim.pairs": 32 * 4000, "data.workers": 2})
    process = start(words, session=True)
    wait_for_step(out, 20, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 143, said
    assert "continue with --resume=auto" in said
    assert int(last(out).name[5:]) == losses(out)[-1][0]


HOLDS = """
import torch
from clipsmall.data import batch_loader

class Slow(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return number

loader = iter(batch_loader(Slow(), range(10**6), workers=1))
next(loader)
held = [loader]  # as a traceback would hold it: at exit its worker is sent SIGTERM, and waited for
raise SystemExit(3)
"""


def test_a_worker_leaves_with_its_trainer_and_does_not_hold_its_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3, done.stderr


def test_two_ranks_log_the_curve_of_one_and_resume_as_one(
    glyphs: Path, whole: Path, tmp_path: Path
) -> None:
    """torchrun on CPU, no environment set by the user; then 2 ranks -> 1 mid-epoch: same order,
    same curve.
    """
    out = tmp_path / "two"
    process = start(config(glyphs, out, **{"data.crop_scale": 0.8}), ranks=2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    for (_, mine), (_, theirs) in zip(losses(out), losses(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name[5:]) > 15:
            shutil.rmtree(folder)
    assert run(config(glyphs, out, **{"data.crop_scale": 0.8, "resume": "auto"})) == 0
    assert [step for step, _ in losses(out)] == list(range(1, 25))
    for (_, mine), (_, theirs) in zip(losses(out), losses(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_queue_goes_from_two_ranks_to_one(ranks: Any, glyphs: Path, tmp_path: Path) -> None:
    changes = {"objective.queue": "moco", "objective.moco.size": 100, "optim.pairs": 32 * 12}
    straight = tmp_path / "one"
    out = tmp_path / "two"
    assert run(config(glyphs, straight, **changes)) == 0
    assert ranks(2, run_trainer, config(glyphs, out, **changes)) == [0, 0]
    for step in (10, 12):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08}")
    kept = checkpoint.read_tensors(last(out), "objective")
    assert kept["past.seen"] == 5 * 32
    assert run(config(glyphs, out, **changes, resume="auto")) == 0
    for (_, mine), (_, theirs) in zip(losses(out), losses(straight), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    left, right = (checkpoint.read_tensors(last(folder), "objective") for folder in (out, straight))
    for key, value in right.items():
        torch.testing.assert_close(
            left[key], value, rtol=0, atol=0 if value.dtype == torch.int64 else 1e-4
        )


def test_sigterm_to_one_rank_stops_all_at_the_same_step(glyphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(config(glyphs, out, **{"optim.pairs": 32 * 4000}), ranks=2)
    wait_for_step(out, 5, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    assert "continue with --resume=auto" in said
    assert int(last(out).name[5:]) == losses(out)[-1][0]
    checkpoint.verify(last(out))


# ---- the checkpoint itself ----


def broken(whole: Path, tmp_path: Path, how: str) -> Path:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    folder = last(out)
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "bit":
        data = bytearray(weights.read_bytes())
        data[-9] ^= 1
        weights.write_bytes(data)
    elif how == "file":
        weights.unlink()
    elif how == "manifest":
        (folder / "manifest.json").unlink()
    return out


@pytest.mark.parametrize("how", ["cut", "bit", "file", "manifest"])
def test_a_broken_checkpoint_is_named_and_auto_falls_back(
    whole: Path, glyphs: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = broken(whole, tmp_path, how)
    with pytest.raises(SystemExit) as left:
        run(
            config(glyphs, tmp_path / "other", **{"data.crop_scale": 0.8, "resume": str(last(out))})
        )
    assert left.value.code == 2
    assert "step_00000024" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert checkpoint.newest(out / "checkpoints") == out / "checkpoints" / "step_00000020"
    assert run(config(glyphs, out, **{"data.crop_scale": 0.8, "resume": "auto"})) == 0
    assert "falling back" in capsys.readouterr().err
    same_state(last(out), last(whole))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"optim.lr": 1e-4}, "optim.lr was 0.003, now 0.0001"),
        ({"data.batch_size": 16}, "data.batch_size was 32, now 16"),
        ({"objective.name": "sigmoid"}, "objective.name was 'softmax'"),
        ({"data.train": "[TEST]"}, "data.train or data.plan has changed"),
    ],
)
def test_another_run_is_not_continued(
    whole: Path,
    glyphs: Path,
    tmp_path: Path,
    change: dict[str, Any],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change = {
        key: str(value).replace("TEST", str(glyphs / "test")) if value == "[TEST]" else value
        for key, value in change.items()
    }
    with pytest.raises(SystemExit) as left:
        run(
            config(
                glyphs,
                tmp_path / "new",
                **{"data.crop_scale": 0.8, "resume": str(last(whole)), **change},
            )
        )
    assert left.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_used_folder_is_not_overwritten(
    whole: Path, glyphs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as left:
        run(config(glyphs, whole))
    assert left.value.code == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    first = RunFolder(str(tmp_path / "run"))
    second = RunFolder(str(tmp_path / "run"))
    first.claim("seed: 0\n", 0, {})
    with pytest.raises(ValueError, match="another run is writing"):
        second.claim("seed: 1\n", 0, {})
    assert (tmp_path / "run" / "run.yaml").read_text() == "seed: 0\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(str(tmp_path / "file" / "run")).claim("", 0, {})


STAGES = """
import os, sys
from pathlib import Path
import torch
from clipsmall.storage import checkpoint
stage, folder = sys.argv[1], Path(sys.argv[2])
def die(*_):
    os.kill(os.getpid(), 9)
def extra(path):
    (path / "towers.json").write_text("{}")
    if stage == "files": die()
if stage == "manifest": checkpoint._digest = die
if stage == "rename": os.replace = die
checkpoint.save(folder / "step_00000002", {"model": {"w": torch.ones(9)}}, {}, extra)
"""


def test_where_no_checkpoint_can_be_used_nothing_is_begun_anew(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main(config(glyphs, out)) == 0
    log = (out / "metrics.jsonl").read_text()
    for manifest in out.glob("checkpoints/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"version": ', '"version": 99'))
    with pytest.raises(SystemExit) as left:
        train.main([*config(glyphs, out), "--resume=auto"])
    assert left.value.code == 2
    assert re.search(r"none of \d+ checkpoints can be used; restore one", capsys.readouterr().err)
    assert (out / "metrics.jsonl").read_text() == log


def sees(words: list[str], folders: list[Path]) -> str:
    with pytest.raises(ValueError, match="ranks see different checkpoints") as refused:
        build.resumed_folder(
            read(words), RunFolder(str(folders[world.rank()])), torch.device("cpu")
        )
    return str(refused.value)


def test_ranks_that_see_different_checkpoints_do_not_begin(
    ranks: Any, glyphs: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "fresh", tmp_path / "stale"]
    saved = folders[0] / "checkpoints" / "step_00000007"
    checkpoint.save(saved, {"model": {"w": torch.zeros(9)}}, {}, lambda path: None)
    words = [*config(glyphs, folders[0]), "--resume=auto"]
    assert all(said.endswith(f"{saved}, None") for said in ranks(2, sees, words, folders))


def test_a_full_disk_is_told_and_spoils_nothing(
    glyphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert run(config(glyphs, out)) == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def full(path: Path, *arguments: object, **options: object) -> None:
        path.touch()
        # as write says it: without the file
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit) as left:
        train.main([*config(glyphs, out), "--resume=auto"])
    assert left.value.code == 2
    assert (
        f"\nerror: {out}: No space left on device; fix this, then continue with"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("stage", ["files", "manifest", "rename"])
def test_a_kill_at_any_stage_of_a_save_leaves_the_last_one(tmp_path: Path, stage: str) -> None:
    checkpoint.save(
        tmp_path / "step_00000001", {"model": {"w": torch.zeros(9)}}, {}, lambda path: None
    )
    done = subprocess.run([sys.executable, "-c", STAGES, stage, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000001"
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    checkpoint.tidy(tmp_path, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from clipsmall.storage import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
def save(name, size):
    tensors = {"model": {"w": torch.zeros(size)}}
    checkpoint.save(folder / name, tensors, {}, lambda path: None)
save("step_00000001", 9)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save("step_00000002", 9999)
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "free some space" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


def test_another_runs_folder_is_not_taken_over(
    whole: Path, glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume=A's checkpoint with --out=B: B has a run of its own."""
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    before = (other / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as left:
        run(config(glyphs, other, **{"data.crop_scale": 0.8, "resume": str(last(whole))}))
    assert left.value.code == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (other / "metrics.jsonl").read_bytes() == before


def test_an_evaluation_is_made_once_a_step_and_is_not_lost(glyphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = {
        "optim.pairs": 32 * 10,
        "run.evaluate_every": 5,
        "evaluate.retrieval": f"[{{name: test, data: {glyphs / 'test'}}}]",
    }

    def evaluated() -> list[int]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines if "loss" not in json.loads(line)]

    assert run(config(glyphs, out, **words)) == 0
    assert evaluated() == [5, 10]
    # a finished run, started again
    assert run(config(glyphs, out, **words, resume="auto")) == 0
    assert evaluated() == [5, 10]
    shutil.rmtree(out / "checkpoints" / "step_00000010")
    assert run(config(glyphs, out, **words, resume="auto")) == 0
    assert evaluated() == [5, 10]


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.save(
            checkpoint.step_folder(tmp_path, step),
            {"model": {"w": torch.ones(1)}},
            {},
            lambda path: None,
        )
    checkpoint.tidy(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


def test_a_payload_in_a_checkpoint_is_not_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001"
    shutil.copytree(last(whole), folder)
    (folder / "model.safetensors").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.verify(folder)
    with pytest.raises(CheckpointError):
        checkpoint.read_tensors(folder, "model")
    assert not (tmp_path / "owned").exists()


def test_a_generator_survives_its_json() -> None:
    state = json.loads(json.dumps(checkpoint.random_state(torch.device("cpu"))))
    drawn = (torch.rand(3).tolist(), random.random(), np.random.rand())
    checkpoint.set_random_state(state, torch.device("cpu"))
    assert drawn == (torch.rand(3).tolist(), random.random(), np.random.rand())
