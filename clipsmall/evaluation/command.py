"""What the evaluation commands share: their common options, the device, the model, the way they
end.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from clipsmall.cli import MODEL_HELP, refuse
from clipsmall.distributed import world
from clipsmall.evaluation import Encoder, Result, print_cells, write_cell
from clipsmall.evaluation.results import check_folder
from clipsmall.evaluation.sets import set_name
from clipsmall.model.saved import load_model


def parser(command: str, description: str) -> argparse.ArgumentParser:
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
        "--name", default="", help="of the data set in the result; default: its folder's"
    )
    made.add_argument("--out", type=Path, default=Path("eval"), help="folder for the JSON cell")
    made.add_argument("--batch_size", type=int, default=256)
    made.add_argument("--workers", type=int, default=0, help="processes that decode images, a rank")
    return made


def evaluate(options: argparse.Namespace, measure: Callable[[Encoder, str], Result]) -> int:
    """Load the model, measure, print the table and write the cell; exact on any number of ranks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=world.PATIENCE)
        world.check_ranks(state.num_processes)
        check_folder(options.out)
        model, loaded = load_model(options.model, options.pretrained)
        encoder = Encoder(
            model.to(state.device).eval(),
            loaded.tokenize,
            state.device,
            options.batch_size,
            options.workers,
            True,
        )
        cell = measure(encoder, options.name or set_name(options.data[0]))
        # two runs' checkpoints may have one name
        pretrained = options.pretrained or encoder.digest()[:8]
        if state.is_main_process:
            print(print_cells([cell]))
            source = Path(options.model)
            model_name = source.resolve().name if source.exists() else options.model
            print(
                f"written to {write_cell(cell, options.out, model_name, pretrained)}",
                file=sys.stderr,
            )
        world.leave()
    except ValueError as error:
        refuse(error)
    return 0
