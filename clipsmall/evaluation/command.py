"""Shared by the evaluation commands: joining ranks, loading a model, running a single task."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.distributed import world
from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.results import check_folder, results_text
from clipsmall.evaluation.sets import DataSet, set_name
from clipsmall.evaluation.suite import NamedModel, TaskRequest, measure, option_values, write_result
from clipsmall.evaluation.view import DataView
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.saved import load_model
from clipsmall.model.towers import Loaded


def join_ranks() -> PartialState:
    """Join the processes that the launcher started; without a launcher there is one process.

    Raises:
        ValueError: the processes cannot be joined.
    """
    single_threaded_tokenizers()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=world.PATIENCE)
    world.check_ranks(state.num_processes)
    return state


def single_threaded_tokenizers() -> None:
    """Turn off tokenizer threads: loader workers are forked, and would make them warn or hang."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_encoder(
    name: str,
    pretrained: str,
    device: torch.device,
    batch_size: int = 512,
    workers: int = 0,
    progress: bool = False,
) -> Encoder:
    """A model by name, as `load_model` takes it, on `device` and ready to encode.

    Raises:
        ValueError: no such model, a broken model, or a batch size below 1.
    """
    single_threaded_tokenizers()
    model, loaded = load_model(name, pretrained)
    return encoder_of(model, loaded, device, batch_size, workers, progress)


def encoder_of(
    model: DualEncoder,
    loaded: Loaded,
    device: torch.device,
    batch_size: int = 512,
    workers: int = 0,
    progress: bool = False,
) -> Encoder:
    """Move a loaded model to `device`, ready to encode. Raises ValueError where `Encoder` does."""
    model = model.to(device).eval()
    return Encoder(model, loaded.tokenize, device, batch_size, workers, progress)


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add --batch_size and --workers."""
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="image-decoding processes per rank")


def single_task_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The options of a command that measures one task on one data set."""
    made = argparse.ArgumentParser(
        prog=f"python -m clipsmall.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", help=MODEL_HELP)
    made.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="folders, globs or brace lists of indexed tar shards",
    )
    made.add_argument("--pretrained", default="", help="weight tag of an open_clip model")
    made.add_argument(
        "--name", default="", help="name of the data set in the result; default: its folder"
    )
    made.add_argument("--out", type=Path, default=Path("eval"), help="folder for the JSON result")
    add_encoder_options(made)
    return made


def run_single_task(
    task: str, options: argparse.Namespace, open_data: Callable[[str], DataSet]
) -> int:
    """Measure one task on the data set that `open_data` opens; print and write the result.

    The result is the same on any number of ranks. Returns the exit code.
    """
    try:
        state = join_ranks()
        check_folder(options.out)
        encoder = load_encoder(
            options.model,
            options.pretrained,
            state.device,
            options.batch_size,
            options.workers,
            progress=True,
        )
        data = open_data(options.name or set_name(options.data[0]))
        request = TaskRequest(task, data, option_values(empty_classes=True))
        result = measure(DataView(encoder, data, empty_classes=True), request)
        # a path is called by its last part
        source = Path(options.model)
        name = source.resolve().name if source.exists() else options.model
        # without a tag, the weights' digest tells apart checkpoints of the same file name
        model = NamedModel(name, options.pretrained, encoder)
        if state.is_main_process:
            print(results_text([result]))
            path = write_result(request, result, options.out, model.name, model.pretrained)
            print(f"written to {path}", file=sys.stderr)
        world.leave()
    except ValueError as error:
        refuse(error)
    return 0
