"""The self-check's comparison: one step on all ranks (also with chunks) against one process."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed

from clipsmall.batch import Pairs
from clipsmall.build import chunks as build_chunks
from clipsmall.build import objective as build_objective
from clipsmall.build import run as build
from clipsmall.build.data import training_data
from clipsmall.config import Config
from clipsmall.config.reader import validated
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.towers import Loaded
from clipsmall.objectives import OBJECTIVES, QUEUES
from clipsmall.selfcheck import gradients as gradient_check
from clipsmall.selfcheck.gradients import (
    GradientRow,
    Judge,
    StepResult,
    differences,
    low_precision_verdict,
    run_steps,
)


@dataclass
class Subject:
    """The model, objective and batches to check; each pass works on its own copies."""

    config: Config
    accelerator: Accelerator
    loaded: Loaded
    encoder: DualEncoder
    objective: Any
    # global batches
    batches: list[Pairs]

    @property
    def rows(self) -> int:
        """Pairs per rank."""
        return len(self.batches[0].index) // world.size()

    def copies(self, dtype: torch.dtype) -> tuple[DualEncoder, Any]:
        """Copies of model and objective that a pass may change."""
        encoder = copy.deepcopy(self.encoder).to(dtype)
        objective = copy.deepcopy(self.objective)
        if isinstance(objective, torch.nn.Module):
            objective = objective.to(dtype)
        return encoder, objective

    def in_one_process(self, dtype: torch.dtype, perturbed: bool = False) -> StepResult:
        """The reference: one process with the whole global batch at once.

        perturbed: change the weights by a few units in the last place, to measure rounding errors.
        """
        encoder, objective = self.copies(dtype)
        if perturbed:
            gradient_check.perturb(encoder)
        backward = torch.autograd.backward
        columns = world.gathered_columns
        with world.single_process():
            return run_steps(encoder, encoder, objective, columns, self.batches, backward)

    def on_all_ranks(
        self, dtype: torch.dtype, chunk_size: int = 0, autocast: bool = False
    ) -> StepResult:
        """The step on all ranks, as in training; every rank must call."""
        encoder, objective = self.copies(dtype)
        encoder.chunk_size = chunk_size
        self.accelerator.autocast_handler = None if autocast else AutocastKwargs(enabled=False)
        model = self.accelerator.prepare(build.synchronised(encoder))
        batches = [self.local_rows(pairs) for pairs in self.batches]

        # as in training, pixels stay in host memory if there are chunks
        if chunk_size:
            batches = [pairs._replace(image=pairs.image.cpu()) for pairs in batches]
        columns = build_objective.columns_of_exchange(self.config.objective.exchange)
        result = run_steps(model, encoder, objective, columns, batches, self.accelerator.backward)
        self.accelerator.free_memory()

        # fp16's GradScaler multiplies the loss, and so all gradients
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, gradient in result.items():
            if gradient is not None and name != "loss":
                result[name] = gradient / scale

        return result

    def local_rows(self, pairs: Pairs) -> Pairs:
        """This rank's pairs of a global batch."""
        first = world.rank() * self.rows
        return Pairs(*(field[first : first + self.rows] for field in pairs))


def of_two_steps(config: Config, pairs: int) -> Config:
    """The config of a run with two steps of `pairs` each.

    In the second step, schedules have ended, and an objective's memory (such as a queue) is used.
    """
    tree = config.model_dump(mode="json")
    tree["data"]["batch_size"] = pairs
    tree["optim"]["pairs"] = 2 * pairs
    tree["evaluate"] = {}
    tree["run"]["trackers"] = []
    sections = {spec.section: spec for spec in OBJECTIVES.values()} | QUEUES
    for section, spec in sections.items():
        given = tree["objective"][section]
        for option, largest in spec.by_second_step(pairs).items():
            given[option] = min(given[option], largest)

    return validated(tree)


