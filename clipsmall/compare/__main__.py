"""Which objective serves which budget? A grid of runs from YAML: trained, measured, told in one
page.

    python -m clipsmall.compare configs/compare/glyphs.yaml --jobs 2        # runs what is missing, then tells
    python -m clipsmall.compare configs/compare/*.yaml --tell               # tells of what is there

Interrupt it at will: the same command goes on. Several of these commands may work on one grid at a
time, on a shared disk from several machines, too. Written to the comparison's folder: compare.html,
the tables as CSV and Parquet, the plots as PNG. Exit codes: 0 all is done; 1 some runs failed or
are not there yet; 2 bad input; 130, 143 stopped.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from clipsmall.cli import refuse
from clipsmall.compare.budgets import Budgets
from clipsmall.compare.grid import Comparison, GridSetting, load
from clipsmall.compare.runs import GridRun, Trainer
from clipsmall.compare.telling import tell

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m clipsmall.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("grids", nargs="+", help="YAML files, a comparison each")
    made.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; several GPUs are shared out among them"
    )
    made.add_argument("--seeds", type=int, nargs="+", help="run these only")
    made.add_argument(
        "--only", nargs="+", default=[], metavar="AXIS=LEVEL[,LEVEL]", help="run these levels only"
    )
    made.add_argument(
        "--again",
        action="store_true",
        help="also runs that failed, or were submitted without a result",
    )
    made.add_argument("--tell", action="store_true", help="run nothing")
    made.add_argument(
        "--list", action="store_true", help="train nothing, list the runs and their states"
    )
    made.add_argument(
        "--interval", choices=("sd", "bootstrap"), default="sd", help="in the table, over seeds"
    )
    return made


def picked(
    found: Sequence[GridSetting], comparison: Comparison, words: Sequence[str]
) -> list[GridSetting]:
    """What --only leaves. Raises ValueError for an unknown level."""
    wanted = dict[str, list[str]]()
    for word in words:
        axis, _, names = word.partition("=")
        wanted[axis] = names.split(",")
        if unknown := [name for name in wanted[axis] if name not in comparison.axes.get(axis, {})]:
            known = ", ".join(comparison.axes.get(axis, comparison.axes))
            raise ValueError(
                f"--only {word}: there is no {axis}={unknown[0]} in this grid; there is {known}"
            )
    return [
        each for each in found if all(each.levels[axis] in names for axis, names in wanted.items())
    ]


def environment(jobs: int, launch: str) -> dict[str, str]:
    """Of a run: as many threads as its share of the cores; a launcher decides for itself."""
    threads = {} if launch else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    return {**threads, **os.environ}


def work(runs: list[GridRun], trainer: Trainer, jobs: int, words: str) -> None:
    """Train what is not done, `jobs` at a time, a line each."""
    todo = [run for run in runs if not run.finished]
    if not todo:
        return
    shared = torch.cuda.device_count() > 1 and jobs > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ
    devices = SimpleQueue[str | None]()
    for _, device in zip(range(jobs), cycle(range(torch.cuda.device_count() or 1)), strict=False):
        devices.put(str(device) if shared else None)
    bar = tqdm(total=len(todo), desc=words, unit=" runs", disable=not sys.stderr.isatty())

    def one(run: GridRun) -> None:
        device = devices.get()
        try:
            took = trainer.train(run, device)
        finally:
            devices.put(device)
        bar.update()
        if not trainer.stopped:
            said = run.state + (f" in {took:.0f} s" if took is not None else "")
            bar.write(
                f"{run.title}: {said}" + (f": {run.error}" if run.error else ""), file=sys.stderr
            )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))
    bar.close()


def trials(runs: list[GridRun], trainer: Trainer, jobs: int, words: str) -> None:
    """What follows needs their results: those that another command is at are waited for."""
    work(runs, trainer, jobs, words)
    if any(run.state == "running" for run in runs):
        print(f"{words}: waiting for those that another command is at", file=sys.stderr)
        while not trainer.stopped and any(run.state == "running" for run in runs):
            time.sleep(1)
        # what it has left, should it have been stopped
        work(runs, trainer, jobs, words)


def run(
    comparison: Comparison, budgets: Budgets, trainer: Trainer, options: argparse.Namespace
) -> None:
    """Rates are tried before speeds, speeds before the grid: each follows from what came before."""
    seeds = options.seeds or comparison.seeds
    if strange := set(seeds) - set(comparison.seeds):
        raise ValueError(
            f"--seeds {min(strange)}: none of this grid's; there is {comparison.seeds}"
        )
    chosen = picked(budgets.fitting, comparison, options.only)
    trials(budgets.tuning(chosen), trainer, options.jobs, "learning rates")
    trials(budgets.speeds(chosen), trainer, options.jobs, "speeds")
    runs = [run for cell in budgets.cells() if cell.setting in chosen for run in cell.runs]
    # a whole grid of one seed before the next
    by_seed = [run for seed in seeds for run in runs if run.seed == seed]
    work(by_seed, trainer, options.jobs, "runs")


def listing(comparison: Comparison, budgets: Budgets) -> None:
    """A line for each run, and for each folder that this grid no longer asks for."""
    runs = [each for cell in budgets.cells() for each in cell.runs]
    runs = [*budgets.tuning(budgets.fitting), *budgets.speeds(budgets.fitting), *runs]
    for each in runs:
        print(f"{each.state:<10} {each.title:<40} {each.folder}")
    known = {each.folder for each in runs}
    for given in sorted(Path(comparison.out).glob("*/*/given.yaml")):
        if given.parent not in known:
            print(f"{'former':<10} {'not of this grid, as it is now':<40} {given.parent}")


def compare(comparison: Comparison, options: argparse.Namespace) -> int:
    """One of them, whole; returns the exit code."""
    budgets = Budgets(comparison)
    if options.list:
        listing(comparison, budgets)
        return 0
    if not options.tell:
        trainer = Trainer(
            comparison.launch, environment(options.jobs, comparison.launch), options.again
        )
        before = {number: signal.signal(number, trainer.stop) for number in STOPS}
        run(comparison, budgets, trainer, options)
        for number, handler in before.items():
            signal.signal(number, handler)
        if trainer.stopped:
            print("stopped; the same command goes on", file=sys.stderr)
            return 128 + trainer.stopped
    found = tell(comparison, budgets, options.interval)
    return 0 if found["state"].isin(["done", "unfit"]).all() else 1


def main(words: list[str] | None = None) -> int:
    options = parser().parse_args(words)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs={options.jobs}: at least one")
        codes = []
        found = [load(path) for path in options.grids]
        folders = [comparison.out for comparison in found]
        if twice := [out for out in folders if folders.count(out) > 1]:
            raise ValueError(f"out: two of the grids write to {twice[0]}; give each its own")
        for comparison in found:
            codes.append(compare(comparison, options))
            if codes[-1] > 2:
                break
        return max(codes)
    except (ValueError, OSError) as error:
        refuse(error)


if __name__ == "__main__":
    sys.exit(main())
