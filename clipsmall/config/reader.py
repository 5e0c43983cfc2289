"""A config from YAML files and `--section.field=value` words; everything that is wrong is said at
once.
"""

import argparse
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clipsmall.config.objectives import Name
from clipsmall.config.schema import Config

M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line each."""


class _StrictLoader(yaml.SafeLoader):
    """YAML says the last of two equal keys wins, silently; we say no."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # `<<: *other` is laid under
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=deep) for key in named]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} stands twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 also reads no, off, yes and on as truth values; ours are true and false.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


# It also reads 1e-3 as a word: to it a number with an exponent has a point, and a sign in the
# exponent.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("+-.0123456789"),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file as nested dicts. Raises ConfigError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error})") from None
    found = _parse(text, path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold `section: ...`, not {type(found).__name__}")
    return found


def lay_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section; a mix of objectives (`name`) is one value."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key != "name":
            value = lay_over(old, value)
        merged[key] = value
    return merged


def spelled_out(tree: dict[str, Any]) -> dict[str, Any]:
    """`objective: softmax` and `objective: {softmax: 1, vicreg: 0.1}` are short for `objective:
    {name: ...}`.
    """
    given = tree.get("objective")
    weights = list(given.values()) if isinstance(given, dict) else []
    mix = weights and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights
    )
    return {**tree, "objective": {"name": given}} if mix or isinstance(given, str) else tree


def refuse_one_weight(name: str, value: Any) -> None:
    """`--objective.name.vicreg=0.2` would have to guess whether the other weights stay."""
    _, _, last = name.rpartition(".")
    if name.startswith("objective.name.") or (
        last in get_args(Name) and not isinstance(value, dict)
    ):
        raise ConfigError(
            f"--{name}: give the whole mix, as in --objective='{{softmax: 1, {last}: 0.1}}'"
        )


def fields(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf as `section.field` -> its pydantic FieldInfo."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = info
    return found


def _line(error: ErrorDetails, known: list[str]) -> str:
    # of several fields together, which the message names
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    path = (
        ".".join(str(part) for part in error["loc"] if part not in ("float", "literal['auto']"))
        or "config"
    )
    if error["type"] == "extra_forbidden":
        leaf = path.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf] or get_close_matches(
            path, known, 1, 0.5
        )
        return f"{path}: no such key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{path}: must be given"
    return f"{path}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"[:300]


def validated(tree: dict[str, Any]) -> Config:
    """Raises ConfigError with one line for each thing wrong."""
    return of_kind(Config, tree)


def of_kind(kind: type[M], tree: dict[str, Any], where: str = "") -> M:
    """A tree as one of our models. Raises ConfigError with one line for each thing wrong; where:
    its file.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        known = list(fields(kind))
        lines = dict.fromkeys(_line(each, known) for each in error.errors())
        raise ConfigError(
            "\n".join(f"{where}: {line}" if where else line for line in lines)
        ) from None


def help_text() -> str:
    lines = ["options, each as --section.field=value or in the YAML file:"]
    for name, info in fields().items():
        default = (
            "required"
            if info.is_required()
            else yaml.safe_dump(
                info.get_default(call_default_factory=True), default_flow_style=True
            ).split("\n")[0]
            if not isinstance(info.default, BaseModel)
            else ""
        )
        lines.append(f"  --{name:<26} {info.description or ''} [{default}]")
    return "\n".join(lines)


def read(words: list[str]) -> Config:
    """`--config FILE` (several are laid over one another) and `--section.field=value`, which win.

    Prints and leaves with 0 on --help and --print_config.

    Raises:
        ConfigError: unknown or ill-valued keys, all of them at once.
    """
    parser = argparse.ArgumentParser(
        prog="clipsmall/train.py",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Train a dual encoder.",
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML; may be given again"
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved config and leave"
    )
    known, rest = parser.parse_known_args(words)
    tree: dict[str, Any] = {}
    for path in known.config:
        tree = lay_over(tree, spelled_out(read_yaml(path)))
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (equals or (rest and not rest[0].startswith("--"))):
            raise ConfigError(f"{word}: expected --section.field=value")
        value = _parse(text if equals else rest.pop(0), f"--{name}")
        if name == "objective":
            value = spelled_out({name: value})[name]
        elif name.startswith("objective."):
            refuse_one_weight(name, value)
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = lay_over(tree, value)
    config = validated(tree)
    if known.print_config:
        print(written(config), end="")
        sys.exit(0)
    return config


def written(config: Config) -> str:
    """The whole resolved config as YAML, which `read` takes back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
