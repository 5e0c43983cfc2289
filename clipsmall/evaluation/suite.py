"""Results of a model: any task on any data set, each measured once and kept as a file."""

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

# part of every key: to be raised when a task's numbers change
VERSION = 2


@dataclass(frozen=True)
class TaskRequest:
    """One result that is asked for: a task on a data set."""

    task: str
    data: DataSet
    # of all tasks, by name; and `empty_classes`, which a `DataView` takes
    options: Mapping[str, Any]
    # by a task that repeats others: which
    repeated: tuple[str, ...] = ()

    @property
    def entry(self) -> Task:
        return TASKS[self.task]


def option_values(**given: Any) -> dict[str, Any]:
    """The options of all tasks: those given, the others' defaults.

    Raises:
        ValueError: a value that an option cannot have; the message names the option.
    """
    found = {}
    for name, option in task_options().items():
        value = given.get(name, option.default)
        found[name] = option.value(name, value)

    # of the view, not of a task
    empty_classes = given.get("empty_classes", False)
    found["empty_classes"] = bool(empty_classes)
    return found


def requests(data: DataSet, tasks: Sequence[str], options: Mapping[str, Any]) -> list[TaskRequest]:
    """The tasks on a data set, each once; of no tasks, those the set is made for."""
    made_for = [name for name, task in TASKS.items() if task.default_for(data)]
    # what a task like robustness repeats: of those asked for, the ones that can be repeated
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
        raise ValueError(f"a multi-label set has no such cell, only {fitting}")
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
    """The digest of all that a result depends on: its file is done if it has this key.

    Keys are in the files of everybody's results: what goes in, and in which order, stays.
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
    """Write a result's file, and first what else its task writes beside it."""
    path = cell_path(folder, result.dataset, weights, model, result.task)
    if request.entry.write_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        # first: a result whose file is there counts as done
        request.entry.write_files(result, path)
    return write_cell(result, folder, model, weights)


@dataclass
class NamedModel:
    """A model under its name in the results."""

    name: str
    # a weight tag; "" = the first digits of the weights' digest
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
    """Measure the results of a model that are not there yet; returns one line per failure.

    A result is there when its file says that it was made from these weights, these data and these
    options. One that fails is reported and left out, the others go on. Every rank must call; the
    first one writes.
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
        # features of one data set at a time
        if view is None or view.data is not request.data:
            view = DataView(model.encoder, request.data, options["empty_classes"])
        try:
            result = measure(view, request)
        except Exception as error:
            of_the_input = isinstance(error, ValueError) and not isinstance(error, ShardError)
            if world.size() > 1 and not of_the_input:
                # perhaps of this rank alone, and then the others are waiting for it
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
    """For each request its key, or "" if its result is there.

    As the first rank finds it, so that all ranks measure the same.
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
