"""Trains the missing runs of a grid: one process per run, several runs at a time."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

import torch
import yaml
from tqdm import tqdm

from clipsmall.compare.budgets import Budgets
from clipsmall.compare.grid import Comparison, GridSetting
from clipsmall.compare.runs import GridRun
from clipsmall.storage import atomic, locks

# Exit codes of a run that was asked to stop.
STOPPED_CODES = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)
# Tenths of a second that ranks may take to save after their launcher has ended.
MOST_WAITS = 600


@contextmanager
def _run_lock(path: Path) -> Iterator[TextIO | None]:
    """The locked file; None if another process holds the lock.

    A child process that inherits the file also holds the lock, even after this process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield file if locks.take(file) else None


class Trainer:
    """Starts runs as processes; `stop` makes them save and end.

    Args:
        launch: the command, to which a run's options are added; "" = one process of this Python.
        environment: environment variables of the processes.
        again: also train runs that failed or were submitted.
    """

    def __init__(self, launch: str, environment: dict[str, str], again: bool) -> None:
        self.words = shlex.split(launch) or [sys.executable, "-m", "clipsmall.train"]
        self.environment = environment
        self.again = again
        # number of the signal received; 0 = none
        self.stopped = 0
        self._children = set[subprocess.Popen[bytes]]()

    def stop(self, number: int, frame: Any = None) -> None:
        """Handle a signal: pass it on to all runs, and start no more runs."""
        self.stopped = number
        for child in list(self._children):
            with suppress(ProcessLookupError):
                # the whole process group, including a launcher's ranks
                os.killpg(child.pid, signal.SIGTERM)

    def train(self, run: GridRun, device: str | None = None) -> float | None:
        """Train one run to its end.

        Returns:
            The seconds it took; None if there was nothing to do.

        Raises:
            OSError: the command cannot be started.
        """
        if self.stopped:
            return None

        with _run_lock(run.folder / "lock") as lock:
            if lock is None or not self._is_to_do(run):
                return None

            for name in ("failed", "submitted"):
                (run.folder / f"{name}.json").unlink(missing_ok=True)

            given = run.folder / "given.yaml"
            text = yaml.safe_dump(run.tree, sort_keys=False, allow_unicode=True)
            given.write_text(text, encoding="utf-8")
            options = [f"--config={given}", f"--out={run.folder}", "--resume=auto"]
            start = time.time()
            code = self._call(options, run, lock, device)
            if not run.finished and not self.stopped:
                self._mark(run, code)

            return time.time() - start

    def _is_to_do(self, run: GridRun) -> bool:
        """Whether the run is unfinished, not being trained, and may be tried (again)."""
        if locks.held(run.folder / ".lock") or run.finished:
            return False
        return not run.mark or self.again

    def _call(self, options: list[str], run: GridRun, lock: TextIO, device: str | None) -> int:
        environment = self.environment
        if device:
            environment = environment | {"CUDA_VISIBLE_DEVICES": device}

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
                # the signal came between the check above and the start
                self.stop(self.stopped)

            code = child.wait()
            # a launcher may end before its ranks, which are still saving
            for _ in range(MOST_WAITS):
                try:
                    os.killpg(child.pid, 0)
                except (ProcessLookupError, PermissionError):
                    break

                time.sleep(0.1)

            self._children.discard(child)

        return code

    def _mark(self, run: GridRun, code: int) -> None:
        """Record that a run has failed or was submitted to a queue.

        A command that exits with 0 but leaves an unfinished run has submitted it.
        """
        log = (run.folder / "log.txt").read_text(errors="replace").splitlines()
        lines = [line for line in log if line.strip()]
        asked_to_stop = any("continue with --resume=auto" in line for line in lines[-20:])
        if code in STOPPED_CODES or asked_to_stop:
            # Stopped from outside, where launchers exit with 1; the next command continues the run.
            return

        # our commands' messages on bad input, or the end of a traceback
        errors = [line for line in lines if line.startswith("error: ")] or lines[-3:]
        outcome = {
            "exit_code": code,
            "error": "\n".join(errors)[-2000:] or f"exit code {code}",
            "log": f"{run.folder}/log.txt",
        }
        name = "failed" if code else "submitted"
        atomic.write_json(run.folder / f"{name}.json", outcome)


