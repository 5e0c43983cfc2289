"""One evaluation result: its JSON file in CLIP_benchmark's format, and its text for a terminal."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsmall.storage import atomic


@dataclass
class Result:
    """The result of one model on one data set for one task.

    `metrics` have CLIP_benchmark's names (acc1, acc5, mean_per_class_recall,
    image_retrieval_recall@5, ...) or names of the task's own. `chance` has the chance level of some
    of them, and `counts` the numbers of images, pairs or classes measured.
    """

    dataset: str
    # zeroshot_classification, zeroshot_retrieval, linear_probe, or a name of our own
    task: str
    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    # pairs, classes, skipped, ...
    counts: dict[str, int] = field(default_factory=dict)
    # more JSON on how the metrics came about: bins, a table of corruptions
    details: dict[str, Any] = field(default_factory=dict)
    # digest of everything the numbers depend on: a file with this key is up to date
    key: str = ""
    # whether metrics are fractions, printed in percent; not written to the file
    fractions: bool = True


def check_folder(folder: Path) -> None:
    """Raises ValueError if the folder is not writable. Creates nothing."""
    # the folder itself, or the parent that it would be created in
    candidates = (folder, *folder.absolute().parents)
    there = next(path for path in candidates if path.exists())
    can_write = os.access(there, os.W_OK | os.X_OK)
    if not there.is_dir() or not can_write:
        raise ValueError(f"--out={folder}: nothing can be written to {there}; give another folder")


def safe(name: str) -> str:
    """The name with characters that are safe in a file name."""
    words = re.sub(r"[^\w.@-]+", "-", name)
    return words.strip("-")


def cell_path(folder: Path, dataset: str, pretrained: str, model: str, task: str) -> Path:
    """`{dataset}_{pretrained}_{model}_{language}_{task}.json`."""
    parts = (dataset, pretrained, model, "en", task)
    stem = "_".join(safe(part) for part in parts)
    return folder / f"{stem}.json"


def write_cell(cell: Result, folder: Path, model: str, pretrained: str) -> Path:
    """Write the result to `cell_path`, whole or not at all."""
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
    """One line per metric, fractions in percent, with the chance level if it is known."""
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
