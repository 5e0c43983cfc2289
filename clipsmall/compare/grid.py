"""A comparison as described in YAML: a grid of settings, the budget, and the metrics."""

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

# a config or a part of it, as read from YAML
Tree = dict[str, Any]
# Seed of trials; large, so that adding seeds to a grid does not collide with it.
TRIAL_SEED = 1000
# Short names for axes.
SHORT_NAMES = {"batch_size": "data.batch_size"}
# Columns of the written tables, beside levels and metrics.
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
COLUMNS = (*COUNTS, *TESTS, *NUMBERS, "loss", "accuracy")


def nested_tree(tree: Any) -> Tree:
    """`{"optim.lr": 1e-3}` -> `{"optim": {"lr": 1e-3}}`; null is an empty section.

    Raises:
        ValueError: neither a mapping nor null.
    """
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"must hold `section.field: value`, not {tree!r}")

    found: Tree = {}
    for name, value in tree.items():
        # a dict as an objective's name is a mix {objective: weight}, not a section
        if isinstance(value, dict) and name not in ("name", "objective.name"):
            value = nested_tree(value)

        for part in reversed(str(name).split(".")):
            value = {part: value}

        found = lay_over(found, spelled_out(value))

    return found


def _named_levels(axes: Any) -> Any:
    """`batch_size: [16, 32]` -> `batch_size: {16: {data.batch_size: 16}, ...}`."""
    if not isinstance(axes, dict):
        # pydantic will report what is wrong
        return axes

    found = {}
    for axis, levels in axes.items():
        if isinstance(levels, list):
            levels = _levels_of_list(axis, levels)

        if isinstance(levels, dict):
            levels = {str(name): nested_tree(tree) for name, tree in levels.items()}

        found[str(axis)] = levels

    return found


def _levels_of_list(axis: str, levels: list[Any]) -> dict[Any, Tree]:
    """Levels from a list of values of the config field `axis`."""
    field = SHORT_NAMES.get(axis, axis)
    for level in levels:
        if isinstance(level, list | dict):
            example = f"{axis}: {{NAME: {{section.field: value}}}}"
            raise ValueError(f"{axis}: {level} needs a name, as in {example}")
    return {level: {field: level} for level in levels}


Changes = Annotated[Tree, BeforeValidator(nested_tree)]
Axes = Annotated[
    dict[str, Annotated[dict[str, Tree], Field(min_length=1)]],
    BeforeValidator(_named_levels),
]


class Budget(Section):
    """What every run may spend: pairs or seconds of training, and perhaps a memory limit.

    With a memory limit, each setting takes the largest batch that fits.
    """

    pairs: int | None = Field(None, ge=1, description="pairs of each run")
    seconds: float | None = Field(
        None, gt=0, description="seconds of training; a trial measures each setting's speed first"
    )
    trial: int = Field(4_000, ge=1, description="pairs of the trial that measures the speed")
    memory: float | None = Field(
        None, gt=0, description="GiB per rank: each setting takes its largest batch that fits"
    )
    ranks: int = Field(
        1, ge=1, description="ranks that `launch` starts; used to plan memory per rank"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device to plan memory for; auto: the one of this machine"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="warm-up, as a fraction of a run's pairs")

    @model_validator(mode="after")
    def _one_of_pairs_and_seconds(self) -> "Budget":
        if (self.pairs is None) == (self.seconds is None):
            raise ValueError("give either pairs (equal samples) or seconds (equal time)")
        return self

    @property
    def words(self) -> str:
        """The budget in words."""
        if self.pairs:
            words = f"{self.pairs:,} pairs per run"
        else:
            words = f"as many pairs as {self.seconds:g} s of training take"

        if self.memory:
            words += f", the largest batch within {self.memory:g} GiB"

        return words


class Rates(Section):
    """Learning rates to try, in short trials with a seed that no run of the comparison uses."""

    values: list[Annotated[float, Field(gt=0)]] = Field(min_length=2)
    pairs: int = Field(ge=1, description="pairs of each trial")
    at: dict[str, str] = Field(
        {},
        description="axis: level where rates are tried; levels of other axes get their own rate",
    )
    metric: str = Field(
        "",
        description="metric that decides [the first]; take a steady one, as trials are short",
    )
    seed: int = Field(TRIAL_SEED, ge=0, description="seed of the trials, which no run may have")


class Gallery(Section):
    """Which models the comparison's page shows side by side."""

    at: dict[str, str] = Field(
        {}, description="axis: level of the models shown; on other axes the best level is taken"
    )
    models: int = Field(6, ge=0, description="most models to show")


class Comparison(Section):
    """A comparison. The first metric decides; every metric is a fraction, and higher is better."""

    title: str
    out: str
    config: Annotated[
        list[str],
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
        Field(min_length=1),
    ]
    common: Changes = Field({}, description="config changes for all runs")
    axes: Axes = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    budget: Budget
    lr: Rates | None = None
    metrics: dict[str, str] = Field(min_length=1, description="column: evaluation/metric")
    baseline: dict[str, str] = Field({}, description="axis: level; default: the first axis's first")
    curve: int = Field(0, ge=0, description="evaluations during training")
    launch: str = Field("", description="command that trains; default: one process of this Python")
    gallery: Gallery = Gallery()

    @model_validator(mode="after")
    def _levels_exist(self) -> "Comparison":
        named = {
            "baseline": self.baseline,
            "gallery.at": self.gallery.at,
            "lr.at": self.lr.at if self.lr else {},
        }
        for field, levels in named.items():
            for axis, level in levels.items():
                if level in self.axes.get(axis, {}):
                    continue

                known = ", ".join(self.axes.get(axis, self.axes))
                raise ValueError(f"{field}: {axis}={level} is not in the grid; there is {known}")

        return self

    @model_validator(mode="after")
    def _seeds_and_rates_agree(self) -> "Comparison":
        if self.lr and self.lr.metric and self.lr.metric not in self.metrics:
            known = ", ".join(self.metrics)
            raise ValueError(f"lr.metric={self.lr.metric} is not a metric here; there is {known}")

        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names one twice")
        if self.lr and self.lr.seed in self.seeds:
            raise ValueError(
                f"lr.seed={self.lr.seed} is one of seeds; learning rates are tried on another"
            )

        # raises ValueError for an open quote
        shlex.split(self.launch)
        return self

    @model_validator(mode="after")
    def _columns_are_free(self) -> "Comparison":
        names = [*self.axes, *self.metrics, *COLUMNS]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"axes, metrics: {twice[0]!r} is a column of the table already; take another name"
            )

        return self

    @model_validator(mode="after")
    def _levels_set_what_they_may(self) -> "Comparison":
        for axis, levels in self.axes.items():
            for level, tree in levels.items():
                taken = {"seed", "out", "resume"} & set(tree)
                if taken:
                    raise ValueError(
                        f"axes: {axis}={level} sets {min(taken)}, which the comparison sets"
                    )
                if self.lr and "lr" in tree.get("optim", {}):
                    raise ValueError(
                        f"axes: {axis}={level} sets optim.lr, "
                        "and `lr` would try others in its place"
                    )

        return self

    @property
    def batch_axes(self) -> list[str]:
        """Axes of which each level is a batch size and nothing else."""
        return [
            axis
            for axis, levels in self.axes.items()
            if all(_is_a_batch_size(tree) for tree in levels.values())
        ]

    @property
    def budget_words(self) -> str:
        """The budget in words, with a hint where a level has its own."""
        for levels in self.axes.values():
            for tree in levels.values():
                if "pairs" in tree.get("optim", {}):
                    return f"{self.budget.words}, where the grid does not say otherwise"

        return self.budget.words

    @property
    def baseline_levels(self) -> dict[str, str]:
        """axis -> level of the baseline; by default the first level of the first axis."""
        first = next(iter(self.axes))
        return self.baseline or {first: next(iter(self.axes[first]))}

    @property
    def metric(self) -> str:
        """The first metric, which decides."""
        return next(iter(self.metrics))


