"""Compare objectives, batch sizes or tricks: train a grid of runs and write one page about them.

    python -m clipsmall.compare configs/compare/glyphs.yaml --jobs 2    # train what is missing
    python -m clipsmall.compare configs/compare/*.yaml --tell           # report what is there

A grid is a YAML file: axes with levels, seeds, and a budget of pairs, time or memory that is the
same for all runs. Results go to the grid's folder: compare.html with a verdict, tables as CSV and
Parquet, plots as PNG.

The command can be interrupted at any time; the same command continues. Several commands may work on
one grid at once, also from several machines with a shared disk.

Exit codes: 0 all runs are done; 1 some failed or are missing; 2 bad input; 130, 143 stopped.
"""

import argparse
import signal
import sys
from pathlib import Path

from clipsmall.cli import refuse
from clipsmall.compare.budgets import Budgets
from clipsmall.compare.grid import Comparison, load_comparison
from clipsmall.compare.launcher import Trainer, train_grid, training_environment
from clipsmall.compare.output import write_results

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grids", nargs="+", help="YAML files, one comparison each")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="how many runs to train at a time; several GPUs are divided among them [1]",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="train only runs with these seeds")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="AXIS=LEVEL[,LEVEL]",
        help="train only settings with these levels, as in batch_size=16,32",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="train also runs that failed, or that went to a queue and left no result",
    )
    parser.add_argument(
        "--tell", action="store_true", help="train nothing, only report finished runs"
    )
    parser.add_argument(
        "--list", action="store_true", help="train nothing, list the runs and their states"
    )
    parser.add_argument(
        "--interval",
        choices=("sd", "bootstrap"),
        default="sd",
        help="spread over seeds shown in the tables: standard deviation or 95 %% interval [sd]",
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs={options.jobs}: at least one")

        comparisons = [load_comparison(path) for path in options.grids]
        folders = [comparison.out for comparison in comparisons]
        shared = [folder for folder in folders if folders.count(folder) > 1]
        if shared:
            raise ValueError(f"out: two of the grids write to {shared[0]}; give each its own")

        codes = []
        for comparison in comparisons:
            codes.append(_compare(comparison, options))
            # stopped by a signal
            if codes[-1] > 2:
                break

        return max(codes)
    except (ValueError, OSError) as error:
        refuse(error)


def _compare(comparison: Comparison, options: argparse.Namespace) -> int:
    """Train and report one grid; returns the exit code."""
    budgets = Budgets(comparison)
    if options.list:
        _print_runs(comparison, budgets)
        return 0

    if not options.tell:
        stopped = _train(comparison, budgets, options)
        if stopped:
            print("stopped; run the same command to continue", file=sys.stderr)
            return 128 + stopped

    runs = write_results(comparison, budgets, options.interval)
    return 0 if runs["state"].isin(["done", "unfit"]).all() else 1


def _train(comparison: Comparison, budgets: Budgets, options: argparse.Namespace) -> int:
    """Train what is missing; returns the signal that stopped it, or 0."""
    environment = training_environment(options.jobs, comparison.launch)
    trainer = Trainer(comparison.launch, environment, options.again)
    before = {number: signal.signal(number, trainer.stop) for number in STOP_SIGNALS}
    seeds = options.seeds or comparison.seeds
    train_grid(comparison, budgets, trainer, options.jobs, seeds, options.only)

    for number, handler in before.items():
        signal.signal(number, handler)

    return trainer.stopped


def _print_runs(comparison: Comparison, budgets: Budgets) -> None:
    """One line for each run, and for each folder that this grid no longer asks for."""
    runs = [
        *budgets.rate_trials(budgets.fitting),
        *budgets.speed_trials(budgets.fitting),
        *(run for cell in budgets.cells() for run in cell.runs),
    ]
    for run in runs:
        print(f"{run.state:<10} {run.title:<40} {run.folder}")

    known = {run.folder for run in runs}
    for given in sorted(Path(comparison.out).glob("*/*/given.yaml")):
        folder = given.parent
        if folder not in known:
            print(f"{'former':<10} {'not of this grid, as it is now':<40} {folder}")


if __name__ == "__main__":
    sys.exit(main())
