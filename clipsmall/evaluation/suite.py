"""Measures tasks on data sets; each result is a file, and an up-to-date file is not made again."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipsmall.data import ShardError
from clipsmall.distributed import world
from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.results import Result, cell_path, write_cell
from clipsmall.evaluation.sets import DataSet
from clipsmall.evaluation.task import Task
from clipsmall.evaluation.tasks import TASKS, task_options
from clipsmall.evaluation.view import DataView

# Part of every key: raise it when a change of code changes a task's numbers.
VERSION = 2


@dataclass(frozen=True)
class TaskRequest:
    """A request for one result: a task on a data set."""

    task: str
    data: DataSet
    # options of all tasks by name, and `empty_classes`, which is for `DataView`
    options: Mapping[str, Any]
    # the tasks that this task repeats, if it repeats any
    repeated: tuple[str, ...] = ()

    @property
    def entry(self) -> Task:
        return TASKS[self.task]


def option_values(**given: Any) -> dict[str, Any]:
    """The options of all tasks: the given values, and defaults for the rest.

    Raises:
        ValueError: an invalid value; the message names the option.
    """
    found = {}
    for name, option in task_options().items():
        value = given.get(name, option.default)
        found[name] = option.value(name, value)

    # an option of the view, not of a task
    empty_classes = given.get("empty_classes", False)
    found["empty_classes"] = bool(empty_classes)
    return found


def requests(data: DataSet, tasks: Sequence[str], options: Mapping[str, Any]) -> list[TaskRequest]:
    """One request per task; if no tasks are given, the default tasks of the data set."""
    made_for = [name for name, task in TASKS.items() if task.default_for(data)]
    # a task like robustness repeats all requested tasks that are repeatable
    can_repeat = {name for name in tasks if TASKS[name].repeatable}
    repeatable = sorted(can_repeat) or made_for

    found = []
    for name in dict.fromkeys(tasks or made_for):
        repeated: tuple[str, ...] = ()
        if TASKS[name].repeats:
            repeated = tuple(repeatable)
        found.append(TaskRequest(name, data, options, repeated))
    return found


def measure(view: DataView, request: TaskRequest) -> Result:
    """The result of a task on the data set of `view`.

    Raises:
        ValueError: the data set does not fit the task, or features are not finite.
    """
    task = request.entry
    if view.data.kind == "multilabel" and not task.multilabel:
        names = [name for name, other in TASKS.items() if other.multilabel]
        fitting = " and ".join(names)
        raise ValueError(f"this task cannot run on a multi-label set; use {fitting}")
    arguments = task.chosen(request.options)
    if task.repeats:
        repeated = {}
        for name in request.repeated:
            repeated[name] = _main_metric(TASKS[name], request.options)
        arguments["tasks"] = repeated
    result = task.measure(view, **arguments)
    assert result.task == task.result_name, f"{request.task} returns a result of {result.task}"
    return result


def _main_metric(task: Task, options: Mapping[str, Any]) -> Callable[[DataView], float]:
    """A function of a view that returns the task's main metric on it."""
    run = partial(task.measure, **task.chosen(options))

    def main_metric(view: DataView) -> float:
        result = run(view)
        values = task.main_values(result.metrics)
        return float(np.mean(values))

    return main_metric


def key_of(model_digest: str, request: TaskRequest) -> str:
    """The digest of everything a result depends on: a file with this key is up to date.

    Keys are stored in all existing result files: do not change what is hashed, nor the order.
    """
    tasks = [TASKS[name] for name in (*request.repeated, request.task)]
    learns = any(task.learns for task in tasks)
    options: dict[str, Any] = {}
    for task in tasks:
        options |= task.chosen(request.options)
    if any(task.matches == "classes" for task in tasks):
        options["empty_classes"] = request.options["empty_classes"]
    parts = [
        VERSION,
        model_digest,
        request.data.digest(learns),
        request.task,
        request.repeated,
        options,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write_result(
    request: TaskRequest, result: Result, folder: Path, model: str, weights: str
) -> Path:
    """Write a result's file, after the further files that its task writes beside it."""
    path = cell_path(folder, result.dataset, weights, model, result.task)
    if request.entry.write_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        # these first: once the result's own file exists, it counts as done
        request.entry.write_files(result, path)
    return write_cell(result, folder, model, weights)


@dataclass
class NamedModel:
    """A model, and how results call it."""

    name: str
    # weight tag; "" is replaced by the first digits of the weights' digest
    pretrained: str
    encoder: Encoder

    def __post_init__(self) -> None:
        self.digest = self.encoder.digest()
        self.pretrained = self.pretrained or self.digest[:8]


def evaluate(
    model: NamedModel,
    sets: Sequence[DataSet],
    tasks: Sequence[str],
    options: Mapping[str, Any],
    out: Path,
) -> list[str]:
    """Measure the missing results of a model; returns one line per failure.

    A result is missing unless its file has the key of these weights, data and options. A failure is
    reported and the next result is measured. Every rank must call; the first one writes.
    """
    asked = list[TaskRequest]()
    for data in sets:
        asked += requests(data, tasks, options)
    keys = _keys_to_do(model, asked, out)
    failures = list[str]()
    view: DataView | None = None
    for request, key in zip(asked, keys, strict=True):
        if not key:
            continue
        # keep the features of only one data set in memory
        if view is None or view.data is not request.data:
            view = DataView(model.encoder, request.data, options["empty_classes"])
        try:
            result = measure(view, request)
        except Exception as error:
            of_the_input = isinstance(error, ValueError) and not isinstance(error, ShardError)
            if world.size() > 1 and not of_the_input:
                # it may have happened on this rank only, and the others would wait for ever
                raise
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            failures.append(f"{model.name} on {request.data.name}, {request.task}: {kind}{error}")
            continue
        result.key = key
        if world.rank() == 0:
            path = write_result(request, result, out, model.name, model.pretrained)
            print(f"written to {path}", file=sys.stderr)
    return failures


def _keys_to_do(model: NamedModel, asked: Sequence[TaskRequest], out: Path) -> list[str]:
    """The key of each request, or "" if its result is up to date.

    The first rank decides for all, so that all ranks measure the same.
    """
    keys = list[str]()
    for request in asked:
        key = key_of(model.digest, request)
        name = request.entry.result_name
        path = cell_path(out, request.data.name, model.pretrained, model.name, name)
        is_there = _written_key(path) == key
        keys.append("" if is_there else key)

    own = json.dumps(keys).encode()
    gathered = world.gather_bytes(own, model.encoder.device)
    first: list[str] = json.loads(gathered[0])
    return first


def _written_key(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        cell = json.loads(text)
        return str(cell.get("key", ""))
    except (OSError, ValueError):
        return ""