def training_environment(jobs: int, launch: str) -> dict[str, str]:
    """The environment of a run, which divides the CPU cores equally among the jobs.

    Not if there is a launcher, or if the user has set OMP_NUM_THREADS.
    """
    if launch:
        return dict(os.environ)

    cores = os.cpu_count() or 1
    threads = max(1, cores // jobs)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def train_runs(runs: list[GridRun], trainer: Trainer, jobs: int, title: str) -> None:
    """Train unfinished runs, `jobs` at a time, and print one line for each."""
    todo = [run for run in runs if not run.finished]
    if not todo:
        return

    devices = _free_devices(jobs)
    bar = tqdm(total=len(todo), desc=title, unit=" runs", disable=not sys.stderr.isatty())

    def train_one(run: GridRun) -> None:
        device = devices.get()
        try:
            took = trainer.train(run, device)
        finally:
            devices.put(device)

        bar.update()
        if trainer.stopped:
            return

        line = f"{run.title}: {run.state}"
        if took is not None:
            line += f" in {took:.0f} s"

        if run.error:
            line += f": {run.error}"

        bar.write(line, file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train_one, todo))

    bar.close()


def _free_devices(jobs: int) -> SimpleQueue[str | None]:
    """One device per job: with several GPUs, one each in turn; else None = all devices.

    A CUDA_VISIBLE_DEVICES that the user has set applies to all jobs.
    """
    gpus = torch.cuda.device_count()
    several = gpus > 1 and jobs > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ

    devices = SimpleQueue[str | None]()
    for _, device in zip(range(jobs), cycle(range(gpus or 1)), strict=False):
        devices.put(str(device) if several else None)

    return devices


def train_and_wait(runs: list[GridRun], trainer: Trainer, jobs: int, title: str) -> None:
    """Train runs whose results the next step needs.

    Waits for runs that another command is training.
    """
    train_runs(runs, trainer, jobs, title)
    if not any(run.state == "running" for run in runs):
        return

    print(f"{title}: waiting for those that another command is training", file=sys.stderr)
    while not trainer.stopped and any(run.state == "running" for run in runs):
        time.sleep(1)

    # train what the other command has left unfinished, if it was stopped
    train_runs(runs, trainer, jobs, title)


def train_grid(
    comparison: Comparison,
    budgets: Budgets,
    trainer: Trainer,
    jobs: int,
    seeds: Sequence[int],
    only: Sequence[str],
) -> None:
    """Run learning-rate trials, then speed trials, then the grid: each needs the step before.

    Args:
        seeds: train only runs with these seeds.
        only: arguments of --only.

    Raises:
        ValueError: a seed or level that is not in the grid.
    """
    strange = set(seeds) - set(comparison.seeds)
    if strange:
        raise ValueError(
            f"--seeds {min(strange)}: not a seed of this grid; there is {comparison.seeds}"
        )

    chosen = selected_settings(budgets.fitting, comparison, only)
    train_and_wait(budgets.rate_trials(chosen), trainer, jobs, "learning rates")
    train_and_wait(budgets.speed_trials(chosen), trainer, jobs, "speeds")
    runs = [run for cell in budgets.cells() if cell.setting in chosen for run in cell.runs]
    # the whole grid with one seed before the next seed
    by_seed = [run for seed in seeds for run in runs if run.seed == seed]
    train_runs(by_seed, trainer, jobs, "runs")


def selected_settings(
    settings: Sequence[GridSetting], comparison: Comparison, words: Sequence[str]
) -> list[GridSetting]:
    """The settings that --only selects.

    Args:
        words: its arguments, AXIS=LEVEL[,LEVEL] each.

    Raises:
        ValueError: an unknown axis or level.
    """
    wanted = dict[str, list[str]]()
    for word in words:
        axis, _, names = word.partition("=")
        wanted[axis] = names.split(",")
        known = comparison.axes.get(axis, {})
        unknown = [name for name in wanted[axis] if name not in known]
        if unknown:
            there_is = ", ".join(known or comparison.axes)
            raise ValueError(
                f"--only {word}: there is no {axis}={unknown[0]} in this grid; there is {there_is}"
            )

    selected = []
    for setting in settings:
        if all(setting.levels[axis] in names for axis, names in wanted.items()):
            selected.append(setting)

    return selected
