"""Reads a config from YAML files and `--section.field=value` options, and reports every error."""

import argparse
import sys
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clipsmall.config.objectives import Name
from clipsmall.config.schema import Config
from clipsmall.storage.yaml_files import ConfigError, parse_yaml, read_yaml

M = TypeVar("M", bound=BaseModel)

# parts of a pydantic error location that name a branch of a union, not a config key
UNION_BRANCHES = ("float", "literal['auto']")
# characters of an error line; a wrong value may be a whole section
LONGEST_LINE = 300


def lay_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base` section by section; a mix of objectives (`name`) is one value."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key != "name":
            value = lay_over(old, value)
        merged[key] = value
    return merged


def spelled_out(tree: dict[str, Any]) -> dict[str, Any]:
    """Write the short forms of `objective` in full.

    `objective: softmax` and `objective: {softmax: 1, vicreg: 0.1}` both mean
    `objective: {name: ...}`.
    """
    given = tree.get("objective")
    if isinstance(given, str) or is_mix(given):
        return {**tree, "objective": {"name": given}}
    return tree


def is_mix(given: Any) -> bool:
    """Whether this is a dict of numbers, such as weights by name of objective."""
    if not isinstance(given, dict) or not given:
        return False
    # True is an int in Python, but not a weight
    return all(
        isinstance(weight, int | float) and not isinstance(weight, bool)
        for weight in given.values()
    )


def refuse_one_weight(name: str, value: Any) -> None:
    """Raises ConfigError for an option that sets one weight of a mix.

    `--objective.name.vicreg=0.2` would not say whether the other weights are kept.
    """
    _, _, last = name.rpartition(".")
    names_objective = last in get_args(Name) and not isinstance(value, dict)
    if name.startswith("objective.name.") or names_objective:
        raise ConfigError(
            f"--{name}: give the whole mix, as in --objective='{{softmax: 1, {last}: 0.1}}'"
        )


def option_fields(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """The pydantic FieldInfo of every option, by `section.field`."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= option_fields(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = info
    return found


def validated(tree: dict[str, Any]) -> Config:
    """Nested dicts as a Config. Raises ConfigError, with one line per error."""
    return of_kind(Config, tree)


def of_kind(kind: type[M], tree: dict[str, Any], where: str = "") -> M:
    """Nested dicts as a pydantic model of the given kind.

    Args:
        where: the file that was read; every line of an error begins with it.

    Raises:
        ConfigError: invalid values, with one line per error.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        known = list(option_fields(kind))
        lines = [error_line(each, known) for each in error.errors()]
        # a union reports the same error once per branch
        lines = list(dict.fromkeys(lines))
        if where:
            lines = [f"{where}: {line}" for line in lines]
        raise ConfigError("\n".join(lines)) from None


def error_line(error: ErrorDetails, known: list[str]) -> str:
    """One pydantic error as one line, in terms of config keys."""
    message = error["msg"].removeprefix("Value error, ")
    # a rule about several fields has no location; its message names the fields
    if not error["loc"]:
        return message
    parts = [str(part) for part in error["loc"] if part not in UNION_BRANCHES]
    path = ".".join(parts) or "config"
    if error["type"] == "extra_forbidden":
        return f"{path}: no such key{suggestion(path, known)}"
    if error["type"] == "missing":
        return f"{path}: must be given"
    return f"{path}: {message} (got {error['input']!r})"[:LONGEST_LINE]


def suggestion(path: str, known: list[str]) -> str:
    """`; did you mean ...?` with the most similar option, or ""."""
    # the most likely mistake is the right field in the wrong section, then a misspelt name
    _, _, leaf = path.rpartition(".")
    near = []
    for name in known:
        if name.split(".")[-1] == leaf:
            near.append(name)
    if not near:
        near = get_close_matches(path, known, n=1, cutoff=0.5)
    if not near:
        return ""
    return f"; did you mean {near[0]}?"


def help_text() -> str:
    """All options with their descriptions and defaults, one line each, for `--help`."""
    lines = ["options, each as --section.field=value or in the YAML file:"]
    for name, info in option_fields().items():
        description = info.description or ""
        lines.append(f"  --{name:<28} {description} [{default_text(info)}]")
    return "\n".join(lines)


def default_text(info: Any) -> str:
    """A field's default, in YAML."""
    if info.is_required():
        return "required"
    if isinstance(info.default, BaseModel):
        return ""
    default = info.get_default(call_default_factory=True)
    # yaml.safe_dump writes a line of dots after a plain scalar
    return yaml.safe_dump(default, default_flow_style=True).split("\n")[0]


def read(words: list[str]) -> Config:
    """The config that a command line asks for: files, overridden by single options.

    `--config FILE` may be given several times: later files override earlier ones. Prints and
    exits with code 0 on --help and --print_config.

    Raises:
        ConfigError: unknown keys or invalid values, all reported together.
    """
    known, rest = command_parser().parse_known_args(words)
    tree: dict[str, Any] = {}
    for path in known.config:
        tree = lay_over(tree, spelled_out(read_yaml(path)))
    for name, value in options_in_words(rest):
        tree = lay_over(tree, option_tree(name, value))
    config = validated(tree)
    if known.print_config:
        print(config_yaml(config), end="")
        sys.exit(0)
    return config


def command_parser() -> argparse.ArgumentParser:
    """The parser of the options that are not part of the config itself."""
    made = argparse.ArgumentParser(
        prog="clipsmall/train.py",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # no abbreviations: their meaning would change when options are added
        allow_abbrev=False,
        description="Train a dual encoder.",
    )
    made.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file; may be given several times, later files override earlier ones",
    )
    made.add_argument(
        "--print_config",
        action="store_true",
        help="print the resolved config and exit",
    )
    return made


def options_in_words(words: list[str]) -> list[tuple[str, Any]]:
    """Parse `--section.field=value` or `--section.field value` into pairs of name and value.

    Raises:
        ConfigError: a word that is not an option, or a value that is not YAML.
    """
    found = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        value_follows = bool(left) and not left[0].startswith("--")
        if not word.startswith("--") or not (equals or value_follows):
            raise ConfigError(f"{word}: expected --section.field=value")
        if not equals:
            text = left.pop(0)
        found.append((name, parse_yaml(text, f"--{name}")))
    return found


def option_tree(name: str, value: Any) -> dict[str, Any]:
    """`section.field` and its value as nested dicts, as a YAML file would give them."""
    if name == "objective":
        value = spelled_out({name: value})[name]
    elif name.startswith("objective."):
        refuse_one_weight(name, value)
    for part in reversed(name.split(".")):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


def config_yaml(config: Config) -> str:
    """The whole resolved config as YAML, which `read` can read again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
