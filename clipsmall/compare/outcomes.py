"""What the runs of a comparison came to, as two tables: a row a run, and a row a logged line."""

import math
from statistics import median
from typing import Any

import pandas as pd

from clipsmall.compare.budgets import GridCell
from clipsmall.compare.grid import NUMBERS, Comparison
from clipsmall.compare.runs import GridRun

CURVES = ("pairs", "loss", "accuracy", "logit_scale", "logit_bias")


def outcomes(comparison: Comparison, cells: list[GridCell]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames `runs` and `curves`.

    `runs` has a row for each setting and seed: the axes' levels, seed, state (done, failed,
    submitted, running, begun,
    missing, unfit: none of its batches fits the memory), error, the metrics (shares; NaN unless
    done), pairs, steps, lr (as given), logit_scale, logit_bias, seconds (of training, start and
    evaluation left out), pairs_per_second (median), memory (GiB of a rank at a step's peak, as
    planned), skipped (pairs replaced, steps left out), folder.

    `curves` has a row for each line of their metrics.jsonl: levels, seed, pairs, loss, accuracy,
    logit_scale, logit_bias, and the metrics where that line is an evaluation.
    """
    rows = list[dict[str, Any]]()
    lines = list[dict[str, Any]]()
    for cell in cells:
        for place, seed in enumerate(comparison.seeds):
            run = cell.runs[place] if cell.runs else None
            first = {**cell.setting.levels, "seed": seed}
            rows.append({**first, **_row(comparison, run, cell)})
            for line in run.lines() if run else ():
                measured = {column: line.get(key) for column, key in comparison.metrics.items()}
                lines.append({**first, **{name: line.get(name) for name in CURVES}, **measured})
    axes = [*comparison.axes, "seed"]
    runs = pd.DataFrame(
        rows, columns=[*axes, "state", "error", *comparison.metrics, *NUMBERS, "folder"]
    )
    curves = pd.DataFrame(lines, columns=[*axes, *CURVES, *comparison.metrics])
    wide = [*comparison.metrics, *NUMBERS]
    runs[wide] = runs[wide].astype(float)
    curves[[*CURVES, *comparison.metrics]] = curves[[*CURVES, *comparison.metrics]].astype(float)
    return runs, curves


def _row(comparison: Comparison, run: GridRun | None, cell: GridCell) -> dict[str, Any]:
    if run is None:
        state = "unfit" if not cell.fits else "failed" if cell.error else "missing"
        return {
            "state": state,
            "error": cell.error or cell.waits,
            "memory": cell.memory,
            "folder": "",
        }
    lines = run.lines()
    trained = [line for line in lines if "pairs_per_second" in line]
    state = run.state
    lr = run.config.optim.lr
    row = {
        "state": state,
        "error": run.error,
        "memory": cell.memory,
        "lr": lr,
        "folder": str(run.folder),
    }
    if trained:
        end = trained[-1]
        row |= {name: end.get(name) for name in ("pairs", "logit_scale", "logit_bias")}
        row |= {
            "seconds": seconds(trained),
            "pairs_per_second": median(line["pairs_per_second"] for line in trained),
        }
        row |= {"steps": end["step"], "skipped": end.get("skipped", 0) + end.get("bad_steps", 0)}
    if state == "done":
        final = [line for line in lines if "loss" not in line]
        row |= {column: final[-1].get(key) for column, key in comparison.metrics.items()}
        row |= {"pairs": final[-1]["pairs"], "steps": final[-1]["step"]}
        # the last steps may be fewer than log_every
        if trained:
            row["seconds"] = seconds(trained) * final[-1]["pairs"] / trained[-1]["pairs"]
    return row


def seconds(trained: list[dict[str, Any]]) -> float:
    """Time in the loop, the log's speeds added up: neither start, nor evaluation, nor what a kill
    threw away.
    """
    found = 0.0
    before = 0
    for line in trained:
        found += (
            (line["pairs"] - before) / line["pairs_per_second"]
            if line["pairs_per_second"]
            else math.nan
        )
        before = line["pairs"]
    return found
