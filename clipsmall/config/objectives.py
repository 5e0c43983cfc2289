"""The config's section `objective`: a mix by weight, and a section of options for each objective.

The options' names, defaults, ranges and help are declared by the objectives themselves, in
`clipsmall.objectives`.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, create_model, field_validator, model_validator

from clipsmall.objectives import OBJECTIVES, QUEUES, SECTIONS
from clipsmall.objectives.options import Section

# types made of the dicts' keys; mypy cannot see these
if TYPE_CHECKING:
    Name: TypeAlias = str
    Queue: TypeAlias = str
else:
    Name = Literal[tuple(OBJECTIVES)]
    Queue = Literal[("none", *QUEUES)]


class ObjectiveChoice(Section):
    """Which objectives, and what holds for all of them."""

    name: Name | dict[Name, float] = Field(
        "softmax", description=f"{', '.join(OBJECTIVES)}; or a mix {{softmax: 1, vicreg: 0.1}}"
    )
    mask_duplicates: bool = Field(
        True, description="equal captions are no negatives; false = the papers' losses"
    )
    queue: Queue = Field("none", description="pairs of former steps are columns, too")
    exchange: Literal["gather", "ring", "host"] = Field(
        "gather",
        description="ring: no rank ever holds all embeddings; host: they lie in host memory",
    )

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, given: object) -> object:
        """One clear line for a misspelt name, where pydantic reports every branch of the union."""
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
        """Weights beside other options, and a list of names: say where they belong."""
        named: list[Any] = []
        if isinstance(given, list):
            named = given
        elif isinstance(given, dict):
            for key, value in given.items():
                if key in OBJECTIVES and not isinstance(value, dict | Section):
                    named.append(key)
        if named:
            raise ValueError(f"a mix stands under name, as in name: {{{named[0]}: 1, vicreg: 0.1}}")
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
        """Weights by name; a single objective weighs 1."""
        if not isinstance(self.name, dict):
            return {self.name: 1.0}
        return dict(self.name)

    @property
    def title(self) -> str:
        """The mix in words, as in "softmax + 0.1 vicreg, moco queue"."""
        parts = []
        for name, weight in self.mix.items():
            factor = "" if weight == 1 else f"{weight:g} "
            parts.append(factor + name)

        title = " + ".join(parts)
        if self.queue != "none":
            title += f", {self.queue} queue"
        return title

    def options(self, section: str) -> dict[str, Any]:
        """The values of a section, by option."""
        return dict(getattr(self, section))

    def too_small(self, batch_size: int) -> str:
        """Why a batch is too small for the options of the mix; "" if it is not."""
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
    """What to say of a name that is no objective's."""
    if name in QUEUES:
        return f"{name} is a queue around an objective: objective.queue={name}"

    guess = f"there are {', '.join(OBJECTIVES)}"
    near = get_close_matches(str(name), OBJECTIVES, 1)
    if near:
        guess = f"did you mean {near[0]}?"
    return f"there is no objective {name!r}; {guess}"


if TYPE_CHECKING:

    class ObjectiveSection(ObjectiveChoice):
        """The choice, and one attribute per section of options."""

        # which sections there are, mypy cannot see: they are made of the objectives' signatures
        def __getattr__(self, name: str) -> Any: ...

else:
    _sections = {name: (section, section()) for name, section in SECTIONS.items()}
    ObjectiveSection = create_model(
        "ObjectiveSection", __base__=ObjectiveChoice, __module__=__name__, **_sections
    )

__all__ = ["Name", "ObjectiveSection", "Section"]
