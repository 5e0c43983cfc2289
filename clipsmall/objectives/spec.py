"""`ObjectiveSpec`: everything that the builders of a run need to know about an objective."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import model_validator

from clipsmall.objectives.options import (
    DeclaredOption,
    Options,
    Section,
    in_order,
    merged,
    options_of,
    options_of_heads,
    parameters_with_default,
    required_parameters,
    section_model,
)


def always(options: Options) -> bool:
    return True


def never(options: Options) -> bool:
    return False


def no_text(options: Options) -> str:
    return ""


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective, and what it needs from the model and the run.

    All fields but the first two have defaults that fit most objectives. Fields that depend on the
    options of a run are functions of the options.
    """

    # a function of (rows, columns, **options), or a module class of (RunContext, **options)
    make: Callable[..., Any]
    # config section with its options; objectives may share one
    section: str
    # by name in HEADS: defaults that differ from the head's own; the head's options are in the
    # section, too
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # options that the section lists before all others
    first: tuple[str, ...] = ()

    # what is wrong with the options together; "" = nothing
    contradiction: Callable[[Options], str] = no_text
    # the smallest batch that the options allow, and why
    least_batch: Callable[[Options], int] = lambda options: 1
    least_batch_reason: str = ""

    # logit_scale at the start; None: not learned (DDP refuses parameters that get no gradient)
    scale: float | None = 1 / 0.07
    learns_scale: Callable[[Options], bool] = always
    # logit_bias at the start, a function of the number of columns; None: not learned
    bias: Callable[[int], float] | None = None
    # the bias is in units of the scale: logits are scale · (cos + bias)
    relative_bias: Callable[[Options], bool] = never

    # False: it trains one tower only, and must be a second term
    trains_both_towers: Callable[[Options], bool] = always
    # the head that retrieval uses; "" = the towers' own features; None = the objective aligns no
    # embeddings
    retrieval_head: Callable[[Options], str | None] = no_text

    # whether it works with exchange=ring, where no rank holds all columns
    ring: bool = True
    # whether it works with more columns than the batch (a queue)
    queue: bool = False
    # why it needs negatives from the batch; "" = it does not
    needs_batch_negatives: Callable[[Options], str] = no_text
    # the module class that replaces it if a queue asks for soft targets; None = not supported
    soft_targets: Callable[[Options], Callable[..., Any] | None] = lambda options: None

    # how mining weights negatives: softmax (relative to the row's others) or sigmoid (each alone)
    mining_weights: Literal["softmax", "sigmoid"] = "softmax"
    # for the self-check; maps the pairs per step to the largest option values with which the second
    # step already uses state from the first
    by_second_step: Callable[[int], Mapping[str, float]] = lambda pairs: {}

    def options(self) -> dict[str, DeclaredOption]:
        """Its own options, then its heads', each with its default.

        Raises:
            TypeError: an option that nothing uses, or a parameter that is not an option.
        """
        # a class is given the context, a function rows and columns
        taken = 1 if self.is_class else 2
        strange = required_parameters(self.make)[taken:]
        if strange:
            raise TypeError(f"{self.make.__name__}: {strange[0]} needs a default")

        parts = [
            options_of(self.make),
            options_of_heads(self.heads),
        ]
        found = merged(parts, self.section)
        return in_order(found, self.first, self.section)

    def taken(self, given: Options) -> dict[str, Any]:
        """Of the values in its section, and `mask_duplicates`, those that `make` takes."""
        known = parameters_with_default(self.make)
        return {name: value for name, value in given.items() if name in known}

    @property
    def is_class(self) -> bool:
        return isinstance(self.make, type)


def sections_of(specs: Mapping[str, ObjectiveSpec]) -> dict[str, type[Section]]:
    """The config's sections by name, in the order of the objectives.

    Raises:
        TypeError: an objective whose options are not declared as they must be.
    """
    sharing: dict[str, list[ObjectiveSpec]] = {}
    for spec in specs.values():
        its = sharing.setdefault(spec.section, [])
        its.append(spec)

    made = {}
    for section, its in sharing.items():
        parts = [spec.options() for spec in its]
        options = merged(parts, section)
        check = _checked_by(its)
        made[section] = section_model(section, options, check)
    return made


def _checked_by(specs: list[ObjectiveSpec]) -> Any:
    """A pydantic validator that refuses options which contradict one another."""

    def check(section: Section) -> Section:
        for spec in specs:
            if problem := spec.contradiction(dict(section)):
                raise ValueError(problem)
        return section

    return model_validator(mode="after")(check)


__all__ = ["ObjectiveSpec", "Options", "sections_of"]
