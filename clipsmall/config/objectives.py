"""The config section `objective`: objectives by weight, and a section of options for each.

Names, defaults, ranges and help of the options are declared by the objectives themselves, in
`clipsmall.objectives`.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, create_model, field_validator, model_validator

from clipsmall.objectives import OBJECTIVES, QUEUES, SECTIONS
from clipsmall.objectives.options import Section

# These types are made from dict keys at run time, which mypy cannot follow.
if TYPE_CHECKING:
    Name: TypeAlias = str
    Queue: TypeAlias = str
else:
    Name = Literal[tuple(OBJECTIVES)]
    Queue = Literal[("none", *QUEUES)]


class ObjectiveChoice(Section):
    """Which objectives to use, and the options common to all of them."""

    name: Name | dict[Name, float] = Field(
        "softmax", description=f"{', '.join(OBJECTIVES)}; or a mix {{softmax: 1, vicreg: 0.1}}"
    )
    mask_duplicates: bool = Field(
        True, description="pairs with equal captions are no negatives; false = the papers' losses"
    )
    queue: Queue = Field("none", description="compare with pairs of earlier steps, too")
    exchange: Literal["gather", "ring", "host"] = Field(
        "gather",
        description="ring: no rank holds all embeddings; host: they are kept in host memory",
    )

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, given: object) -> object:
        """Report a misspelt name in one line; pydantic would report every branch of the union."""
        names: list[Any] = []
        if isinstance(given, str):
            names = [given]
        elif isinstance(given, dict):
            names = list(given)
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(unknown(name))
        return given

    @model_validator(mode="before")
    @classmethod
    def _mixed(cls, given: object) -> object:
        """Refuse weights beside other options, and a list of names; say where weights belong."""
        named: list[Any] = []
        if isinstance(given, list):
            named = given
        elif isinstance(given, dict):
            for key, value in given.items():
                if key in OBJECTIVES and not isinstance(value, dict | Section):
                    named.append(key)
        if named:
            raise ValueError(f"give a mix under name, as in name: {{{named[0]}: 1, vicreg: 0.1}}")
        return given

    @model_validator(mode="after")
    def _weighs(self) -> "ObjectiveChoice":
        if not self.mix or any(weight <= 0 for weight in self.mix.values()):
            raise ValueError(
                f"name: a mix names at least one objective, with weights above 0, not {self.name}"
            )
        return self

    @property
    def mix(self) -> dict[str, float]:
        """Weights by name of objective; a single objective has weight 1."""
        if not isinstance(self.name, dict):
            return {self.name: 1.0}
        return dict(self.name)

    @property
    def title(self) -> str:
        """The mix as text, such as "softmax + 0.1 vicreg, moco queue"."""
        parts = []
        for name, weight in self.mix.items():
            factor = "" if weight == 1 else f"{weight:g} "
            parts.append(factor + name)

        title = " + ".join(parts)
        if self.queue != "none":
            title += f", {self.queue} queue"
        return title

    def options(self, section: str) -> dict[str, Any]:
        """The values of a section, by name of option."""
        return dict(getattr(self, section))

    def too_small(self, batch_size: int) -> str:
        """Why the batch size is too small for the options of the mix; "" if it is not."""
        for name in self.mix:
            spec = OBJECTIVES[name]
            least = spec.least_batch(self.options(spec.section))
            if batch_size < least:
                return (
                    f"objective.{spec.section}: these options need a batch of {least} pairs or "
                    f"more, not {batch_size}: {spec.least_batch_reason}"
                )
        return ""


def unknown(name: object) -> str:
    """The error message for an unknown objective."""
    if name in QUEUES:
        return f"{name} is a queue around an objective: objective.queue={name}"

    guess = f"there are {', '.join(OBJECTIVES)}"
    near = get_close_matches(str(name), OBJECTIVES, 1)
    if near:
        guess = f"did you mean {near[0]}?"
    return f"there is no objective {name!r}; {guess}"


if TYPE_CHECKING:

    class ObjectiveSection(ObjectiveChoice):
        """The choice of objectives, and one attribute per section of options."""

        # the sections are made from the objectives' signatures at run time, unseen by mypy
        def __getattr__(self, name: str) -> Any: ...

else:
    _sections = {name: (section, section()) for name, section in SECTIONS.items()}
    ObjectiveSection = create_model(
        "ObjectiveSection", __base__=ObjectiveChoice, __module__=__name__, **_sections
    )

__all__ = ["Name", "ObjectiveSection", "Section"]
