"""All evaluation tasks by name. Each has its own file, which ends with its `Task`."""

from clipsmall.evaluation.task import Task, TaskOption
from clipsmall.evaluation.tasks import (
    calibration,
    candidates,
    geometry,
    knn,
    linear_probe,
    matching,
    retrieval,
    robustness,
    top1,
    zero_shot,
)

TASKS: dict[str, Task] = {
    "zero_shot": zero_shot.TASK,
    "retrieval": retrieval.TASK,
    "linear_probe": linear_probe.TASK,
    "knn": knn.TASK,
    "robustness": robustness.TASK,
    "calibration": calibration.TASK,
    "geometry": geometry.TASK,
    "matching": matching.TASK,
    "top1": top1.TASK,
    "candidates": candidates.TASK,
}


def task_options() -> dict[str, TaskOption]:
    """The options of all tasks by name."""
    found: dict[str, TaskOption] = {}
    for name, task in TASKS.items():
        for key, option in task.options.items():
            # tasks that share an option name must share the object
            first = found.setdefault(key, option)
            if first != option:
                raise TypeError(
                    f"option {key} of {name}: another task has a different option of this name"
                )
    return found
