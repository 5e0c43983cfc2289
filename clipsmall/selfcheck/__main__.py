"""Does this config, on this hardware, train as one process with the whole batch would?

    python -m clipsmall.selfcheck --config configs/demo.yaml [--objective=gcl ...]
    torchrun --nproc_per_node 4 -m clipsmall.selfcheck --config configs/demo.yaml
    accelerate launch -m clipsmall.selfcheck --config configs/demo.yaml

One batch of the training data, the weights a run starts with, no optimizer: loss and gradients of
the ranks as they were started, of towers in chunks (the config's, else a third of a rank's pairs)
and of the config's precision, beside those of one process. It looks at the second of two steps,
half of whose pairs come again, on other ranks: what an objective remembers is in use then (a long
queue is as full as one batch makes it). Random layers (dropout and the like) are off, as every rank
draws other numbers. Nothing is written.

Numbers are float64 on a CPU, elsewhere float32 without TF32. What rounding may change is measured:
by one process once more, every weight shaken in its last places. Exit codes: 0 all exact; 1
something is wrong, or lost in rounding; 2 bad input. (`accelerate launch` and `torchrun` report any
failure of theirs as 1.)
"""

import argparse
import copy
import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

# as in train.py, before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed

from clipsmall.batch import Pairs
from clipsmall.build import chunks as build_chunks
from clipsmall.build import objective as build_objective
from clipsmall.build import run as build
from clipsmall.build.data import training_data
from clipsmall.cli import refuse
from clipsmall.config import Config
from clipsmall.config.reader import help_text, read, validated
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.towers import Loaded
from clipsmall.selfcheck import gradients as gradient_check
from clipsmall.selfcheck.gradients import (
    GradientRow,
    Judge,
    StepResult,
    differences,
    gradient_table,
    run_steps,
)


@dataclass
class Subject:
    """What is checked; each pass works on copies of its own."""

    config: Config
    accelerator: Accelerator
    loaded: Loaded
    encoder: DualEncoder
    objective: Any
    # of all ranks
    batches: list[Pairs]

    @property
    def rows(self) -> int:
        return len(self.batches[0].index) // world.size()

    def copies(self, dtype: torch.dtype) -> tuple[DualEncoder, Any]:
        encoder = copy.deepcopy(self.encoder).to(dtype)
        objective = copy.deepcopy(self.objective)
        return encoder, objective.to(dtype) if isinstance(objective, torch.nn.Module) else objective

    def alone(self, dtype: torch.dtype, shaken: bool = False) -> StepResult:
        """One process, the whole batch at once, gathered: the reference."""
        encoder, objective = self.copies(dtype)
        if shaken:
            gradient_check.perturb(encoder)
        with world.single_process():
            return run_steps(
                encoder,
                encoder,
                objective,
                world.gathered_columns,
                self.batches,
                torch.autograd.backward,
            )

    def together(
        self, dtype: torch.dtype, chunk_size: int = 0, autocast: bool = False
    ) -> StepResult:
        """All ranks, as training has them."""
        encoder, objective = self.copies(dtype)
        encoder.chunk_size = chunk_size
        self.accelerator.autocast_handler = None if autocast else AutocastKwargs(enabled=False)
        model = self.accelerator.prepare(build.synchronised(encoder))
        first = world.rank() * self.rows
        batches = [
            Pairs(*(field[first : first + self.rows] for field in pairs)) for pairs in self.batches
        ]
        # where training leaves them
        if chunk_size:
            batches = [pairs._replace(image=pairs.image.cpu()) for pairs in batches]
        columns = build_objective.columns(self.config)
        found = run_steps(model, encoder, objective, columns, batches, self.accelerator.backward)
        self.accelerator.free_memory()
        # of fp16
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        return {
            name: value if value is None or name == "loss" else value / scale
            for name, value in found.items()
        }


def of_two_steps(config: Config, pairs: int) -> Config:
    """The same for a run of two steps of `pairs`: in the second, schedules have ended and memories
    serve.
    """
    tree = config.model_dump(mode="json")
    tree["data"]["batch_size"], tree["optim"]["pairs"] = pairs, 2 * pairs
    tree["evaluate"], tree["run"]["trackers"] = {}, []
    for section, option, soon in (
        ("nn", "start", pairs),
        ("swav", "freeze_steps", 1),
        ("xbm", "start", 0.5),
    ):
        tree["objective"][section][option] = min(tree["objective"][section][option], soon)
    return validated(tree)


