"""Rules of the house that no linter knows.

Seen to fail when: a class name is used twice; a wing imports one that imports it; a tenth floor of
imports is added; a module lies in the root; lines become dense; comments go; pickle, torch.load or
torch.distributed appear; a second module renames files.
"""

import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests import ROOT

FILES = sorted([*ROOT.glob("clipsmall/**/*.py"), *ROOT.glob("data_tools/**/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_opens_with_one_sentence(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "a file opens with one sentence that says what it holds"
    summary = docstring.split("\n\n")[0].replace("\n", " ")
    assert summary.endswith((".", "?", ":")), summary


def test_the_root_holds_a_handful_of_files() -> None:
    names = sorted(path.name for path in (ROOT / "clipsmall").glob("*.py"))
    assert len(names) <= 8, names


def test_only_world_speaks_torch_distributed() -> None:
    speakers = {
        str(path.relative_to(ROOT)) for path in FILES if "torch.distributed" in _imports(path)
    }
    assert speakers == {"clipsmall/distributed/world.py"}


def test_only_atomic_renames() -> None:
    """All files and folders that must appear whole go through the one writer."""
    renamers = {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(_renames(node) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert renamers == {"clipsmall/storage/atomic.py"}


def _renames(node: ast.AST) -> bool:
    """Whether it is a call of os.replace, os.rename, shutil.move, Path.replace or Path.rename.

    `str.replace` has two arguments; `rename` and `replace` of tables and dates have named ones.
    """
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    name = node.func.attr
    owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    if (owner, name) in {("os", "replace"), ("os", "rename"), ("os", "renames")}:
        return True
    if (owner, name) == ("shutil", "move"):
        return True
    return name in ("replace", "rename") and len(node.args) == 1


def test_only_build_run_and_the_commands_know_a_whole_config() -> None:
    """Every other builder takes its section of the config and plain values."""
    knowing = set()
    for path in FILES:
        imported = _imports(path)
        if {"clipsmall.config.Config", "clipsmall.config.schema.Config"} & imported:
            knowing.add(_module(path).removesuffix(".__main__"))
    of_commands = ("clipsmall.compare", "clipsmall.plan", "clipsmall.selfcheck")
    others = {name for name in knowing if not name.startswith(of_commands)}
    assert others == {
        "clipsmall.build.run",
        "clipsmall.config",
        "clipsmall.config.reader",
        "clipsmall.train",
    }


def test_no_module_hides_a_library() -> None:
    """`accelerate launch clipsmall/train.py` puts that folder first on sys.path."""
    entries = (ROOT / "clipsmall").glob("*")
    names = {path.stem for path in entries if path.suffix in ("", ".py")}
    names -= {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)
    assert not names & set(packages_distributions())


def test_nothing_pickles() -> None:
    for path in FILES:
        imported = {name.split(".")[0] for name in _imports(path)}
        assert not imported & {"pickle", "dill", "joblib"}, path
        assert "torch.load(" not in path.read_text(), path
        assert not re.search(r"trust_remote_code\W{1,4}True", path.read_text()), path


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_imports_have_nine_floors_at_most_and_no_circle() -> None:
    """A floor is one more than the highest floor it imports; a wing is one room."""
    below: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        here = _room(_module(path))
        below[here] |= {_room(name) for name in _imports(path) if _is_ours(name)} - {here}
    floors: dict[str, int] = {}
    # a circle raises CycleError
    for room in TopologicalSorter(below).static_order():
        floors[room] = 1 + max((floors[other] for other in below[room]), default=0)
    assert max(floors.values()) <= 9, sorted(floors.items(), key=lambda item: item[1])


def test_no_two_modules_import_each_other() -> None:
    modules = {_module(path) for path in FILES if path.name != "__init__.py"}
    below = {}
    for path in FILES:
        below[_module(path)] = {name for name in _imports(path) if name in modules}
    # a circle raises CycleError
    TopologicalSorter(below).prepare()


def test_lines_breathe() -> None:
    """Syntax nodes on a line of a function's body: the code we learn from has 5 to 9 (median)."""
    densities = [density for path in FILES for density in _densities(path)]
    assert statistics.median(densities) <= 9.5


def test_comments_stand_on_lines_of_their_own() -> None:
    whole: Counter[str] = Counter()
    for path in FILES:
        text = path.read_text()
        lines = text.splitlines()
        whole["lines"] += len(lines)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                alone = lines[token.start[0] - 1].lstrip().startswith("#")
                whole["alone" if alone else "trailing"] += 1
    assert whole["alone"] >= 0.03 * whole["lines"], whole
    # what is left beside code speaks to tools: type: ignore, noqa
    assert whole["trailing"] <= 0.1 * whole["alone"], whole


def _densities(path: Path) -> list[float]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        documented = ast.get_docstring(node) is not None and len(node.body) > 1
        body = node.body[1:] if documented else node.body
        lines = (node.end_lineno or 0) - body[0].lineno + 1
        if lines >= 3:
            nodes = sum(1 for statement in body for _ in ast.walk(statement))
            found.append(nodes / lines)
    return found


@cache
def _imports(path: Path) -> frozenset[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(str(node.module))
    return frozenset(found)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in ("clipsmall", "data_tools")


def _room(module: str) -> str:
    """A wing or a module of the root; data_tools is one room."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "clipsmall" else parts[0]
