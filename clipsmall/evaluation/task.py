"""The interface of an evaluation task: a `Task` in `TASKS`, with its options."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipsmall.evaluation.results import Result
from clipsmall.evaluation.sets import DataSet


@dataclass(frozen=True)
class TaskOption:
    """An option of a task: a flag of `evaluate`, a field of a run's config, part of a result's key.

    It has the type of `default`; if that is a tuple, it takes several values. `choices` and `least`
    limit the values.
    """

    default: Any
    help: str
    choices: Sequence[Any] = ()
    least: float = -math.inf

    @property
    def type(self) -> type:
        """The type of one value."""
        first = self.default[0] if isinstance(self.default, tuple) else self.default
        return type(first)

    def add_to(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Add the option to a parser as the flag `--name`."""
        if isinstance(self.default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=self.help)
            return
        several: dict[str, Any] = {}
        if isinstance(self.default, tuple):
            several = {"nargs": "+", "metavar": "VALUE"}
        parser.add_argument(
            f"--{name}",
            type=self.type,
            default=self.default,
            choices=self.choices or None,
            help=self.help,
            **several,
        )

    def value(self, name: str, given: Any) -> Any:
        """`given`, checked and converted. Raises ValueError, which names the option."""
        if not isinstance(self.default, tuple):
            return self._one(name, given)
        # a single value needs no list around it
        many = given if isinstance(given, list | tuple) else [given]
        if not many:
            raise ValueError(f"{name}: must hold one value at least")
        return tuple(self._one(name, each) for each in many)

    def _one(self, name: str, given: Any) -> Any:
        kind = self.type
        # an integer is accepted for a float (YAML reads 1 as int), but `true` is not a number
        allowed = (int, float) if kind is float else (kind,)
        is_odd_bool = isinstance(given, bool) and kind is not bool
        if is_odd_bool or not isinstance(given, allowed):
            raise ValueError(f"{name}={given}: must be of type {kind.__name__}")

        value = kind(given)
        if self.choices and given not in self.choices:
            words = ", ".join(str(choice) for choice in self.choices)
            raise ValueError(f"{name}={given}: must be one of {words}")
        # options that are names have no least value, and cannot be compared with one
        is_limited = self.least > -math.inf
        if is_limited and not self.least <= value < math.inf:
            number = "a finite number of at least" if kind is float else "at least"
            raise ValueError(f"{name}={given}: must be {number} {self.least:g}")
        return value


@dataclass(frozen=True)
class PageTable:
    """The table of a task's results in a run's report, with one row per data set."""

    title: str
    metrics: tuple[str, ...]
    # the metrics among them that are shown with their chance level
    with_chance: tuple[str, ...]
    counts: tuple[str, ...]
    # for several rows per data set: prefix of a metric's name -> label of its row
    rows: Mapping[str, str] = field(default_factory=lambda: {"": ""})


@dataclass(frozen=True)
class Task:
    """An evaluation task: how it is measured, and what the rest of the package needs to know.

    `measure(view, **options)` returns the result. A task with `repeats` also gets `tasks`, a dict:
    name of another task -> function of a view that returns this task's main metric.
    """

    # name in results and file names: CLIP_benchmark's if it has this task
    result_name: str
    measure: Callable[..., Result]
    # options of `measure` by name; tasks that share an option name must share the `TaskOption`
    options: Mapping[str, TaskOption] = field(default_factory=dict)
    # what images are compared with: class names, or captions (images without a caption are
    # left out); "" = neither
    matches: Literal["classes", "captions", ""] = ""
    # whether the task runs on a data set when no task is requested
    default_for: Callable[[DataSet], bool] = lambda data: False
    # works on multi-label sets
    multilabel: bool = False
    # learns from training images
    learns: bool = False
    # groups of metrics; the main metric is the mean of the first group that a result has
    main: tuple[tuple[str, ...], ...] = ()
    # robustness may repeat this task on corrupted images and compare its main metric
    repeatable: bool = False
    # this task repeats other tasks
    repeats: bool = False
    # the metrics' names, if they are known before measuring; () = unknown
    metrics: tuple[str, ...] = ()
    # in a run's log: True = DATASET/METRIC, False = TASK/DATASET/METRIC
    short_in_log: bool = False
    # key of a line in DataComp's eval_results.jsonl; "" = DataComp has no such task
    datacomp_key: str = ""
    # layout in a run's report; None = one row per metric
    page_table: PageTable | None = None
    # writes further files beside the result's file, whose path is the second argument
    write_files: Callable[[Result, Path], None] | None = None

    def chosen(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """This task's options among those of all tasks."""
        return {name: options[name] for name in self.options}

    def main_values(self, metrics: Mapping[str, float]) -> list[float]:
        """The values of the main metrics; [] if the result has none of them."""
        for group in self.main:
            is_complete = all(name in metrics for name in group)
            if is_complete:
                return [metrics[name] for name in group]
        return []

    def log_name(self, dataset: str, metric: str) -> str:
        """The name of a metric in a run's log."""
        name = f"{dataset}/{metric}"
        return name if self.short_in_log else f"{self.result_name}/{name}"