def subject(config: Config, pairs: int) -> Subject:
    """Model and objective as a run starts with them, and two batches that share half of their
    pairs.

    Raises:
        ValueError: the batch, or `pairs` if given, cannot be shared out among ranks and parts.
    """
    accelerator = build.accelerator(of_two_steps(config, config.data.batch_size))
    # fp16: in its first steps a run lowers the scale until nothing overflows
    if accelerator.scaler is not None:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=1024.0)
    unit = world.size() * config.optim.accumulate
    batch = config.data.batch_size
    swav = config.objective.swav
    for name, size in (("data.batch_size", batch), ("--pairs", pairs)):
        if size % unit:
            raise ValueError(f"{name}={size} is not divisible by {unit}, ranks x optim.accumulate")
    least = swav.prototypes - swav.queue if "swav" in config.objective.mix else 0
    pairs = pairs or min(batch, -(-max(64, 4 * unit, least) // unit) * unit)
    more = pairs // 2 // unit * unit
    data = training_data(of_two_steps(config, pairs + more))
    if data.pairs < pairs + more:
        more = 0
        data = training_data(of_two_steps(config, pairs))
    config = of_two_steps(config, pairs)
    set_seed(config.seed)
    loaded = build.loaded_towers(config, data, None)
    setting = build_objective.setting(config, loaded, data.ids)
    encoder = build.dual_encoder(config, loaded, setting).to(accelerator.device)
    gradient_check.disable_randomness(encoder)
    objective = build_objective.objective(config, setting)
    if isinstance(objective, torch.nn.Module):
        objective = objective.to(accelerator.device)
    mine = next(iter(data.reader(loaded, False)(range(1)))).pairs.to(accelerator.device)
    read = Pairs(*(world.gather(field) for field in mine))
    batches = [Pairs(*(field[k : k + pairs] for field in read)) for k in (0, more)]
    return Subject(config, accelerator, loaded, encoder, objective, batches)


def chunk_size(it: Subject) -> tuple[int, str]:
    """The config's, or about a third of a rank's pairs that does not divide them; or 0, and why
    not.

    Raises:
        ValueError: the config asks for chunks of a model that has BatchNorm.
    """
    size = build_chunks.chunk_size(it.config, it.accelerator, it.loaded, it.encoder)
    if 0 < size < it.rows:
        return size, ""
    if it.rows == 1:
        return 0, "chunks: one pair a rank cannot be cut; give more --pairs"
    size = next((n for n in range(max(it.rows // 3, 2), it.rows) if it.rows % n), 1)
    asked = it.config.model_copy(
        update={"model": it.config.model.model_copy(update={"chunk_size": size})}
    )
    try:
        return build_chunks.chunk_size(asked, it.accelerator, it.loaded, it.encoder), ""
    except ValueError:
        return 0, "chunks: refused: BatchNorm, which would take a chunk for the batch"


def compare(it: Subject, dtype: torch.dtype, chunk: int) -> list[GradientRow]:
    """All rows of the table. chunk: pairs; 0 = no chunks."""
    named = gradient_check.parameter_groups(
        copy.deepcopy(it.encoder), Pairs(*(field[:2] for field in it.batches[0]))
    )
    device = it.accelerator.device
    precision = it.accelerator.mixed_precision
    label = (
        f"{world.size()} ranks x {it.rows} pairs"
        if world.size() > 1
        else f"1 rank x {it.rows} pairs"
    )
    low = it.together(torch.float32, autocast=True) if precision != "no" else None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        # its 10 bits would drown the rest
        False
    )
    reference = it.alone(dtype)
    rows = []
    judge = Judge(differences(it.alone(dtype, shaken=True), reference, named, device), dtype)
    for size in (0, chunk) if chunk else (0,):
        compared = differences(it.together(dtype, size), reference, named, device)
        known = mistakes(-(-it.rows // size) if size else 1)
        what = f"{label}, chunks of {size}" if size else label
        rows += [
            GradientRow(what, group, d, judge.verdict(group, d, known))
            for group, d in compared.items()
        ]
    if low is not None:
        compared = differences(low, reference, named, device)
        rows += [
            GradientRow(f"{label}, {precision}", group, d, gradient_check.low_precision_verdict(d))
            for group, d in compared.items()
        ]
    return rows


def mistakes(chunks: int) -> dict[str, float]:
    """Known ones, and what they multiply a gradient by."""
    ranks = world.size()
    return {
        f"= 1/W, W = {ranks} ranks: a sum over ranks is missing?": 1 / ranks,
        f"= W, W = {ranks} ranks: summed over ranks, not averaged?": ranks,
        "= the number of chunks: counted once a chunk?": chunks,
    }


def summary(rows: list[GradientRow], faults: list[str]) -> str:
    states = [row.verdict.state for row in rows]
    wrong = dict.fromkeys(row.group for row in rows if row.verdict.state == "wrong")
    if names := [*(fault.partition(":")[0] for fault in faults), *wrong]:
        return f"WRONG: {', '.join(names)}; {states.count('wrong')} of {len(rows)} rows"
    if lost := states.count("unclear"):
        return (
            f"{lost} of {len(rows)} rows are lost in rounding; try --dtype=float64, or more --pairs"
        )
    near = states.count("near")
    idle = states.count("idle")
    return (
        "all exact"
        + (f", {near} rows near" if near else "")
        + (f", {idle} rows without gradient" if idle else "")
    )


def run(config: Config, pairs: int, dtype: str | None) -> int:
    started = time.perf_counter()
    it = subject(config, pairs)
    device = it.accelerator.device.type
    dtype = dtype or ("float64" if device == "cpu" else "float32")
    chunk, why_not = chunk_size(it)
    rows = compare(it, getattr(torch, dtype), chunk)
    faults = gradient_check.faults_of_exchange(it.accelerator.device)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else host
    if it.accelerator.is_main_process:
        head = (
            f"{config.objective.title}, {dtype} on {device}, second of two steps, random layers off"
        )
        last = f"{summary(rows, faults)} ({time.perf_counter() - started:.1f} s, {memory / 2**20:,.0f} MiB)"
        print(
            "\n".join(line for line in (head, gradient_table(rows), why_not, *faults, last) if line)
        )
    world.leave()
    return int(bool(faults) or any(row.verdict.state in ("wrong", "unclear") for row in rows))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.selfcheck",
        description=__doc__,
        epilog=help_text(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pairs", type=int, default=0, help="of a step, over all ranks; default: 64, or the batch"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), help="default: float64 on a CPU, else float32"
    )
    options, rest = parser.parse_known_args(words)
    try:
        return run(read(rest), options.pairs, options.dtype)
    except ValueError as error:
        refuse(error)
    except torch.OutOfMemoryError:
        refuse(ValueError("the whole batch does not fit the device at once: give fewer --pairs"))


if __name__ == "__main__":
    sys.exit(main())
