"""Strict YAML: a repeated key is an error, and numbers and booleans are read as they look."""

import re
from pathlib import Path
from typing import Any

import yaml

BOOL_TAG = "tag:yaml.org,2002:bool"
FLOAT_TAG = "tag:yaml.org,2002:float"
MERGE_TAG = "tag:yaml.org,2002:merge"


class ConfigError(ValueError):
    """A config or YAML file is invalid; the message has one line per error."""


class StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a repeated key; plain YAML silently takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # `<<: *other` only supplies defaults: the keys it brings may be given again
        own_keys = [key for key, _ in node.value if key.tag != MERGE_TAG]
        names = [self.construct_object(key, deep=deep) for key in own_keys]
        for name in names:
            if names.count(name) > 1:
                # YAML counts lines from 0
                line = node.start_mark.line + 1
                raise ConfigError(f"key {name!r} is given twice (line {line})")
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 also reads no, off, yes and on as booleans; here only true and false are.
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != BOOL_TAG]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(
    BOOL_TAG, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)

# YAML 1.1 reads 1e-3 as a string: it requires a decimal point before an exponent, and a sign in
# the exponent.
StrictLoader.add_implicit_resolver(
    FLOAT_TAG,
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("+-.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse a YAML value. Raises ConfigError that names `source` (a file or an option)."""
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        # PyYAML's message has several lines
        message = " ".join(str(error).split())
        raise ConfigError(f"{source}: not YAML: {message}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file as nested dicts. Raises ConfigError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error})") from None
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold `section: ...`, not {type(tree).__name__}")
    return tree
