"""A run of a comparison: its config, its folder, how far it is, and the process that does it."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml

from clipsmall.compare.grid import GridSetting, Tree
from clipsmall.config import Config
from clipsmall.config.reader import lay_over, validated
from clipsmall.evaluation.results import safe
from clipsmall.storage import atomic, locks
from clipsmall.storage.run_folder import RunFolder

State = Literal["done", "failed", "submitted", "running", "begun", "missing"]
# what changes nothing of what is learned
APART = {
    "": {"out", "resume"},
    "data": {"workers"},
    "run": {"log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every", "trackers"},
}


def digest(tree: Tree) -> str:
    """Of what was written, not of defaults: an option that is new to clipsmall makes no run over
    again.
    """
    told = {name: value for name, value in tree.items() if name not in APART[""]}
    for section in ("data", "run"):
        left = {
            name: value
            for name, value in told.pop(section, {}).items()
            if name not in APART[section]
        }
        told |= {section: left} if left else {}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class GridRun:
    """One run. Its folder's name has a digest of its config: with other settings it is another
    run.
    """

    setting: GridSetting
    seed: int
    tree: Tree
    folder: Path
    # runs, tuning, speed
    kind: str

    @property
    def title(self) -> str:
        told = {"runs": f"seed {self.seed}", "tuning": f"lr {self.config.optim.lr:g}"}
        return f"{self.setting.title}, {told.get(self.kind, self.kind)}"

    @cached_property
    def config(self) -> Config:
        return validated(self.tree)

    @cached_property
    def files(self) -> RunFolder:
        return RunFolder(str(self.folder))

    @property
    def finished(self) -> bool:
        """Its last step is evaluated or, with nothing to evaluate, saved: checkpoints may go to
        make room.
        """
        steps = self.config.steps
        if self.config.evaluate.all:
            return self.files.last_evaluation() >= steps
        return (self.files.checkpoints / f"step_{steps:08d}" / "manifest.json").exists()

    @property
    def state(self) -> State:
        if self.finished:
            return "done"
        # a comparison's, the trainer's own
        if any(locks.held(self.folder / name) for name in ("lock", ".lock")):
            return "running"
        return self.mark or ("begun" if (self.folder / "run.yaml").exists() else "missing")

    @property
    def mark(self) -> Literal["failed", "submitted", ""]:
        """What the last attempt left behind, if not a finished run."""
        if (self.folder / "failed.json").exists():
            return "failed"
        return "submitted" if (self.folder / "submitted.json").exists() else ""

    @property
    def error(self) -> str:
        """Why it failed; empty if it did not."""
        path = self.folder / "failed.json"
        if not path.exists() or self.finished:
            return ""
        try:
            return str(json.loads(path.read_text())["error"])
        except (ValueError, KeyError):
            return f"see {self.folder}/log.txt"

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl; a line cut by a kill is left out."""
        found = []
        for line in (
            self.files.metrics.read_text(errors="replace").splitlines()
            if self.files.metrics.exists()
            else []
        ):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found


def make_run(
    out: str, setting: GridSetting, seed: int, changes: Sequence[Tree], kind: str = "runs"
) -> GridRun:
    """The run of a setting, with its budget and rate as further changes."""
    tree = setting.tree
    for change in (*changes, {"seed": seed}):
        tree = lay_over(tree, change)
    name = safe("-".join([*setting.levels.values(), f"s{seed}", digest(tree)]))
    return GridRun(setting, seed, tree, Path(out) / kind / name, kind)


@contextmanager
def _lock(path: Path) -> Iterator[TextIO | None]:
    """None if another process has it. A child that is handed the file holds the lock, too: one that
    outlives us.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield file if locks.take(file) else None


class Trainer:
    """Starts runs as processes, a few at a time; `stop` has them save and end.

    Args:
        launch: the words before a run's options.
        again: also runs that failed or were submitted.
    """

    def __init__(self, launch: str, environment: dict[str, str], again: bool) -> None:
        self.words = shlex.split(launch) or [sys.executable, "-m", "clipsmall.train"]
        self.environment = environment
        self.again = again
        # the signal
        self.stopped = 0
        self._children = set[subprocess.Popen[bytes]]()

    def stop(self, number: int, frame: Any = None) -> None:
        self.stopped = number
        for child in list(self._children):
            with suppress(ProcessLookupError):
                # a launcher's ranks, too
                os.killpg(child.pid, signal.SIGTERM)

    def train(self, run: GridRun, device: str | None = None) -> float | None:
        """Seconds that it took; None if there was nothing to do. Raises OSError if the command
        cannot be started.
        """
        if self.stopped:
            return None
        with _lock(run.folder / "lock") as lock:
            if (
                lock is None
                or locks.held(run.folder / ".lock")
                or run.finished
                or (run.mark and not self.again)
            ):
                return None
            for name in ("failed", "submitted"):
                (run.folder / f"{name}.json").unlink(missing_ok=True)
            given = run.folder / "given.yaml"
            given.write_text(
                yaml.safe_dump(run.tree, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
            start = time.time()
            code = self._call(
                [f"--config={given}", f"--out={run.folder}", "--resume=auto"], run, lock, device
            )
            if not run.finished and not self.stopped:
                self._mark(run, code)
            return time.time() - start

    def _call(self, options: list[str], run: GridRun, lock: TextIO, device: str | None) -> int:
        environment = self.environment | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        with (run.folder / "log.txt").open("w") as log:
            child = subprocess.Popen(
                [*self.words, *options],
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
            self._children.add(child)
            if self.stopped:
                # it came between the question and the start
                self.stop(self.stopped)
            code = child.wait()
            # a launcher may be gone before its ranks, which are still saving
            for _ in range(600):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, 0)
                    time.sleep(0.1)
                    continue
                break
            self._children.discard(child)
        return code

    def _mark(self, run: GridRun, code: int) -> None:
        """What is neither finished nor stopped has failed, or was handed to a queue by a command
        that went well.
        """
        log = [
            line
            for line in (run.folder / "log.txt").read_text(errors="replace").splitlines()
            if line.strip()
        ]
        ends = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)
        if code in ends or any("continue with --resume=auto" in line for line in log[-20:]):
            # stopped from outside, which launchers call 1: it goes on the next time
            return
        said = [line for line in log if line.startswith("error: ")] or log[-3:]
        told = {
            "exit_code": code,
            "error": "\n".join(said)[-2000:] or f"exit code {code}",
            "log": f"{run.folder}/log.txt",
        }
        name = "failed" if code else "submitted"
        atomic.write_json(run.folder / f"{name}.json", told)
