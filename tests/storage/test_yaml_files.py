"""Tests of strict YAML: what values become, and what is refused with its place.

Seen to fail when: `construct_mapping` is left to yaml; a resolver is not replaced.
"""

from pathlib import Path
from typing import Any

import pytest

from clipsmall.storage.yaml_files import ConfigError, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-.5E2", -50.0),
        ("1e3", 1000.0),
        ("'1e3'", "1e3"),
        ("1e", "1e"),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("[1, a]", [1, "a"]),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_yaml(text, "--option")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, a: 1}", "--option: key 'a' is given twice (line 1)"),
        ("a: {b: 1}\nc:\n  d: 1\n  d: 2", "--option: key 'd' is given twice (line 3)"),
        ("[1", "--option: not YAML: while parsing a flow sequence"),
        ("!!python/name:os.system", "--option: not YAML: could not determine a constructor"),
    ],
)
def test_what_is_ambiguous_or_unsafe_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_yaml(text, "--option")
    assert str(refused.value).startswith(message)
    # one line for one fault
    assert "\n" not in str(refused.value)


def test_a_merged_section_supplies_defaults_only() -> None:
    text = "base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  b: 3\n"
    assert parse_yaml(text, "file")["mine"] == {"a": 1, "b": 3}


def test_a_file_holds_sections(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [ä]}\n", encoding="utf-8")
    assert read_yaml(str(path)) == {"data": {"train": ["ä"]}}
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match=r"must hold `section: \.\.\.`, not list"):
        read_yaml(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(str(tmp_path / "none.yaml"))
