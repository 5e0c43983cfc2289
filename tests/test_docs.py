"""What README.md and docs/ print is true, as far as that can be seen without data.

Commands parse, configs are valid, files and links exist, and the numbers of the studies are those
of their runs.

Seen to fail when: a command has an option that it does not take; a config key, path, extra or make
target is misspelt; a link leads nowhere; the comparison measures what its config does not; a digit
of a study's table is changed.
"""

import argparse
import csv
import importlib
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from clipsmall.compare.__main__ import main as compare
from clipsmall.config.reader import read
from tests import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
STUDIES = sorted((ROOT / "docs" / "pages" / "studies").glob("*.md"))

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
PATH = re.compile(r"(?<![\w/.-])(?:clipsmall|configs|data_tools|docs|launch|tests)/[\w./*+-]*\w")
SNIPPET = re.compile(r'--8<-- "([^"]+)"')
SECTION = re.compile(r"(data|model|objective|tune|optim|mining|run|evaluate)(\.[a-z_]+)+(=\S+)?")
OPTION = re.compile(r"--[a-z_]+(\.[a-z_+]+)*=.+")
# `--section.field=value`, `--objective=NAME`, `--resume=PATH` stand for any
PLACEHOLDER = re.compile(r"section\.field|[A-Z]{3,}")

TRAIN = "clipsmall/train.py"


class Printed(NamedTuple):
    """Something that a page prints, with its place."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def blocks(language: str) -> Iterator[Printed]:
    for page in PAGES:
        for indent, kind, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if kind == language:
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                yield Printed(str(page.relative_to(ROOT)), "\n".join(lines))


def inline() -> Iterator[Printed]:
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for code in INLINE.findall(text):
            yield Printed(str(page.relative_to(ROOT)), code.replace(r"\|", "|"))


def commands() -> list[Printed]:
    found = []
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.partition("#")[0].strip():
                found.append(Printed(block.page, line.strip()))
    for code in inline():
        complete = "…" not in code.text and "RUN" not in code.text
        if code.text.startswith(("python -m ", "make ")) and complete:
            found.append(code)
    return list(dict.fromkeys(found))


COMMANDS = commands()


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_pages_print_commands() -> None:
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_parse(
    command: Printed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.text, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        check_installation(words)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        # the number of ranks, then the options of a training
        check_config(words[3:])
    else:
        check_program(*program(words), monkeypatch)


def program(words: list[str]) -> tuple[str, list[str]]:
    """The module or file that a command starts, and its own words."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args(words[2:])
        assert given.config_file is None or (ROOT / given.config_file).is_file()
        return given.training_script, given.training_script_args
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        return given.training_script, given.training_script_args
    raise AssertionError(f"no test knows how to check {words[0]}")


def check_installation(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"^\.(?:\[([\w,]+)\])?$", words[words.index("-e") + 1])
    for extra in filter(None, extras.split(",")):
        assert extra in project["optional-dependencies"]
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


class Parsed(BaseException):
    """Ends a command when its words are parsed. (An Exception might be taken for an error.)"""


def check_program(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name in (TRAIN, "clipsmall.train"):
        check_config(words)
        return
    if name in ("clipsmall.compare", "clipsmall.compare.__main__"):
        check_grids(words)
    rest = unknown(name, words, monkeypatch)
    # commands that take a config hand the words that they do not know to its reader
    if rest:
        check_config(rest)


def unknown(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that the command's own parser leaves over."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    module = importlib.import_module(
        f"{name}.__main__" if spec.submodule_search_locations else name
    )
    parse = argparse.ArgumentParser.parse_known_args
    depth = 0

    def outermost(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        nonlocal depth
        depth += 1
        found = parse(parser, *args, **options)
        depth -= 1
        if depth == 0:
            raise Parsed(found[1])
        return found

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", outermost)
        patched.setattr(sys, "argv", [name, *words])
        with pytest.raises(Parsed) as ended:
            module.main()
    rest: list[str] = ended.value.args[0]
    return rest


def check_config(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read([*words, "--print_config"])
    assert ended.value.code == 0


def check_grids(words: list[str]) -> None:
    patterns = [word for word in words if word.endswith(".yaml")]
    assert patterns
    for pattern in patterns:
        assert list(ROOT.glob(pattern)), pattern


def test_the_printed_comparison_lists_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    file = tmp_path / "grid.yaml"
    printed = 0
    for block in blocks("yaml"):
        if "\naxes:" in block.text and not SNIPPET.search(block.text):
            file.write_text(block.text, encoding="utf-8")
            compare([str(file), "--list"])
            assert "missing" in capsys.readouterr().out
            printed += 1
    assert printed


def test_printed_configs_are_valid(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    found = 0
    for block in blocks("yaml"):
        if included := SNIPPET.findall(block.text):
            assert all((ROOT / path).is_file() for path in included), block
        elif "\naxes:" not in block.text:
            file.write_text(block.text, encoding="utf-8")
            read(["--config", str(file)])
            found += 1
    assert found


def test_printed_python_compiles() -> None:
    for block in blocks("python"):
        compile(block.text, block.page, "exec")


def test_options_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """`--mining.guard=0` and `mining.guard` within a sentence."""
    with pytest.raises(SystemExit):
        read(["--help"])
    known = re.findall(r"^ +--([a-z_]+(?:\.[a-z_]+)+) ", capsys.readouterr().out, re.MULTILINE)
    found = 0
    for code in inline():
        if OPTION.fullmatch(code.text) and not PLACEHOLDER.search(code.text):
            read(["--data.train=shards", *shlex.split(code.text)])
            found += 1
        if SECTION.fullmatch(code.text) and not code.text.endswith(".yaml"):
            name = code.text.partition("=")[0]
            section = any(field.startswith(f"{name}.") for field in known)
            assert name in known or section, code
            found += 1
    assert found > 50


def test_paths_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in PATH.findall(text):
            if "NAME" not in path:
                assert list(ROOT.glob(path)), f"{page.name}: {path}"


def test_links_lead_somewhere() -> None:
    wings = {path.parent.name for path in ROOT.glob("clipsmall/*/__init__.py")}
    for page in PAGES:
        for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = (page.parent / link).resolve()
            # made from the docstrings when the site is built
            if target.parent.name == "api":
                assert target.stem in wings | {"index"}, f"{page.name}: {link}"
            elif not link.startswith("https://"):
                assert target.exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", [PAGES[0], *STUDIES], ids=lambda page: page.name)
def test_numbers_of_the_studies_are_those_of_their_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tables = re.findall(r"configs/compare/results/[\w-]+\.csv", text)
    # the README's are those of the first study
    if page.name == "README.md":
        tables = ["configs/compare/results/glyphs.csv"]
    known = set[str]()
    for table in tables:
        known |= means(ROOT / table)
    printed = re.findall(r"(\d+\.\d ± \d+\.\d)", text)
    assert not [number for number in printed if number not in known]


def means(path: Path) -> set[str]:
    """`mean ± standard deviation` over the seeds, of every setting and column."""
    groups = defaultdict[tuple[str, str], list[float]](list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            names = list(row)
            setting = "|".join(row[name] for name in names[: names.index("seed")])
            # newer tables hold fractions, older ones percentages
            scale = 100 if "state" in row else 1
            for column in names[names.index("seed") + 1 :]:
                try:
                    groups[setting, column].append(float(row[column]) * scale)
                except ValueError:
                    continue
    shown = set[str]()
    for values in groups.values():
        if len(values) > 1:
            shown.add(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
    return shown
