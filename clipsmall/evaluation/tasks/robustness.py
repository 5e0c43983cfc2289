"""Robustness: a model's results on corrupted images, relative to clean ones."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipsmall.evaluation.corruptions import COMMON, OPTIONS, SEVERITIES, Corruption
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task
from clipsmall.evaluation.view import DataView

NAME = "robustness"


def robustness(
    view: DataView,
    tasks: Mapping[str, Callable[[DataView], float]],
    corruptions: Sequence[str] = COMMON,
    severities: Sequence[int] = SEVERITIES,
) -> Result:
    """Measure other tasks on clean images, and under every corruption at every severity.

    For each task: `{task}_clean`, `{task}_corrupted` (the mean over severities, then corruptions),
    `{task}_relative` (corrupted / clean); `details` has each corruption's values by severity. Text
    features and trained probes are reused from the clean images. Each corruption and severity costs
    one pass through the image tower.

    Args:
        tasks: by name, functions of a view that return the task's main metric.

    Raises:
        ValueError: unknown corruption or severity, or no task to repeat.
    """
    if not tasks or not corruptions or not severities:
        raise ValueError(
            "robustness needs a task to repeat (as zero_shot), a corruption and a severity"
        )
    side = view.encoder.model.spec.size
    changes: dict[str, list[Corruption]] = {}
    for name in corruptions:
        changes[name] = [Corruption(name, severity, side) for severity in severities]

    def measure(some_view: DataView) -> dict[str, float]:
        return {task: main_metric(some_view) for task, main_metric in tasks.items()}

    # clean images first: text features and probes made here are reused for corrupted images
    clean = measure(view)
    # corruption -> one dict per severity: task -> metric
    corrupted: dict[str, list[dict[str, float]]] = {}
    for name in corruptions:
        corrupted[name] = [measure(view.changed(change)) for change in changes[name]]
    result = Result(
        view.data.name,
        NAME,
        {},
        counts={
            "images": len(view.images),
            "skipped": view.skipped,
            "corruptions": len(corruptions),
            "severities": len(severities),
        },
    )
    for task in tasks:
        table = {name: [metrics[task] for metrics in corrupted[name]] for name in corruptions}
        means = [np.mean(row) for row in table.values()]
        mean = float(np.mean(means))
        result.metrics[f"{task}_clean"] = clean[task]
        result.metrics[f"{task}_corrupted"] = mean
        if clean[task]:
            result.metrics[f"{task}_relative"] = mean / clean[task]
        result.details[task] = table
    result.details["severities"] = list(severities)
    return result


TASK = Task(NAME, robustness, options=OPTIONS, repeats=True)
