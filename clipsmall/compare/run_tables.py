"""The runs of a comparison as tables: one row per run, and one row per line of their logs."""

import math
from statistics import median
from typing import Any

import pandas as pd

from clipsmall.compare.budgets import GridCell
from clipsmall.compare.grid import NUMBERS, Comparison
from clipsmall.compare.runs import GridRun

CURVES = ("pairs", "loss", "accuracy", "logit_scale", "logit_bias")


def tables_of_runs(
    comparison: Comparison, cells: list[GridCell]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames `runs` and `curves`.

    `runs` has a row for each setting and seed:
        the axes: the setting's levels.
        seed.
        state: done, failed, submitted, running, begun, missing, or unfit (none of its batches fits
            the memory).
        error: why the run failed, or what it waits for.
        the metrics: fractions; NaN unless done.
        pairs, steps: samples seen and steps taken.
        lr: as configured.
        logit_scale, logit_bias: at the end.
        seconds: training time, without start-up and evaluation.
        pairs_per_second: median.
        memory: GiB per rank at a step's peak, as planned.
        skipped: number of replaced pairs and of skipped steps.
        folder.

    `curves` has a row for each line of the runs' metrics.jsonl: levels, seed, pairs, loss,
    accuracy, logit_scale, logit_bias, and the metrics if that line is an evaluation.
    """
    rows = list[dict[str, Any]]()
    lines = list[dict[str, Any]]()
    for cell in cells:
        for number, seed in enumerate(comparison.seeds):
            run = cell.runs[number] if cell.runs else None
            which = {**cell.setting.levels, "seed": seed}
            rows.append({**which, **_run_row(comparison, run, cell)})
            if run is None:
                continue

            for line in run.logged_lines():
                curves_row = {name: line.get(name) for name in CURVES}
                for column, key in comparison.metrics.items():
                    curves_row[column] = line.get(key)

                lines.append({**which, **curves_row})

    axes = [*comparison.axes, "seed"]
    metrics = list(comparison.metrics)
    columns = [*axes, "state", "error", *metrics, *NUMBERS, "folder"]
    runs = pd.DataFrame(rows, columns=columns)
    curves = pd.DataFrame(lines, columns=[*axes, *CURVES, *metrics])
    # a column without any value would have dtype object
    run_numbers = [*metrics, *NUMBERS]
    runs[run_numbers] = runs[run_numbers].astype(float)
    curve_numbers = [*CURVES, *metrics]
    curves[curve_numbers] = curves[curve_numbers].astype(float)
    return runs, curves


def _run_row(comparison: Comparison, run: GridRun | None, cell: GridCell) -> dict[str, Any]:
    if run is None:
        return _row_without_run(cell)

    lines = run.logged_lines()
    trained = [line for line in lines if "pairs_per_second" in line]
    state = run.state
    row = {
        "state": state,
        "error": run.error,
        "memory": cell.memory,
        "lr": run.config.optim.lr,
        "folder": str(run.folder),
    }

    if trained:
        end = trained[-1]
        for name in ("pairs", "logit_scale", "logit_bias"):
            row[name] = end.get(name)

        row["seconds"] = training_seconds(trained)
        row["pairs_per_second"] = median(line["pairs_per_second"] for line in trained)
        row["steps"] = end["step"]
        row["skipped"] = end.get("skipped", 0) + end.get("bad_steps", 0)

    if state == "done":
        # evaluation lines have no loss
        final = [line for line in lines if "loss" not in line][-1]
        for column, key in comparison.metrics.items():
            row[column] = final.get(key)

        row["pairs"] = final["pairs"]
        row["steps"] = final["step"]
        # The last steps may not have been logged: their time is added in proportion.
        if trained:
            row["seconds"] = training_seconds(trained) * final["pairs"] / trained[-1]["pairs"]

    return row


def _row_without_run(cell: GridCell) -> dict[str, Any]:
    """The row of a setting whose runs are not known yet, or will not exist."""
    state = "failed" if cell.error else "missing"
    if not cell.fits:
        state = "unfit"
    reason = cell.error or cell.waits
    return {"state": state, "error": reason, "memory": cell.memory, "folder": ""}


def training_seconds(trained: list[dict[str, Any]]) -> float:
    """Time in the training loop, without start-up, evaluation and steps lost to a kill.

    Args:
        trained: lines of metrics.jsonl with pairs and pairs_per_second; their times are added up.
    """
    seconds = 0.0
    before = 0
    for line in trained:
        speed = line["pairs_per_second"]
        seconds += (line["pairs"] - before) / speed if speed else math.nan
        before = line["pairs"]

    return seconds
