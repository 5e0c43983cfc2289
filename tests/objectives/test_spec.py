"""An objective has one owner: its options are declared in its signature, and it is known by its
spec, not by its name.

Seen to fail when: an option without help or range is accepted; a head's option gets a default that
the head does not take; a name is compared outside `clipsmall/objectives`; an example in a docstring
is wrong.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError
from torch import Tensor

import clipsmall
from clipsmall import objectives
from clipsmall.batch import Embeddings, RunContext
from clipsmall.objectives import OBJECTIVES, QUEUES, SECTIONS, ObjectiveSpec
from clipsmall.objectives.options import check_options
from clipsmall.objectives.spec import sections_of

ROOT = Path(clipsmall.__file__).parent.parent
Losses = dict[str, Tensor]
Positive = Annotated[float, Field(gt=0, description="weight")]


def section(make: Callable[..., Any], **fields: Any) -> Any:
    return sections_of({"toy": ObjectiveSpec(make, "toy", **fields)})["toy"]


# ---- options


def test_a_section_is_the_signature() -> None:
    def toy(
        rows: Embeddings,
        columns: Embeddings,
        mask_duplicates: bool = True,
        weight: Positive = 2.0,
        signed: Annotated[bool, Field(description="keep the sign")] = False,
    ) -> Losses:
        raise NotImplementedError

    made = section(toy)
    assert list(made.model_fields) == ["weight", "signed"]
    assert dict(made()) == {"weight": 2.0, "signed": False}
    assert made.model_fields["weight"].description == "weight"
    for wrong in ({"weight": 0.0}, {"weight": float("nan")}, {"wieght": 1.0}):
        with pytest.raises(ValidationError):
            made(**wrong)
    spec = ObjectiveSpec(toy, "toy")
    given = {"weight": 1.0, "of another": 1, "mask_duplicates": False}
    assert spec.taken(given) == {"weight": 1.0, "mask_duplicates": False}


def test_a_module_declares_options_in_init() -> None:
    class Toy:
        def __init__(self, context: RunContext, weight: Positive = 3.0) -> None: ...

    assert dict(section(Toy)()) == {"weight": 3.0}


def no_annotation(rows: Embeddings, columns: Embeddings, weight=1.0) -> Losses:  # type: ignore[no-untyped-def]
    raise NotImplementedError


def no_field(rows: Embeddings, columns: Embeddings, weight: float = 1.0) -> Losses:
    raise NotImplementedError


def no_help(
    rows: Embeddings, columns: Embeddings, weight: Annotated[float, Field(gt=0)] = 1.0
) -> Losses:
    raise NotImplementedError


def no_range(
    rows: Embeddings,
    columns: Embeddings,
    weight: Annotated[float | None, Field(description="weight")] = None,
) -> Losses:
    raise NotImplementedError


def no_default(rows: Embeddings, columns: Embeddings, weight: Positive) -> Losses:
    raise NotImplementedError


def plain(rows: Embeddings, columns: Embeddings, weight: Positive = 1.0) -> Losses:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (no_annotation, {}, r"toy\.weight: declare it as Annotated"),
        (no_field, {}, r"toy\.weight: declare it as Annotated"),
        (no_help, {}, r"toy\.weight: declare it as Annotated"),
        (no_range, {}, r"toy\.weight: a number needs a range"),
        (no_default, {}, "no_default: weight needs a default"),
        (plain, {"first": ("wieght",)}, "no option 'wieght'"),
        (plain, {"heads": {"momentum": {"momentun": 0.9}}}, "takes no 'momentun'; it takes"),
        (plain, {"heads": {"momentun": {}}}, "momentun"),
    ],
)
def test_an_option_that_is_not_declared_or_not_taken_is_refused(
    make: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, KeyError), match=message):
        section(make, **fields)


def test_objectives_that_share_a_section_declare_alike() -> None:
    def other(rows: Embeddings, columns: Embeddings, weight: Positive = 7.0) -> Losses:
        raise NotImplementedError

    specs = {"one": ObjectiveSpec(plain, "toy"), "two": ObjectiveSpec(other, "toy")}
    with pytest.raises(TypeError, match="section toy: weight is declared twice"):
        sections_of(specs)


def test_a_contradiction_is_refused_with_its_reason() -> None:
    made = section(plain, contradiction=lambda options: "too heavy" * (options["weight"] > 5))
    made(weight=5.0)
    with pytest.raises(ValidationError, match="too heavy"):
        made(weight=6.0)


def test_declared_ranges_hold_without_a_config() -> None:
    check_options("toy", plain, weight=1.0)
    with pytest.raises(ValueError, match="toy: weight must be greater than 0, not -1"):
        check_options("toy", plain, weight=-1)


def test_every_objective_and_queue_has_a_section() -> None:
    assert set(SECTIONS) == {spec.section for spec in OBJECTIVES.values()} | set(QUEUES)
    for name, made in SECTIONS.items():
        for option, field in made.model_fields.items():
            assert field.description, f"{name}.{option}"


# ---- names

# the same word for another thing
HOMONYMS = {
    # the objective of a config that names none
    "clipsmall/config/objectives.py": {"softmax"},
    # scorings and selections of mining
    "clipsmall/config/schema.py": {"softmax", "sigmoid", "spectral"},
    "clipsmall/mining/assignment.py": {"softmax", "spectral"},
    "clipsmall/mining/learnability.py": {"softmax", "sigmoid"},
    "clipsmall/mining/initial_groups.py": {"softmax"},
    "clipsmall/mining/weights.py": {"softmax", "sigmoid"},
    "data_tools/mine_shards.py": {"softmax", "spectral"},
    # columns of evaluation's tables
    "clipsmall/evaluation/tasks/calibration.py": {"softmax", "sigmoid"},
    "clipsmall/evaluation/tasks/matching.py": {"sinkhorn"},
    # an operation of torch
    "clipsmall/plan/cuda_kernels.py": {"softmax"},
    # losses of the synthetic study, which has its own
    "clipsmall/synthetic/__main__.py": {"softmax"},
    "clipsmall/synthetic/free_embeddings.py": {"softmax", "sigmoid", "sinkhorn"},
}


def spelled(path: Path) -> Iterator[str]:
    """Names of objectives and queues that a file spells, as a word of its own or an attribute."""
    names = set(OBJECTIVES) | set(QUEUES)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in names:
            yield str(node.value)
        # config.objective.swav
        if isinstance(node, ast.Attribute) and node.attr in names:
            owner = ast.unparse(node.value)
            if owner.endswith("objective"):
                yield node.attr


def test_no_objective_is_known_by_name_outside_its_wing() -> None:
    files = [*ROOT.glob("clipsmall/**/*.py"), *ROOT.glob("data_tools/**/*.py")]
    assert len(files) > 150
    # an entry for a file that was moved would excuse nobody
    assert all((ROOT / place).exists() for place in HOMONYMS)
    for path in sorted(files):
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith("clipsmall/objectives/"):
            unknown = set(spelled(path)) - HOMONYMS.get(place, set())
            assert not unknown, f"{place}: ask the ObjectiveSpec instead of {sorted(unknown)}"


def test_names_are_found(tmp_path: Path) -> None:
    file = tmp_path / "known.py"
    file.write_text('a = config.objective.swav.queue\nb = name in ("dcl", "other")\nF.softmax(c)\n')
    assert set(spelled(file)) == {"swav", "dcl"}


# ---- docstrings

SECTION_TITLES = (
    "Also known as:",
    "Formula:",
    "Source:",
    "When to use:",
    "When not:",
    "Related:",
    "Returns:",
    "Examples:",
)
DOCUMENTED = {spec.make.__name__: spec.make for spec in OBJECTIVES.values()}
DOCUMENTED["SoftTargets"] = objectives.softmax.SoftTargets
DOCUMENTED["Queued"] = objectives.queued.Queued
MODULES = [
    f"clipsmall.objectives.{each.name}" for each in pkgutil.iter_modules(objectives.__path__)
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_loss_says_what_it_is(name: str) -> None:
    make: Any = DOCUMENTED[name]
    text = inspect.getdoc(make) or ""
    positions = [text.find(f"\n{title}\n") for title in SECTION_TITLES]
    assert -1 not in positions, [
        t for t, at in zip(SECTION_TITLES, positions, strict=True) if at < 0
    ]
    assert positions == sorted(positions)
    assert text.splitlines()[0].endswith(".")
    for parameter in inspect.signature(make).parameters:
        assert f"\n    {parameter}: " in text, parameter


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    loaded = importlib.import_module(module)
    assert doctest.testmod(loaded, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_loss_has_an_example(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(DOCUMENTED[name], globs={})
    assert sum(len(each.examples) for each in found) >= 2