def _is_a_batch_size(tree: Tree) -> bool:
    return set(tree) == {"data"} and set(tree["data"]) == {"batch_size"}


class GridSetting(NamedTuple):
    """One combination of levels, run once per seed."""

    # axis -> level
    levels: dict[str, str]
    # its config, without budget and seed
    tree: Tree

    @property
    def title(self) -> str:
        """The setting's levels, which identify it."""
        return ", ".join(self.levels.values())


def load_comparison(path: str) -> Comparison:
    """Read a grid from a YAML file.

    Raises:
        ConfigError: lists all errors of the file and of the runs that it describes.
    """
    comparison = of_kind(Comparison, read_yaml(path), path)
    try:
        settings = grid_settings(comparison)
    except ConfigError as error:
        raise ConfigError(f"{path}: config: {error}") from None

    # message -> the first setting it applies to
    wrong = dict[str, str]()
    # config -> the first setting that has it
    first_with = dict[str, str]()
    for setting in settings:
        try:
            check_run(comparison, validated(setting.tree))
        except ConfigError as error:
            wrong.setdefault(str(error), setting.title)

        config = json.dumps(setting.tree, sort_keys=True, default=str)
        first = first_with.setdefault(config, setting.title)
        if first != setting.title:
            wrong.setdefault(f"trains the same as {first}: a level changes nothing", setting.title)

    if wrong:
        raise ConfigError("\n".join(f"{path}: {title}: {line}" for line, title in wrong.items()))

    return comparison


def check_run(comparison: Comparison, config: Config) -> None:
    """Check that the run's evaluations give all metrics, and that its budget is at least a batch.

    Raises:
        ConfigError: either is not so.
    """
    amounts = [comparison.budget.pairs, comparison.lr and comparison.lr.pairs]
    least = min([pairs for pairs in amounts if pairs], default=0)
    batch_size = config.data.batch_size
    if least and least < batch_size:
        raise ConfigError(
            f"{least} pairs (budget.pairs, lr.pairs) are less than one batch of {batch_size}"
        )

    known = []
    # prefixes of metric names, for tasks that cannot list their metrics before measuring
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
            there_is = ", ".join(known) or "nothing"
            raise ConfigError(f"metrics.{column}: {key!r} is not measured; there is {there_is}")


def grid_settings(comparison: Comparison) -> list[GridSetting]:
    """The product of all axes, the last running fastest."""
    base: Tree = {}
    for file in comparison.config:
        base = lay_over(base, spelled_out(read_yaml(file)))

    base = lay_over(base, comparison.common)
    settings = []
    for chosen in itertools.product(*(levels.items() for levels in comparison.axes.values())):
        tree = base
        for _, changes in chosen:
            tree = lay_over(tree, changes)

        names = [name for name, _ in chosen]
        levels = dict(zip(comparison.axes, names, strict=True))
        settings.append(GridSetting(levels, tree))

    return settings
