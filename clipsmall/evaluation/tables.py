"""All results of a folder as tables: CLIP_benchmark's CSV, DataComp's JSON lines, and text."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from clipsmall.evaluation.results import safe
from clipsmall.evaluation.tasks import TASKS
from clipsmall.storage import atomic

# CLIP_benchmark's columns in its order; our other metrics follow.
FIRST = [
    "acc1",
    "acc5",
    "mean_per_class_recall",
    "mean_average_precision",
    "image_retrieval_recall@5",
    "text_retrieval_recall@5",
    "dataset",
    "model",
    "pretrained",
    "task",
    "language",
    "model_fullname",
]

# Number of metrics that fit across a terminal.
WIDE = 3


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Every result in the folder, ours or CLIP_benchmark's, by file name; other JSON is ignored."""
    found = []
    # skip partial files, which a killed process may leave behind
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        keys = {"dataset", "model", "pretrained", "task", "metrics"}
        if isinstance(cell, dict) and keys <= set(cell):
            found.append(cell)
    return found


def benchmark_table(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per cell, one column per metric, as `clip_benchmark build` joins them."""
    rows = []
    for cell in cells:
        row = dict(cell["metrics"])
        for name in ("dataset", "model", "pretrained", "task", "language"):
            row[name] = cell.get(name, "en")
        row["model_fullname"] = f"{cell['model']} {cell['pretrained']}"
        rows.append(row)
    table = pd.DataFrame(rows)
    others = [name for name in table.columns if name not in FIRST]
    return table.reindex(columns=[*FIRST, *others])


def eval_results(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of one model for tasks that DataComp has, as lines of its eval_results.jsonl.

    Each line has key, dataset, and metrics with `main_metric`.
    """
    by_name = {task.result_name: task for task in TASKS.values() if task.datacomp_key}
    lines = []
    for cell in cells:
        task = by_name.get(cell["task"])
        main = task.main_values(cell["metrics"]) if task else []
        # files that CLIP_benchmark wrote may lack these
        if not task or not main:
            continue
        metrics = dict(cell["metrics"])
        metrics["main_metric"] = sum(main) / len(main)
        if len(main) > 1:
            metrics["mean_recall@1"] = metrics["main_metric"]
        key = task.datacomp_key.format(dataset=cell["dataset"])
        lines.append({"key": key, "dataset": cell["dataset"], "metrics": metrics})
    return lines


def write_tables(folder: Path) -> None:
    """Write `benchmark.csv`, and `MODEL_PRETRAINED/eval_results.jsonl` for each model."""
    cells = read_cells(folder)
    if not cells:
        return
    csv = benchmark_table(cells).to_csv(index=False)
    atomic.write_text(folder / "benchmark.csv", csv)
    # model and weights -> results
    models: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        model = safe(cell["model"])
        pretrained = safe(cell["pretrained"])
        own_cells = models.setdefault(f"{model}_{pretrained}", [])
        own_cells.append(cell)

    for name, own in models.items():
        lines = eval_results(own)
        # a model may have no result that DataComp has a key for
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            atomic.write_text(folder / name / "eval_results.jsonl", text)


def tables_text(cells: list[dict[str, Any]]) -> str:
    """One table per task: a row per model and data set, transposed if it has many metrics."""
    parts = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own = [cell for cell in cells if cell["task"] == task]

        names = ["dataset", "model", "pretrained"]
        labels = []
        for cell in own:
            labels.append(tuple(cell[name] for name in names))
        index = pd.MultiIndex.from_tuples(labels, names=names)

        metrics = [cell["metrics"] for cell in own]
        table = pd.DataFrame(metrics, index=index).sort_index()
        if len(table.columns) > WIDE:
            table = table.T
        numbers = table.to_string(float_format="{:.4f}".format, na_rep="")

        # files that CLIP_benchmark wrote have no counts
        missed = 0
        for cell in own:
            counts = cell.get("counts", {})
            missed += counts.get("skipped", 0)
        note = ""
        if missed:
            note = f" ({missed:,} images could not be used: see counts.skipped in its JSON files)"
        parts.append(f"{task}{note}\n{numbers}")
    return "\n\n".join(parts)
