"""One result, as a file and a table: CLIP_benchmark's JSON cell, and a few lines for the terminal."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Cell:
    """One model on one data set for one task.

    `metrics` are CLIP_benchmark's names (acc1, acc5, mean_per_class_recall, image_retrieval_recall@5, ...), each a
    share between 0 and 1; `chance` has the value of a guess for some of them; `counts` says over how much.
    """

    dataset: str
    task: str  # zeroshot_classification or zeroshot_retrieval
    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # pairs, classes, skipped, ...


def write_cell(cell: Cell, folder: Path, model: str, pretrained: str) -> Path:
    """`{dataset}_{pretrained}_{model}_{language}_{task}.json`, written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = (cell.dataset, pretrained, model, "en", cell.task)
    path = folder / ("_".join(re.sub(r"[^\w.@-]+", "-", part).strip("-") for part in parts) + ".json")
    content = {
        "dataset": cell.dataset,
        "model": model,
        "pretrained": pretrained,
        "task": cell.task,
        "metrics": cell.metrics,
        "language": "en",
        "chance": cell.chance,
        "counts": cell.counts,
    }
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def print_cells(cells: list[Cell]) -> str:
    """A table of data sets × metrics, percentages beside the chance level."""
    lines = []
    for cell in cells:
        counts = ", ".join(f"{value:,} {name}" for name, value in cell.counts.items())
        lines.append(f"{cell.dataset} · {cell.task.removeprefix('zeroshot_')} ({counts})")
        for name, value in cell.metrics.items():
            guess = f"   chance {cell.chance[name]:8.3%}" if name in cell.chance else ""
            lines.append(f"  {name:<28}{value:8.2%}{guess}")
    return "\n".join(lines)
