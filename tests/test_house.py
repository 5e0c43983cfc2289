"""Rules of the house that no linter knows."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests import ROOT

FILES = sorted([*ROOT.glob("clipsmall/**/*.py"), *ROOT.glob("data_tools/**/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_opens_with_a_sentence(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "opens with one sentence"


def test_only_world_speaks_torch_distributed() -> None:
    speakers = {path.name for path in FILES if "torch.distributed" in _imports(path)}
    assert speakers == {"world.py"}


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


def _imports(path: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_no_module_hides_a_library() -> None:
    """`accelerate launch clipsmall/train.py` puts that folder first on sys.path."""
    names = {path.stem for path in (ROOT / "clipsmall").glob("*") if path.suffix in ("", ".py")} - {
        "__init__",
        "__pycache__",
    }
    assert not names & set(sys.stdlib_module_names)
    assert not names & set(packages_distributions())


def test_nothing_pickles() -> None:
    for path in FILES:
        assert not {
            name for name in _imports(path) if name.split(".")[0] in ("pickle", "dill", "joblib")
        }, path
        assert "torch.load(" not in path.read_text(), path
        assert not re.search(r"trust_remote_code\W{1,4}True", path.read_text()), path
