"""One result, as a file and a table: CLIP_benchmark's JSON cell, and lines for the terminal."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsmall.storage import atomic


@dataclass
class Result:
    """One model on one data set for one task.

    `metrics` have CLIP_benchmark's names (acc1, acc5, mean_per_class_recall,
    image_retrieval_recall@5, ...), or a task's own; `chance` has the value of a guess for some of
    them; `counts` says over how much.
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
    # digest of all that the numbers depend on: a file with this key need not be made again
    key: str = ""
    # metrics are fractions, and printed in percent; not written
    fractions: bool = True


def check_folder(folder: Path) -> None:
    """Raises ValueError if results could not be written there. Makes nothing."""
    # the folder, or what it would be made in
    candidates = (folder, *folder.absolute().parents)
    there = next(path for path in candidates if path.exists())
    can_write = os.access(there, os.W_OK | os.X_OK)
    if not there.is_dir() or not can_write:
        raise ValueError(f"--out={folder}: nothing can be written to {there}; give another folder")


def safe(name: str) -> str:
    """The name as part of a file name."""
    words = re.sub(r"[^\w.@-]+", "-", name)
    return words.strip("-")


def cell_path(folder: Path, dataset: str, pretrained: str, model: str, task: str) -> Path:
    """`{dataset}_{pretrained}_{model}_{language}_{task}.json`."""
    parts = (dataset, pretrained, model, "en", task)
    stem = "_".join(safe(part) for part in parts)
    return folder / f"{stem}.json"


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


def results_text(results: list[Result]) -> str:
    """One line per metric, in percent (where it is a fraction) beside the chance level."""
    lines = []
    for result in results:
        counts = ", ".join(f"{value:,} {name}" for name, value in result.counts.items())
        task = result.task.removeprefix("zeroshot_")
        lines.append(f"{result.dataset} · {task} ({counts})")

        number_format = "8.2%" if result.fractions else "8.4f"
        for name, value in result.metrics.items():
            number = format(value, number_format)
            guess = ""
            if name in result.chance:
                guess = f"   chance {result.chance[name]:8.3%}"
            lines.append(f"  {name:<28}{number}{guess}")
    return "\n".join(lines)
