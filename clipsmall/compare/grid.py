"""A comparison, described: a grid of settings in YAML, the budget that they share, and what is
measured.
"""

import itertools
import json
import shlex
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from clipsmall.config import Config
from clipsmall.config.objectives import Section
from clipsmall.config.reader import lay_over, of_kind, spelled_out, validated
from clipsmall.evaluation.tasks import TASKS
from clipsmall.storage.yaml_files import ConfigError, read_yaml

Tree = dict[str, Any]
# seed of trials: more seeds for the runs leave it alone
TRIED = 1000
SHORT = {"batch_size": "data.batch_size"}
COUNTS = ("n", "unfit", "failed", "missing", "seed", "seeds", "state", "error", "folder")
TESTS = ("difference", "low", "high", "t", "df", "p", "p Holm")
NUMBERS = (
    "pairs",
    "steps",
    "lr",
    "logit_scale",
    "logit_bias",
    "seconds",
    "pairs_per_second",
    "memory",
    "skipped",
)
# of the tables, beside levels and metrics
COLUMNS = (*COUNTS, *TESTS, *NUMBERS, "loss", "accuracy")


def nested(tree: Any) -> Tree:
    """`{"optim.lr": 1e-3}` -> `{"optim": {"lr": 1e-3}}`; null is an empty section. Raises
    ValueError.
    """
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"must hold `section.field: value`, not {tree!r}")
    found: Tree = {}
    for name, value in tree.items():
        value = (
            nested(value)
            if isinstance(value, dict) and name not in ("name", "objective.name")
            else value
        )
        for part in reversed(str(name).split(".")):
            value = {part: value}
        found = lay_over(found, spelled_out(value))
    return found


def _levels(axes: Any) -> Any:
    """`batch_size: [16, 32]` -> `batch_size: {16: {data.batch_size: 16}, ...}`."""
    if not isinstance(axes, dict):
        return axes
    found = {}
    for axis, levels in axes.items():
        if isinstance(levels, list):
            if strange := [level for level in levels if isinstance(level, list | dict)]:
                raise ValueError(
                    f"{axis}: {strange[0]} needs a name, as in {axis}: {{NAME: {{section.field: value}}}}"
                )
            levels = {level: {SHORT.get(axis, axis): level} for level in levels}
        if isinstance(levels, dict):
            levels = {str(name): nested(tree) for name, tree in levels.items()}
        found[str(axis)] = levels
    return found


Changes = Annotated[Tree, BeforeValidator(nested)]
Axes = Annotated[
    dict[str, Annotated[dict[str, Tree], Field(min_length=1)]], BeforeValidator(_levels)
]


class Budget(Section):
    """What all runs have alike: pairs, or seconds of training; and memory, if given: then the batch
    follows from it.
    """

    pairs: int | None = Field(None, ge=1, description="pairs of each run")
    seconds: float | None = Field(
        None, gt=0, description="of training; each setting's speed is tried beforehand"
    )
    trial: int = Field(4_000, ge=1, description="pairs of the run that tries the speed")
    memory: float | None = Field(
        None, gt=0, description="GiB of a rank: each takes its largest batch that fits"
    )
    ranks: int = Field(
        1, ge=1, description="ranks of a run, as `launch` starts them: for the memory of one"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="that runs train on, for its memory; auto: mine"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of a run's pairs")

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if (self.pairs is None) == (self.seconds is None):
            raise ValueError("give either pairs (equal samples) or seconds (equal time)")
        return self

    @property
    def words(self) -> str:
        same = (
            f"{self.pairs:,} pairs a run"
            if self.pairs
            else f"as many pairs as {self.seconds:g} s of training take"
        )
        return same + (f", the largest batch within {self.memory:g} GiB" if self.memory else "")


class Rates(Section):
    """Learning rates that are tried, on a seed that the comparison does not use."""

    values: list[Annotated[float, Field(gt=0)]] = Field(min_length=2)
    pairs: int = Field(ge=1, description="of each trial")
    at: dict[str, str] = Field(
        {}, description="axis: level where it is tried; the others have their own rate each"
    )
    metric: str = Field(
        "", description="that decides; default: the first. A steady one: short runs are noisy"
    )
    seed: int = Field(TRIED, ge=0, description="of the trials, which no run has")


class Gallery(Section):
    at: dict[str, str] = Field(
        {}, description="axis: level of the models shown; others: each level's own best"
    )
    models: int = Field(6, ge=0, description="at most")


class Comparison(Section):
    """A study. The first metric decides; every metric is a share of which more is better."""

    title: str
    out: str
    config: Annotated[
        list[str],
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
        Field(min_length=1),
    ]
    common: Changes = Field({}, description="laid over these configs")
    axes: Axes = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    budget: Budget
    lr: Rates | None = None
    metrics: dict[str, str] = Field(min_length=1, description="column: evaluation/metric")
    baseline: dict[str, str] = Field({}, description="axis: level; default: the first axis's first")
    curve: int = Field(0, ge=0, description="evaluations on the way")
    launch: str = Field("", description="command that trains; default: one process of this Python")
    gallery: Gallery = Gallery()

    @model_validator(mode="after")
    def _levels_exist(self) -> "Comparison":
        named = [
            ("baseline", self.baseline),
            ("gallery.at", self.gallery.at),
            ("lr.at", self.lr.at if self.lr else {}),
        ]
        for field, levels in named:
            for axis, level in levels.items():
                if level not in self.axes.get(axis, {}):
                    known = ", ".join(self.axes.get(axis, self.axes))
                    raise ValueError(
                        f"{field}: {axis}={level} is none of the grid's; there is {known}"
                    )
        if self.lr and self.lr.metric and self.lr.metric not in self.metrics:
            raise ValueError(
                f"lr.metric={self.lr.metric} is none of the metrics; there is {', '.join(self.metrics)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names one twice")
        if self.lr and self.lr.seed in self.seeds:
            raise ValueError(
                f"lr.seed={self.lr.seed} is one of seeds; learning rates are tried on another"
            )
        shlex.split(self.launch)
        return self

    @model_validator(mode="after")
    def _columns_are_free(self) -> "Comparison":
        names = [*self.axes, *self.metrics, *COLUMNS]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"axes, metrics: {twice[0]!r} is a column of the table already; take another name"
            )
        for axis, levels in self.axes.items():
            for level, tree in levels.items():
                if taken := {"seed", "out", "resume"} & set(tree):
                    raise ValueError(
                        f"axes: {axis}={level} sets {min(taken)}, which the comparison sets"
                    )
                if self.lr and "lr" in tree.get("optim", {}):
                    raise ValueError(
                        f"axes: {axis}={level} sets optim.lr, and `lr` would try others in its place"
                    )
        return self

    @property
    def batch_axes(self) -> list[str]:
        """Axes of which each level is a batch size and nothing else."""
        return [
            axis
            for axis, levels in self.axes.items()
            if all(_sized(tree) for tree in levels.values())
        ]

    @property
    def spent(self) -> str:
        """The budget in words."""
        own = any(
            "pairs" in tree.get("optim", {})
            for levels in self.axes.values()
            for tree in levels.values()
        )
        return self.budget.words + (", where the grid does not say otherwise" if own else "")

    @property
    def against(self) -> dict[str, str]:
        """The baseline's levels."""
        first = next(iter(self.axes))
        return self.baseline or {first: next(iter(self.axes[first]))}

    @property
    def metric(self) -> str:
        return next(iter(self.metrics))


