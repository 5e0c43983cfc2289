"""Does this config, on this hardware, train as one process with the whole batch would?

    python -m clipsmall.selfcheck --config configs/demo.yaml [--objective=gcl ...]
    torchrun --nproc_per_node 4 -m clipsmall.selfcheck --config configs/demo.yaml
    accelerate launch -m clipsmall.selfcheck --config configs/demo.yaml

Takes two batches of the training data and the weights that a run starts with. Compares loss and
gradients with those of a single process in three ways: on all ranks as started; on all ranks with
chunks (the config's chunk size, else a third of a rank's pairs); and in the config's precision. No
optimizer runs, and nothing is written.

The second of two steps is compared, so that an objective's memory is in use (a long queue holds one
batch then). Half of its pairs come from the first step, on other ranks. Random layers (dropout and
the like) are off, as every rank draws different numbers.

The dtype is float64 on a CPU, elsewhere float32 without TF32. The effect of rounding is measured by
repeating the reference with every weight changed in its last digits. Exit codes: 0 all exact; 1 an
error, or lost in rounding; 2 bad input. (`accelerate launch` and `torchrun` report any failure as
1.)
"""

import argparse
import os
import resource
import sys
import time

# as in train.py, before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from clipsmall.cli import refuse
from clipsmall.config import Config
from clipsmall.config.reader import help_text, read
from clipsmall.distributed import world
from clipsmall.selfcheck.comparison import checked_chunk_size, compare_gradients, make_subject
from clipsmall.selfcheck.gradients import GradientRow, faults_of_exchange, gradient_table


def print_selfcheck(config: Config, pairs: int, dtype: str | None) -> int:
    """Run the check, print the table on the first rank, and return the exit code."""
    started = time.perf_counter()
    subject = make_subject(config, pairs)
    device = subject.accelerator.device
    if dtype is None:
        dtype = "float64" if device.type == "cpu" else "float32"
    chunk, why_no_chunks = checked_chunk_size(subject)
    rows = compare_gradients(subject, getattr(torch, dtype), chunk)
    faults = faults_of_exchange(device)
    if subject.accelerator.is_main_process:
        seconds = time.perf_counter() - started
        cost = f"{seconds:.1f} s, {peak_memory(device) / 2**20:,.0f} MiB"
        lines = [
            f"{config.objective.title}, {dtype} on {device.type}, second of two steps, "
            "random layers off",
            gradient_table(rows),
            why_no_chunks,
            *faults,
            f"{summary(rows, faults)} ({cost})",
        ]
        print("\n".join(line for line in lines if line))

    world.leave()
    failed = any(row.verdict.state in ("wrong", "unclear") for row in rows)
    return 1 if faults or failed else 0


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(rows: list[GradientRow], faults: list[str]) -> str:
    """The last line of the output: errors, what is lost in rounding, or "all exact"."""
    states = [row.verdict.state for row in rows]
    wrong_groups = dict.fromkeys(row.group for row in rows if row.verdict.state == "wrong")
    wrong_exchanges = [fault.partition(":")[0] for fault in faults]
    names = [*wrong_exchanges, *wrong_groups]
    if names:
        return f"WRONG: {', '.join(names)}; {states.count('wrong')} of {len(rows)} rows"
    if lost := states.count("unclear"):
        lines = f"{lost} of {len(rows)} rows"
        return f"{lines} are lost in rounding; try --dtype=float64, or more --pairs"

    text = "all exact"
    if near := states.count("near"):
        text += f", {near} rows near"
    if idle := states.count("idle"):
        text += f", {idle} rows without gradient"
    return text


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.selfcheck",
        description=__doc__,
        epilog=help_text(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=0,
        help="pairs of a step, over all ranks; default: 64, or the batch if that is smaller",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), help="default: float64 on a CPU, else float32"
    )
    options, rest = parser.parse_known_args(words)
    try:
        return print_selfcheck(read(rest), options.pairs, options.dtype)
    except ValueError as error:
        refuse(error)
    except torch.OutOfMemoryError:
        refuse(ValueError("the whole batch does not fit the device at once: give fewer --pairs"))


if __name__ == "__main__":
    sys.exit(main())
