"""An objective's options: read from its signature, and made into a section of the config.

An option is a parameter with a default, annotated with its range and a line of help:

    margin: Annotated[float, Field(gt=0, lt=2, description="lead over negatives")] = 0.2

Nothing else states it: the config's section, its checks and its `--help` come from here.
"""

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from clipsmall.model.heads import HEADS

# the values of a section, by name
Options = Mapping[str, Any]
# passed to every objective that has this parameter; in the config it is outside the sections
FOR_ALL = "mask_duplicates"
# types composed of other types: A | B, and tuple[A, ...]
COMPOUND = (Union, UnionType, tuple)


class Section(BaseModel):
    """A part of the config: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )


class DeclaredOption(NamedTuple):
    """One option: its type with range and help, and its default."""

    # Annotated[type, Field(...)]
    annotation: Any
    default: Any


def parameters_with_default(function: Callable[..., Any]) -> list[str]:
    """Names of the optional parameters of a function, or of a class's `__init__`."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.default is not inspect.Parameter.empty]


def required_parameters(function: Callable[..., Any]) -> list[str]:
    """Names of the required parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.default is inspect.Parameter.empty]


def options_of(function: Callable[..., Any]) -> dict[str, DeclaredOption]:
    """The options of a function, or of a class (those of its `__init__`), by name."""
    constructed: Any = function
    declared = constructed.__init__ if isinstance(function, type) else function
    hints = get_type_hints(declared, include_extras=True)
    parameters = inspect.signature(function).parameters
    found = {}
    for name in parameters_with_default(function):
        if name != FOR_ALL:
            found[name] = DeclaredOption(hints.get(name), parameters[name].default)
    return found


def options_of_heads(heads: Mapping[str, Mapping[str, Any]]) -> dict[str, DeclaredOption]:
    """The options of some heads, by name.

    Args:
        heads: names in HEADS -> defaults that differ from the head's own.

    Raises:
        TypeError: a default for an option that the head does not take.
    """
    found: dict[str, DeclaredOption] = {}
    for head, defaults in heads.items():
        options = options_of(HEADS[head])
        for name, default in defaults.items():
            if name not in options:
                known = ", ".join(options)
                raise TypeError(f"the head {head} takes no {name!r}; it takes {known}")
            option = options[name]
            options[name] = option._replace(default=default)

        found |= options
    return found


def given_to_heads(
    heads: Mapping[str, Mapping[str, Any]], given: Options
) -> dict[str, dict[str, Any]]:
    """The options of each head, taken from the values of a section."""
    found = {}
    for head in heads:
        names = options_of(HEADS[head])
        found[head] = {name: given[name] for name in names}
    return found


def _check_declaration(where: str, annotation: Any) -> None:
    fields = []
    for note in _notes(annotation):
        if isinstance(note, FieldInfo):
            fields.append(note)

    has_help = any(field.description for field in fields)
    if not has_help:
        raise TypeError(f"{where}: declare it as Annotated[type, Field(description=...)]")

    has_range = False
    for field in fields:
        for bound in field.metadata:
            has_range = has_range or isinstance(bound, Ge | Gt | Le | Lt)
    if _is_number(annotation) and not has_range:
        raise TypeError(f"{where}: a number needs a range, as in Field(gt=0, description=...)")


def _notes(annotation: Any) -> list[Any]:
    """All metadata of Annotated, also within unions and containers."""
    inner = get_args(annotation)
    found: list[Any] = []
    if get_origin(annotation) is Annotated:
        kind, *notes = inner
        found += notes
        found += _notes(kind)
    elif get_origin(annotation) in COMPOUND:
        for each in inner:
            found += _notes(each)
    return found


def _is_number(annotation: Any) -> bool:
    """Whether a value may be an int or a float."""
    if annotation in (int, float):
        return True
    inner = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _is_number(inner[0])
    if origin in COMPOUND:
        return any(_is_number(each) for each in inner)
    return False


def merged(parts: list[dict[str, DeclaredOption]], section: str) -> dict[str, DeclaredOption]:
    """All options of several owners that share a section.

    Raises:
        TypeError: two of them declare one option differently.
    """
    found: dict[str, DeclaredOption] = {}
    for part in parts:
        for name, option in part.items():
            known = found.setdefault(name, option)
            # FieldInfo compares by value
            if known != option:
                raise TypeError(f"section {section}: {name} is declared twice, differently")
    return found


def in_order(
    options: dict[str, DeclaredOption], first: tuple[str, ...], section: str
) -> dict[str, DeclaredOption]:
    """The options, those named `first` before the others.

    Raises:
        TypeError: a name in `first` is not an option.
    """
    leading = {}
    for name in first:
        if name not in options:
            raise TypeError(f"section {section} has no option {name!r}")
        leading[name] = options[name]
    # a repeated key keeps its first position
    return {**leading, **options}


def section_model(
    section: str, options: Mapping[str, DeclaredOption], check: Callable[[Any], Any] | None = None
) -> type[Section]:
    """The config section of these options.

    Args:
        section: its name.
        options: by name, in the order in which the section lists them.
        check: a pydantic validator of the whole section.

    Raises:
        TypeError: an option without help, or a number without a range.
    """
    fields: dict[str, Any] = {}
    for name, option in options.items():
        where = f"{section}.{name}"
        _check_declaration(where, option.annotation)
        fields[name] = (option.annotation, option.default)

    words = section.split("_")
    title = "".join(word.capitalize() for word in words)

    validators: dict[str, Any] = {}
    if check is not None:
        validators["check"] = check
    return create_model(
        title,
        __base__=Section,
        __validators__=validators,
        **fields,
    )


def check_options(owner: str, function: Callable[..., Any], **given: Any) -> None:
    """Check the declared ranges, for callers that build an objective without a config.

    Raises:
        ValueError: a value is out of the range that `function` declares for it.
    """
    options = options_of(function)
    for name, value in given.items():
        declared = options[name].annotation
        try:
            TypeAdapter(declared).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            problem = first["msg"].replace("Input should be", "must be")
            raise ValueError(f"{owner}: {name} {problem}, not {value!r}") from None
