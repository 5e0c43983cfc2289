"""Config -> objects: one short function a noun. With the entries, the only room that knows Config."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from clipsmall import checkpoint, optim, towers, world
from clipsmall.batch import Progress
from clipsmall.config import Config
from clipsmall.evaluation import Cell, Encoder, print_cells, retrieval, write_cell, zero_shot
from clipsmall.feed import Feed, Stop
from clipsmall.objectives import OBJECTIVES, USES_BIAS
from clipsmall.preprocess import ImageTransform
from clipsmall.report import Report
from clipsmall.run_folder import RunFolder
from clipsmall.shards import Catalog, GlobalBatches, Order, batch_loader, captions_of, open_catalog
from clipsmall.state import RunState
from clipsmall.towers import DualEncoder, Loaded


def accelerator(config: Config) -> Accelerator:
    """Devices and ranks. Raises ValueError for a precision the device lacks, and for ranks that are not joined."""
    gpu = torch.accelerator.is_available()
    if config.run.precision == "fp16" and not gpu:
        raise ValueError("run.precision=fp16 needs a GPU (Accelerate would silently train in fp32); use no or bf16")
    cuda = torch.cuda.is_available()
    if config.run.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"run.precision=bf16: {torch.cuda.get_device_name()} has no bf16; use fp16")
    made = Accelerator(
        cpu=not gpu,
        mixed_precision=config.run.precision,
        log_with=list(config.run.trackers) or None,
        project_dir=config.out,
    )
    world.check(made.num_processes)
    return made


def captions(catalog: Catalog) -> Iterator[str]:
    """Every training caption, for vocabularies."""
    for row in range(len(catalog)):
        members = catalog.read(row)
        yield from captions_of(members.text, json.loads(members.json) if members.json else {})


def loaded_towers(config: Config, catalog: Catalog, resumed: Path | None) -> Loaded:
    """Of the checkpoint if the run continues (same vocabulary), else by name."""
    if resumed is not None:
        return towers.rebuild(resumed)
    return towers.load_towers(config.model.name, config.model.pretrained, lambda: captions(catalog))


def dual_encoder(config: Config, loaded: Loaded) -> DualEncoder:
    """Towers with scale and bias: as the user says, else as the weights were trained, else as the paper starts.

    softmax and sinkhorn start at scale 1/0.07 (CLIP), sigmoid at 10 (SigLIP). The bias starts at −log(B − 1), the
    log odds of a true pair in a batch of B; SigLIP's −10 is the same for B = 22,027.
    """
    learn_bias = config.objective.name in USES_BIAS
    scale: float = 10.0 if learn_bias else 1 / 0.07
    if config.model.logit_scale != "auto":
        scale = config.model.logit_scale
    elif loaded.logit_scale is not None:
        scale = loaded.logit_scale
    bias = -math.log(config.data.batch_size - 1) if learn_bias else 0.0
    if config.model.logit_bias != "auto":
        bias = config.model.logit_bias
    elif loaded.logit_bias is not None:
        bias = loaded.logit_bias
    return DualEncoder(loaded.towers, loaded.spec, scale, bias, learn_bias)


def objective(config: Config) -> Callable[..., dict[str, Tensor]]:
    chosen = partial(OBJECTIVES[config.objective.name], mask_duplicates=config.objective.mask_duplicates)
    if config.objective.name == "sinkhorn":
        return partial(chosen, iterations=config.objective.iterations, tolerance=config.objective.tolerance)
    return chosen


def global_batches(config: Config, catalog: Catalog, loaded: Loaded) -> GlobalBatches:
    return GlobalBatches(
        catalog,
        Order(catalog.sizes, config.seed, config.data.shuffle_window),
        ImageTransform(loaded.spec, config.data.crop_scale, config.data.max_pixels),
        loaded.tokenize,
        config.data.batch_size,
        world.rank(),
        world.size(),
    )


def feed(config: Config, batches: GlobalBatches, progress: Progress, device: torch.device, stop: Stop) -> Feed:
    """From the batch after `progress` to the last one; `progress` is read when iteration starts."""

    class Remaining:
        def __iter__(self) -> Iterator[int]:
            return iter(range(progress.step, config.steps))

        def __len__(self) -> int:
            return config.steps - progress.step

    loader = batch_loader(batches, Remaining(), config.data.workers, pin=device.type == "cuda")
    return Feed(loader, device, stop, config.data.max_error_rate, len(batches.catalog))


def optimizer(config: Config, model: DualEncoder) -> torch.optim.Optimizer:
    """AdamW that keeps the logit scale within its bounds after every step."""
    lr = optim.scaled_lr(config.optim.lr, config.data.batch_size, config.optim.lr_scaling)
    made = optim.adamw(model, lr, config.optim.weight_decay, config.optim.betas, config.optim.eps)
    made.register_step_post_hook(lambda *_: model.clamp_logit_scale())
    return made


def scheduler(config: Config, optimizer: torch.optim.Optimizer) -> Any:
    return optim.warmup_cosine(optimizer, config.steps, config.optim.warmup_pairs // config.data.batch_size)


def resumed_folder(config: Config, folder: RunFolder) -> Path | None:
    """The checkpoint to continue: the newest good one (`auto`; None if there is none yet), or the one named.

    Raises:
        CheckpointError: the named one is not whole.
    """
    if config.resume == "auto":
        return checkpoint.newest(folder.checkpoints)
    if config.resume:
        checkpoint.verify(Path(config.resume))
        return Path(config.resume)
    return None


def evaluations(config: Config) -> list[Callable[[Encoder], Cell]]:
    """Shards are opened now, so that a missing one is told before training, not after."""
    found: list[Callable[[Encoder], Cell]] = []
    for z in config.evaluate.zero_shot:
        catalog = open_catalog(z.data)
        found.append(
            partial(zero_shot, catalog=catalog, name=z.name, classes=z.classes, templates=z.templates, label=z.label)
        )
    for r in config.evaluate.retrieval:
        found.append(partial(retrieval, catalog=open_catalog(r.data), name=r.name))
    return found


def evaluate_job(
    config: Config, state: RunState, report: Report, folder: RunFolder, jobs: list[Callable[[Encoder], Cell]]
) -> Callable[[Progress, Any], None]:
    """A job that fills all cells: files beside the run, a line in metrics.jsonl, a table on the terminal."""
    encoder = Encoder(state.model, state.loaded.tokenize, state.accelerator.device, config.evaluate.batch_size)

    def run(progress: Progress, losses: Any) -> None:
        cells = [job(encoder) for job in jobs]
        row: dict[str, Any] = {"step": progress.step, "pairs": progress.pairs}
        for cell in cells:
            row |= {f"{cell.dataset}/{name}": value for name, value in cell.metrics.items()}
            row |= {f"{cell.dataset}/{name}/chance": value for name, value in cell.chance.items()}
            if state.accelerator.is_main_process:
                write_cell(cell, folder.evaluations, Path(config.model.name).stem, folder.path.name)
        if cells:
            report.write(row)
            report.bar.write(print_cells(cells)) if state.accelerator.is_main_process else None

    return run


def load_model(name: str, pretrained: str = "") -> tuple[DualEncoder, Loaded]:
    """A model to evaluate: a run folder or checkpoint of ours, or anything `towers.load_towers` knows.

    Raises:
        ValueError: nothing usable of that name.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        newest = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path}: no complete checkpoint in this run")
        path = newest
    if (path / "manifest.json").exists():
        checkpoint.verify(path)
        loaded = towers.rebuild(path)
        model = DualEncoder(loaded.towers, loaded.spec, 1.0, 0.0, False)
        model.load_state_dict(checkpoint.read_tensors(path, "model"))
        return model, loaded

    def no_captions() -> Iterator[str]:
        raise ValueError(f"{name}: an untrained tower JSON has no vocabulary; give a run folder or checkpoint")

    loaded = towers.load_towers(name, pretrained, no_captions)
    model = DualEncoder(loaded.towers, loaded.spec, loaded.logit_scale or 1.0, loaded.logit_bias or 0.0, False)
    return model, loaded