def make_subject(config: Config, pairs: int) -> Subject:
    """Model and objective as at the start of a run, and two batches that share half their pairs.

    Args:
        pairs: global batch size; 0 = 64, or the config's batch size if that is smaller.

    Raises:
        ValueError: the batch size is not divisible by ranks x optim.accumulate.
    """
    plain = of_two_steps(config, config.data.batch_size)
    accelerator = build.accelerator(plain.run, plain.out, plain.model.chunk_size)

    # fp16: start with the scale that a run reaches after a few steps, when nothing overflows
    if accelerator.scaler is not None:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=1024.0)
    unit = world.size() * config.optim.accumulate
    batch = config.data.batch_size
    for name, size in (("data.batch_size", batch), ("--pairs", pairs)):
        if size % unit:
            raise ValueError(f"{name}={size} is not divisible by {unit}, ranks x optim.accumulate")

    least = build_objective.least_batch(config.objective)
    if not pairs:
        # 64, or the least that all parts and the objective need, in whole units
        wanted = max(64, 4 * unit, least)
        pairs = min(batch, -(-wanted // unit) * unit)

    # the second batch repeats half of the first batch's pairs, if there are enough pairs
    more = pairs // 2 // unit * unit
    data = training_data(of_two_steps(config, pairs + more).data, config.seed)
    if data.pairs < pairs + more:
        more = 0
        data = training_data(of_two_steps(config, pairs).data, config.seed)

    config = of_two_steps(config, pairs)
    set_seed(config.seed)
    loaded = build.loaded_towers(config, data, None)
    context = build.run_context(config, loaded, data.ids)
    encoder = build.dual_encoder(config, loaded, context).to(accelerator.device)
    gradient_check.disable_randomness(encoder)
    objective = build.objective(config, context)
    if isinstance(objective, torch.nn.Module):
        objective = objective.to(accelerator.device)
    mine = next(iter(data.reader(loaded, False)(range(1)))).pairs.to(accelerator.device)
    read = Pairs(*(world.gather(field) for field in mine))
    batches = [Pairs(*(field[k : k + pairs] for field in read)) for k in (0, more)]
    return Subject(config, accelerator, loaded, encoder, objective, batches)


def checked_chunk_size(subject: Subject) -> tuple[int, str]:
    """(chunk size to check, ""), or (0, why chunks cannot be checked).

    The size is the config's; without one, about a third of a rank's pairs, chosen so that it does
    not divide them.

    Raises:
        ValueError: the config asks for chunks, but the model has BatchNorm.
    """
    rows = subject.rows
    towers = (subject.accelerator, subject.loaded, subject.encoder)
    parts = subject.config.optim.accumulate
    size = build_chunks.chunk_size(subject.config.model.chunk_size, rows, parts, *towers)
    if 0 < size < rows:
        return size, ""
    if rows == 1:
        return 0, "chunks: one pair per rank cannot be split; give more --pairs"
    uneven = (n for n in range(max(rows // 3, 2), rows) if rows % n)
    size = next(uneven, 1)
    try:
        return build_chunks.chunk_size(size, rows, parts, *towers), ""
    except ValueError:
        return 0, "chunks: refused, as BatchNorm would normalise over a chunk instead of the batch"


def compare_gradients(subject: Subject, dtype: torch.dtype, chunk: int) -> list[GradientRow]:
    """All rows of the table: all ranks, all ranks with chunks, and the run's precision.

    Every rank must call. chunk: chunk size in pairs; 0 = no chunks.
    """
    few_pairs = Pairs(*(field[:2] for field in subject.batches[0]))
    named = gradient_check.gradient_groups(copy.deepcopy(subject.encoder), few_pairs)
    device = subject.accelerator.device
    precision = subject.accelerator.mixed_precision
    ranks = "1 rank" if world.size() == 1 else f"{world.size()} ranks"
    label = f"{ranks} x {subject.rows} pairs"

    # 1. The run's precision, if it is lower, before TF32 is switched off.
    low = None
    if precision != "no":
        low = subject.on_all_ranks(torch.float32, autocast=True)

    # 2. The reference, and its rounding error. TF32 has too few bits (10) to see anything else.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    reference = subject.in_one_process(dtype)
    perturbed = subject.in_one_process(dtype, perturbed=True)
    judge = Judge(differences(perturbed, reference, named, device), dtype)

    # 3. All ranks, without and with chunks.
    rows = []
    for size in (0, chunk) if chunk else (0,):
        found = differences(subject.on_all_ranks(dtype, size), reference, named, device)
        mistakes = known_mistakes(-(-subject.rows // size) if size else 1)
        compared = f"{label}, chunks of {size}" if size else label
        for group, difference in found.items():
            verdict = judge.verdict(group, difference, mistakes)
            rows.append(GradientRow(compared, group, difference, verdict))

    if low is not None:
        found = differences(low, reference, named, device)
        for group, difference in found.items():
            verdict = low_precision_verdict(difference)
            rows.append(GradientRow(f"{label}, {precision}", group, difference, verdict))

    return rows


def known_mistakes(chunks: int) -> dict[str, float]:
    """Common mistakes in words -> the factor by which they multiply a gradient."""
    ranks = world.size()
    return {
        f"= 1/W, W = {ranks} ranks: a sum over ranks is missing?": 1 / ranks,
        f"= W, W = {ranks} ranks: summed over ranks, not averaged?": ranks,
        "= the number of chunks: counted once per chunk?": chunks,
    }
