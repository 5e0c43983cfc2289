"""One result, as a file and a table: CLIP_benchmark's JSON cell, and a few lines for the
terminal.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsmall.storage import atomic


@dataclass
class Result:
    """One model on one data set for one task.

    `metrics` are CLIP_benchmark's names (acc1, acc5, mean_per_class_recall,
    image_retrieval_recall@5, ...), shares between 0 and 1, or a task's own; `chance` has the value
    of a guess for some of them; `counts` says over how much.
    """

    dataset: str
    # zeroshot_classification, zeroshot_retrieval, linear_probe; or one of ours
    task: str
    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    # pairs, classes, skipped, ...
    counts: dict[str, int] = field(default_factory=dict)
    # JSON behind the metrics: bins, a table of corruptions
    details: dict[str, Any] = field(default_factory=dict)
    # digest of all the numbers depend on, by which a cell is known to be done
    key: str = ""


def check_folder(folder: Path) -> None:
    """Before results are made: raises ValueError if they could not be written there. Makes
    nothing.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out={folder}: nothing can be written to {there}; give another folder")


def safe(name: str) -> str:
    """As part of a file name."""
    return re.sub(r"[^\w.@-]+", "-", name).strip("-")


def cell_path(folder: Path, dataset: str, pretrained: str, model: str, task: str) -> Path:
    """`{dataset}_{pretrained}_{model}_{language}_{task}.json`."""
    parts = (dataset, pretrained, model, "en", task)
    return folder / ("_".join(map(safe, parts)) + ".json")


def write_cell(cell: Result, folder: Path, model: str, pretrained: str) -> Path:
    """Write the file `cell_path` names, whole or not at all."""
    path = cell_path(folder, cell.dataset, pretrained, model, cell.task)
    content = {
        "dataset": cell.dataset,
        "model": model,
        "pretrained": pretrained,
        "task": cell.task,
        "metrics": cell.metrics,
        "language": "en",
        "chance": cell.chance,
        "counts": cell.counts,
        **({"details": cell.details} if cell.details else {}),
        **({"key": cell.key} if cell.key else {}),
    }
    atomic.write_json(path, content)
    return path


def print_cells(cells: list[Result]) -> str:
    """A table of data sets × metrics, percentages beside the chance level."""
    lines = []
    for cell in cells:
        counts = ", ".join(f"{value:,} {name}" for name, value in cell.counts.items())
        lines.append(f"{cell.dataset} · {cell.task.removeprefix('zeroshot_')} ({counts})")
        for name, value in cell.metrics.items():
            guess = f"   chance {cell.chance[name]:8.3%}" if name in cell.chance else ""
            lines.append(f"  {name:<28}{value:8.2%}{guess}")
    return "\n".join(lines)
