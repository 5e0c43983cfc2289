"""All cells of a folder as tables: CLIP_benchmark's CSV, DataComp's lines, and a page for the
terminal.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from clipsmall.evaluation.results import safe
from clipsmall.storage import atomic

# CLIP_benchmark's columns, in its order; what else we measure stands behind
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

# metrics that fit across a terminal
WIDE = 3


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Every cell in the folder, ours or CLIP_benchmark's, by file name; other JSON is passed
    over.
    """
    found = []
    # not the parts of files that a kill left behind
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(cell, dict) and {"dataset", "model", "pretrained", "task", "metrics"} <= set(
            cell
        ):
            found.append(cell)
    return found


def benchmark(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """A row a cell, a column a metric, as `clip_benchmark build` joins them."""
    rows = []
    for cell in cells:
        told = {
            name: cell.get(name, "en")
            for name in ("dataset", "model", "pretrained", "task", "language")
        }
        rows.append(
            {**cell["metrics"], **told, "model_fullname": f"{cell['model']} {cell['pretrained']}"}
        )
    table = pd.DataFrame(rows)
    return table.reindex(columns=[*FIRST, *(name for name in table.columns if name not in FIRST)])


def eval_results(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Zero-shot and retrieval cells of one model as DataComp's lines: key, dataset, metrics with
    `main_metric`.
    """
    lines = []
    for cell in cells:
        metrics = dict(cell["metrics"])
        if cell["task"] == "zeroshot_classification":
            key = cell["dataset"]
            main = [metrics.get("acc1", metrics.get("mean_average_precision"))]
        elif cell["task"] == "zeroshot_retrieval":
            key = f"retrieval/{cell['dataset']}"
            main = [metrics.get("image_retrieval_recall@1"), metrics.get("text_retrieval_recall@1")]
        else:
            continue
        known = [value for value in main if value is not None]
        # CLIP_benchmark's own cells need not have them
        if len(known) < len(main):
            continue
        metrics["main_metric"] = sum(known) / len(known)
        if len(known) > 1:
            metrics["mean_recall@1"] = metrics["main_metric"]
        lines.append({"key": key, "dataset": cell["dataset"], "metrics": metrics})
    return lines


def write_tables(folder: Path) -> None:
    """`benchmark.csv` of all cells in the folder, and `MODEL_PRETRAINED/eval_results.jsonl` of each
    model.
    """
    cells = read_cells(folder)
    if not cells:
        return
    atomic.write_text(folder / "benchmark.csv", benchmark(cells).to_csv(index=False))
    models: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        models.setdefault(f"{safe(cell['model'])}_{safe(cell['pretrained'])}", []).append(cell)
    for name, own in models.items():
        if lines := eval_results(own):
            atomic.write_text(
                folder / name / "eval_results.jsonl",
                "".join(json.dumps(line) + "\n" for line in lines),
            )


def printed(cells: list[dict[str, Any]]) -> str:
    """A table a task: models on data sets down and metrics across, or the other way round where
    that is too wide.
    """
    parts = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        here = [cell for cell in cells if cell["task"] == task]
        index = pd.MultiIndex.from_tuples(
            [(cell["dataset"], cell["model"], cell["pretrained"]) for cell in here],
            names=["dataset", "model", "pretrained"],
        )
        table = pd.DataFrame([cell["metrics"] for cell in here], index=index).sort_index()
        if len(table.columns) > WIDE:
            table = table.T
        missed = sum(cell.get("counts", {}).get("skipped", 0) for cell in here)
        note = (
            f" ({missed:,} images could not be used: see counts.skipped of its cells)"
            if missed
            else ""
        )
        parts.append(f"{task}{note}\n{table.to_string(float_format='{:.4f}'.format, na_rep='')}")
    return "\n\n".join(parts)
