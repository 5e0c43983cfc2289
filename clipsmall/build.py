"""Config -> objects: one short function a noun. With the entries, the only room that knows Config."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from clipsmall import checkpoint, optim, tower_loading, world
from clipsmall.batch import Progress
from clipsmall.config import Config
from clipsmall.feed import Feed, Stop
from clipsmall.objectives import OBJECTIVES, USES_BIAS
from clipsmall.preprocess import ImageTransform
from clipsmall.run_folder import RunFolder
from clipsmall.shards import Catalog, GlobalBatches, Order, batch_loader, captions_of, open_catalog
from clipsmall.state import RunState
from clipsmall.tower_sources import Loaded
from clipsmall.towers import DualEncoder


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
        return tower_loading.rebuild(resumed)
    return tower_loading.load_towers(config.model.name, config.model.pretrained, lambda: captions(catalog))


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


def order(config: Config, catalog: Catalog) -> Order:
    return Order(catalog.sizes, config.seed, config.data.shuffle_window)


def global_batches(config: Config, catalog: Catalog, loaded: Loaded) -> GlobalBatches:
    return GlobalBatches(
        catalog,
        order(config, catalog),
        ImageTransform(loaded.spec, config.data.crop_scale, config.data.max_pixels),
        loaded.tokenize,
        config.data.batch_size,
        world.rank(),
        world.size(),
    )


def feed(
    config: Config, catalog: Catalog, loaded: Loaded, progress: Progress, device: torch.device, stop: Stop
) -> Feed:
    """From the batch after `progress` to the last one; `progress` is read when iteration starts."""
    batches = global_batches(config, catalog, loaded)

    class Remaining:
        def __iter__(self) -> Iterator[int]:
            return iter(range(progress.step, config.steps))

        def __len__(self) -> int:
            return config.steps - progress.step

    loader = batch_loader(batches, Remaining(), config.data.workers, pin=device.type == "cuda")
    return Feed(loader, device, stop, config.data.max_error_rate, len(catalog))


def source(config: Config, catalog: Catalog) -> str:
    """The training data in words, with all that is left out of it."""
    left, rest = sum(catalog.left_out.values()), len(catalog) % config.data.batch_size
    return (
        f"{len(catalog):,} pairs in {len(catalog.shards)} shards"
        + (f" ({left} known to be bad are left out: {catalog.left_out})" if left else "")
        + f"; an epoch is {len(catalog) // config.data.batch_size} batches"
        + (f" and {rest} pairs that wait for another epoch" if rest else "")
    )


def run_state(
    config: Config, accelerator: Accelerator, resumed: Path | None, stop: Stop
) -> tuple[torch.nn.Module, RunState]:
    """The model as Accelerate wraps it, and all state of the run, put back from `resumed` if given."""
    set_seed(config.seed)
    catalog = open_catalog(config.data.train)
    loaded = loaded_towers(config, catalog, resumed)
    encoder, progress = dual_encoder(config, loaded).to(accelerator.device), Progress()
    fed = feed(config, catalog, loaded, progress, accelerator.device, stop)
    model, adamw = accelerator.prepare(encoder, optimizer(config, encoder))
    state = RunState(
        accelerator=accelerator,
        model=encoder,
        loaded=loaded,
        optimizer=adamw,
        scheduler=scheduler(config, adamw.optimizer),
        objective=objective(config),
        feed=fed,
        progress=progress,
        config=config.model_dump(mode="json"),
        fingerprint=catalog.fingerprint,
        source=source(config, catalog),
    )
    if resumed is not None:
        state.load(resumed)
    return model, state


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
