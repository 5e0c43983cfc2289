"""Evaluate models on data sets, and write one table of all results.

    python -m clipsmall.evaluate runs/demo --data data/glyphs/test_seen data/glyphs/test_unseen \\
        --empty_classes
    python -m clipsmall.evaluate ViT-B-32,laion2b_s34b_b79k openai/clip-vit-base-patch32 \\
        --data wds/cifar100 --tasks zero_shot linear_probe knn robustness calibration
    torchrun --nproc_per_node 2 -m clipsmall.evaluate runs/demo --data data/coco/test \\
        --tasks retrieval geometry

A model is a clipsmall run or checkpoint, a Hugging Face folder or hub id, or an open_clip name
(`NAME,TAG` with weights). A data set is a folder of tars or has CLIP_benchmark's layout, and may be
multi-label. Convert CSV tables, image folders and HF data sets with data_tools.make_shards first.

Files written to --out: one JSON result per model, data set and task in CLIP_benchmark's format,
`benchmark.csv` with all results of the folder, and `MODEL/eval_results.jsonl` in DataComp's format.
A result that exists is not measured again. Exit codes: 0 all results exist; 1 some failed; 2 bad
input.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.distributed import world
from clipsmall.evaluation import suite, tables
from clipsmall.evaluation.command import add_encoder_options, join_ranks, load_encoder
from clipsmall.evaluation.results import check_folder
from clipsmall.evaluation.sets import DataSet, open_set
from clipsmall.evaluation.suite import NamedModel, option_values
from clipsmall.evaluation.tasks import TASKS, task_options


def evaluate_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m clipsmall.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "models", nargs="+", metavar="MODEL", help=f"{MODEL_HELP}; here NAME,TAG instead"
    )
    made.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="data sets: folders, globs, CLIP_benchmark's layout",
    )
    made.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=[], help="default: what a data set is made for"
    )
    made.add_argument(
        "--out", type=Path, default=Path("eval"), help="folder for results and tables"
    )
    made.add_argument(
        "--classes",
        default="",
        help="imagenet, captions, labels, a file; default: classnames.txt beside",
    )
    made.add_argument(
        "--templates", default="", help="plain, simple, openai, or a file of lines with {c}"
    )
    made.add_argument(
        "--label",
        default="",
        help="json field of an image's class; default: .cls, else its caption",
    )
    made.add_argument(
        "--empty_classes", action="store_true", help="allow classes that have no image here"
    )
    made.add_argument(
        "--train", default="", help="shards for probes; default: the folder `train` beside"
    )
    for name, option in task_options().items():
        option.add_to(made, name)
    add_encoder_options(made)
    return made


def chosen_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the tasks, checked. Raises ValueError for a value that no task can take."""
    if options.batch_size < 1:
        raise ValueError(f"--batch_size={options.batch_size}: must be at least 1")
    try:
        return option_values(**vars(options))
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def model_titles(models: Sequence[str]) -> list[tuple[str, str]]:
    """The name and weight tag of each model in the results.

    A folder is called by its name, or by its path if two folders have the same name.
    """
    names = []
    for given in models:
        if Path(given).exists():
            names.append((Path(given).resolve().name, ""))
            continue
        name, _, tag = given.partition(",")
        names.append((Path(name).resolve().name if Path(name).exists() else name, tag))
    often = Counter(names)
    titles = []
    for given, (name, tag) in zip(models, names, strict=True):
        titles.append((given.strip("/") if often[name, tag] > 1 else name, tag))
    return titles


def load_named_model(
    given: str, title: tuple[str, str], state: PartialState, options: argparse.Namespace
) -> NamedModel:
    """Load a model of the command line. Raises ValueError where `load_model` does."""
    name = given if Path(given).exists() else given.partition(",")[0]
    tag = "" if Path(given).exists() else title[1]
    encoder = load_encoder(
        name, tag, state.device, options.batch_size, options.workers, progress=True
    )
    return NamedModel(title[0], tag, encoder)


def evaluate_models(
    options: argparse.Namespace,
    state: PartialState,
    sets: list[DataSet],
    task_values: Mapping[str, Any],
) -> list[str]:
    """Evaluate the models one after another; returns one line per failure."""
    failures = []
    for given, title in zip(options.models, model_titles(options.models), strict=True):
        try:
            model = load_named_model(given, title, state, options)
        except Exception as error:
            # a broken checkpoint may raise anything, but raises the same on all ranks
            failures.append(f"{title[0]}: {error}")
            continue
        failures += suite.evaluate(model, sets, options.tasks, task_values, options.out)
        # free the device before the next model is loaded
        del model
    return failures


def open_sets(options: argparse.Namespace) -> list[DataSet]:
    """Open the data sets. Raises ValueError if one cannot be opened or two have the same name."""
    sets = []
    for path in options.data:
        sets.append(
            open_set(path, options.classes, options.templates, options.label, options.train)
        )
    for name, often in Counter(data.name for data in sets).items():
        if often > 1:
            raise ValueError(
                f"two data sets are called {name!r}: evaluate them with an --out of their own each"
            )
    return sets


def main(words: list[str] | None = None) -> int:
    options = evaluate_parser().parse_args(words)
    try:
        state = join_ranks()
        sets = open_sets(options)
        task_values = chosen_options(options)
        check_folder(options.out)
    except ValueError as error:
        refuse(error)
    failures = evaluate_models(options, state, sets, task_values)
    if state.is_main_process:
        tables.write_tables(options.out)
        print(tables.tables_text(tables.read_cells(options.out)))
        for line in failures:
            print(f"failed: {line}", file=sys.stderr)
    world.leave()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
