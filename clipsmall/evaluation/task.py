"""What the rest of the package may ask of an evaluation task: its entry in `TASKS`."""

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
    """An option of a task: a flag of `evaluate`, a key of a run's config, part of a result's key.

    Its type is that of `default`; a tuple takes several values. `choices` and `least` limit it.
    """

    default: Any
    help: str
    choices: Sequence[Any] = ()
    least: float = -math.inf

    @property
    def type(self) -> type:
        """Of one value."""
        first = self.default[0] if isinstance(self.default, tuple) else self.default
        return type(first)

    def add_to(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Add it as the flag `--name`."""
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
        """`given` as this option's value. Raises ValueError, with `name`, if it cannot be that."""
        if not isinstance(self.default, tuple):
            return self._one(name, given)
        # a single value may stand without a list around it
        many = given if isinstance(given, list | tuple) else [given]
        if not many:
            raise ValueError(f"{name}: must hold one value at least")
        return tuple(self._one(name, each) for each in many)

    def _one(self, name: str, given: Any) -> Any:
        kind = self.type
        # in YAML, 1 is a float, too, but `true` is no number
        allowed = (int, float) if kind is float else (kind,)
        is_odd_bool = isinstance(given, bool) and kind is not bool
        if is_odd_bool or not isinstance(given, allowed):
            raise ValueError(f"{name}={given}: must be of type {kind.__name__}")

        value = kind(given)
        if self.choices and given not in self.choices:
            words = ", ".join(str(choice) for choice in self.choices)
            raise ValueError(f"{name}={given}: must be one of {words}")
        # names have no least value, and do not compare with one
        is_limited = self.least > -math.inf
        if is_limited and not self.least <= value < math.inf:
            number = "a finite number of at least" if kind is float else "at least"
            raise ValueError(f"{name}={given}: must be {number} {self.least:g}")
        return value


@dataclass(frozen=True)
class PageTable:
    """The table of a task's results on a run's page, with one row per data set."""

    title: str
    metrics: tuple[str, ...]
    # those of `metrics` that stand beside the value of a guess
    with_chance: tuple[str, ...]
    counts: tuple[str, ...]
    # several rows per data set: how a metric's name begins -> what the row is called
    rows: Mapping[str, str] = field(default_factory=lambda: {"": ""})


@dataclass(frozen=True)
class Task:
    """A task: how it is measured, and all that others have to know of it.

    `measure(view, **options)` returns the result; a task that `repeats` others also gets
    `tasks`, which maps their names to functions of a view that return their main metric.
    """

    # in results and file names: CLIP_benchmark's, where it has the task
    result_name: str
    measure: Callable[..., Result]
    # of `measure`, by name; two tasks with an option of one name share one `Option`
    options: Mapping[str, TaskOption] = field(default_factory=dict)
    # what it matches images with: the classes of a data set, or captions (images without a
    # caption do not count); "" = neither
    matches: Literal["classes", "captions", ""] = ""
    # is it measured on such a data set if no task is asked for?
    default_for: Callable[[DataSet], bool] = lambda data: False
    # works on multi-label sets
    multilabel: bool = False
    # learns from training images
    learns: bool = False
    # metrics whose mean is the main one; the first of these groups that a result has
    main: tuple[tuple[str, ...], ...] = ()
    # robustness can repeat it on corrupted images, and compare the main metric
    repeatable: bool = False
    # repeats such tasks
    repeats: bool = False
    # metrics by name, for those who must know them before they are measured; () = who knows
    metrics: tuple[str, ...] = ()
    # in a run's log its metrics are DATASET/METRIC; others' are TASK/DATASET/METRIC
    short_in_log: bool = False
    # key of a line in DataComp's eval_results.jsonl; "" = DataComp has no such task
    datacomp_key: str = ""
    # on a run's page; None = one row per metric
    page_table: PageTable | None = None
    # writes more files beside the result's, whose path it is given
    write_files: Callable[[Result, Path], None] | None = None

    def chosen(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """This task's options among those of all tasks."""
        return {name: options[name] for name in self.options}

    def main_values(self, metrics: Mapping[str, float]) -> list[float]:
        """The values of the main metrics; [] if a result does not have them."""
        for group in self.main:
            is_complete = all(name in metrics for name in group)
            if is_complete:
                return [metrics[name] for name in group]
        return []

    def log_name(self, dataset: str, metric: str) -> str:
        """The name of a metric in a run's log."""
        name = f"{dataset}/{metric}"
        return name if self.short_in_log else f"{self.result_name}/{name}"