def _sized(tree: Tree) -> bool:
    return set(tree) == {"data"} and set(tree["data"]) == {"batch_size"}


class GridSetting(NamedTuple):
    """A cell of the grid, which each seed runs once."""

    # axis -> level
    levels: dict[str, str]
    # its config, without budget and seed
    tree: Tree

    @property
    def title(self) -> str:
        return ", ".join(self.levels.values())


def load(path: str) -> Comparison:
    """Raises ConfigError with all that is wrong with the file and with the runs that it
    describes.
    """
    comparison = of_kind(Comparison, read_yaml(path), path)
    try:
        grid = settings(comparison)
    except ConfigError as error:
        raise ConfigError(f"{path}: config: {error}") from None
    wrong = dict[str, str]()
    same = dict[str, str]()
    for setting in grid:
        try:
            check(comparison, validated(setting.tree))
        except ConfigError as error:
            wrong.setdefault(str(error), setting.title)
        first = same.setdefault(
            json.dumps(setting.tree, sort_keys=True, default=str), setting.title
        )
        if first != setting.title:
            wrong.setdefault(f"trains the same as {first}: a level changes nothing", setting.title)
    if wrong:
        raise ConfigError("\n".join(f"{path}: {title}: {line}" for line, title in wrong.items()))
    return comparison


def check(comparison: Comparison, config: Config) -> None:
    """Raises ConfigError for a metric that the run's evaluations do not give, and a budget below
    one batch.
    """
    least = min(
        [each for each in (comparison.budget.pairs, comparison.lr and comparison.lr.pairs) if each],
        default=0,
    )
    if least and least < config.data.batch_size:
        raise ConfigError(
            f"{least} pairs (budget.pairs, lr.pairs) are less than one batch of {config.data.batch_size}"
        )
    known = []
    # beginnings of metrics' names where a task cannot list them before they are measured
    open_ended = []
    for each in config.evaluate.all:
        if each.task not in TASKS:
            raise ConfigError(f"evaluate.tasks: no such task: {each.task!r}")
        task = TASKS[each.task]
        known += [task.log_name(each.name, metric) for metric in task.metrics]
        if not task.metrics:
            open_ended.append(task.log_name(each.name, ""))
    for column, key in comparison.metrics.items():
        if key not in known and not key.startswith(tuple(open_ended)):
            raise ConfigError(
                f"metrics.{column}: {key!r} is not measured; there is {', '.join(known) or 'nothing'}"
            )


def settings(comparison: Comparison) -> list[GridSetting]:
    """The product of all axes, the last running fastest."""
    base: Tree = {}
    for file in comparison.config:
        base = lay_over(base, spelled_out(read_yaml(file)))
    base = lay_over(base, comparison.common)
    found = []
    for chosen in itertools.product(*(levels.items() for levels in comparison.axes.values())):
        tree = base
        for _, changes in chosen:
            tree = lay_over(tree, changes)
        found.append(
            GridSetting(dict(zip(comparison.axes, (name for name, _ in chosen), strict=True)), tree)
        )
    return found
