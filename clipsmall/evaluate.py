"""Evaluate models on data sets: a table of cells, of which those that are there already are not
made again.

    python -m clipsmall.evaluate runs/demo --data data/glyphs/test_seen data/glyphs/test_unseen --empty_classes
    python -m clipsmall.evaluate ViT-B-32,laion2b_s34b_b79k openai/clip-vit-base-patch32 --data wds/cifar100 \\
        --tasks zero_shot linear_probe knn robustness calibration
    torchrun --nproc_per_node 2 -m clipsmall.evaluate runs/demo --data data/coco/test --tasks retrieval geometry

A model is a run or checkpoint of ours, a HF folder or hub id, or an open_clip name (`NAME,TAG` with
weights). Data are folders of tars or CLIP_benchmark's layout, multi-label sets among them (CSV,
image folders and HF data sets: make tars with data_tools.make_shards).
Written to --out: a JSON cell a model, data set and task in CLIP_benchmark's format, `benchmark.csv`
of all cells there, `MODEL/eval_results.jsonl` in DataComp's. Exit codes: 0 all cells are there; 1
some failed; 2 bad input.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.distributed import world
from clipsmall.evaluation import suite, tables
from clipsmall.evaluation.corruptions import COMMON, FAMILIES, SEVERITIES
from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.results import check_folder
from clipsmall.evaluation.sets import DataSet, open_set
from clipsmall.evaluation.suite import TASKS, NamedModel, Settings
from clipsmall.model.saved import load_model


def parser() -> argparse.ArgumentParser:
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
    made.add_argument("--out", type=Path, default=Path("eval"), help="folder for cells and tables")
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
    made.add_argument("--k", type=int, default=20, help="neighbours of kNN")
    made.add_argument(
        "--temperature", type=float, default=0.07, help="of kNN's votes; 0 = majority"
    )
    made.add_argument("--corruptions", nargs="+", choices=FAMILIES, default=COMMON, metavar="NAME")
    made.add_argument("--severities", nargs="+", type=int, choices=SEVERITIES, default=SEVERITIES)
    made.add_argument(
        "--candidates", type=int, default=32, help="pairs of a hard set of the task candidates"
    )
    made.add_argument("--batch_size", type=int, default=256)
    made.add_argument("--workers", type=int, default=0, help="processes that decode images, a rank")
    return made


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for a number that no task can take."""
    for name, least in (("batch_size", 1), ("k", 1), ("candidates", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name}={getattr(options, name)}: must be at least {least}")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature={options.temperature}: a number from 0 on (0 = majority)")


def titles(models: Sequence[str]) -> list[tuple[str, str]]:
    """The name and weight tag of each model in the results: a folder's own name, or its path where
    two share it.
    """
    found = []
    for given in models:
        name, _, tag = (given, "", "") if Path(given).exists() else given.partition(",")
        found.append((Path(name).resolve().name if Path(name).exists() else name, tag))
    often = Counter(found)
    return [
        (given.strip("/"), tag) if often[name, tag] > 1 else (name, tag)
        for given, (name, tag) in zip(models, found, strict=True)
    ]


def load(
    given: str, title: tuple[str, str], state: PartialState, options: argparse.Namespace
) -> NamedModel:
    name, tag = (given, "") if Path(given).exists() else (given.partition(",")[0], title[1])
    model, loaded = load_model(name, tag)
    encoder = Encoder(
        model.to(state.device).eval(),
        loaded.tokenize,
        state.device,
        options.batch_size,
        options.workers,
        True,
    )
    return NamedModel(title[0], tag, encoder)


def run(options: argparse.Namespace, state: PartialState, sets: list[DataSet]) -> list[str]:
    """All models, one after another; returns what went wrong."""
    settings = Settings(
        options.k,
        options.temperature,
        tuple(options.corruptions),
        tuple(options.severities),
        options.empty_classes,
        options.candidates,
    )
    failures = []
    for given, title in zip(options.models, titles(options.models), strict=True):
        try:
            model = load(given, title, state, options)
        except Exception as error:
            # a broken checkpoint surfaces as anything; on all ranks alike
            failures.append(f"{title[0]}: {error}")
            continue
        failures += suite.evaluate(model, sets, options.tasks, settings, options.out)
        # or two would be on the device while the next one loads
        del model
    return failures


def main(words: list[str] | None = None) -> int:
    options = parser().parse_args(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=world.PATIENCE)
        world.check_ranks(state.num_processes)
        sets = [
            open_set(path, options.classes, options.templates, options.label, options.train)
            for path in options.data
        ]
        if twice := [
            name for name, often in Counter(data.name for data in sets).items() if often > 1
        ]:
            raise ValueError(
                f"two data sets are called {twice[0]!r}: evaluate them with an --out of their own each"
            )
        check(options)
        check_folder(options.out)
    except ValueError as error:
        refuse(error)
    failures = run(options, state, sets)
    if state.is_main_process:
        tables.write_tables(options.out)
        print(tables.printed(tables.read_cells(options.out)))
        for line in failures:
            print(f"failed: {line}", file=sys.stderr)
    world.leave()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
