"""Robustness: what is left of a model's results on corrupted pictures."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipsmall.evaluation.corruptions import COMMON, SEVERITIES, Corruption
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.view import DataView

# the metrics of a task that are averaged to one number
MAIN = {
    "zero_shot": ("acc1",),
    "retrieval": ("image_retrieval_recall@1", "text_retrieval_recall@1"),
    "knn": ("acc1",),
    "linear_probe": ("acc1",),
}


def robustness(
    view: DataView,
    tasks: Mapping[str, Callable[[DataView], Result]],
    corruptions: Sequence[str] = COMMON,
    severities: Sequence[int] = SEVERITIES,
) -> Result:
    """Tasks of `MAIN` on clean pictures, and on every corruption at every severity.

    For each task: `{task}_clean`, `{task}_corrupted` (the mean over severities, then corruptions),
    `{task}_relative` (corrupted / clean); `details` has each corruption's mean by severity. Texts
    and probes are those of the clean pictures. One pass through the image tower a corruption and
    severity.

    Raises:
        ValueError: no such corruption or severity, or no task.
    """
    if not tasks or not corruptions or not severities:
        raise ValueError(
            "robustness needs a task (zero_shot, retrieval, knn, linear_probe), a corruption, a severity"
        )
    side = view.encoder.model.spec.size
    changes = {
        name: [Corruption(name, severity, side) for severity in severities] for name in corruptions
    }

    def measure(there: DataView) -> dict[str, float]:
        found = {task: run(there).metrics for task, run in tasks.items()}
        return {task: float(np.mean([found[task][name] for name in MAIN[task]])) for task in tasks}

    # first: what it makes of texts and train images is shared with the changed views
    clean = measure(view)
    found = {
        name: [measure(view.changed(change)) for change in changes[name]] for name in corruptions
    }
    cell = Result(
        view.data.name,
        "robustness",
        {},
        counts={"images": len(view.images), "skipped": view.skipped},
    )
    cell.counts |= {"corruptions": len(corruptions), "severities": len(severities)}
    for task in tasks:
        table = {name: [at[task] for at in found[name]] for name in corruptions}
        corrupted = float(np.mean([np.mean(row) for row in table.values()]))
        cell.metrics |= {f"{task}_clean": clean[task], f"{task}_corrupted": corrupted}
        if clean[task]:
            cell.metrics[f"{task}_relative"] = corrupted / clean[task]
        cell.details[task] = table
    cell.details["severities"] = list(severities)
    return cell
