"""Config -> objects: one short function a noun. With the entries, the only room that knows
Config.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from clipsmall.batch import Progress, RunContext
from clipsmall.build import (
    cache as build_cache,
)
from clipsmall.build import (
    chunks as build_chunks,
)
from clipsmall.build import (
    mining as build_mining,
)
from clipsmall.build import (
    objective as build_objective,
)
from clipsmall.build import (
    tuning as build_tuning,
)
from clipsmall.build.data import TrainingData, training_data
from clipsmall.config import Config
from clipsmall.distributed import devices, world
from clipsmall.model import load as tower_loading
from clipsmall.model.dual_encoder import DualEncoder, frozen
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint
from clipsmall.storage.run_folder import RunFolder
from clipsmall.training import fsdp as sharded
from clipsmall.training import optim
from clipsmall.training.feed import Feed, Stop
from clipsmall.training.state import RunState


def accelerator(config: Config) -> Accelerator:
    """Devices and ranks. Raises ValueError for a precision the device lacks, and for ranks that are
    not joined.
    """
    devices.check_kernels()
    gpu = torch.accelerator.is_available()
    made = Accelerator(
        cpu=not gpu,
        mixed_precision=devices.precision(config.run.precision),
        log_with=list(config.run.trackers) or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=world.PATIENCE)],
    )
    world.check_ranks(made.num_processes)
    started = {str(tracker) for tracker in made.log_with}
    if missing := [name for name in config.run.trackers if name not in started]:
        raise ValueError(
            f"run.trackers: {missing[0]} is not installed; pip install 'clipsmall[{missing[0]}]'"
        )
    # Accelerate would divide the loss by it, and this loop adds nothing up
    if made.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={made.gradient_accumulation_steps} of Accelerate: leave it out; a large "
            "batch on a small device is model.chunk_size, small batches added up are optim.accumulate"
        )
    if made.mixed_precision == "fp16" and not gpu:
        raise ValueError(
            "run.precision=fp16 needs a GPU (on a CPU Accelerate trains in fp32 silently); use fp32 or bf16"
        )
    if made.mixed_precision == "bf16" and made.device.type == "cuda" and not devices.has_bf16():
        raise ValueError(
            f"run.precision=bf16: {torch.cuda.get_device_name()} has no bf16; use fp16"
        )
    if sharded.asked():
        sharded.check(made.mixed_precision, config.model.chunk_size)
    return made


def loaded_towers(config: Config, data: TrainingData, resumed: Path | None) -> Loaded:
    """Of the checkpoint if the run continues (same vocabulary), else by name; tuned as the config
    says.
    """
    if resumed is not None:
        loaded = tower_loading.rebuild(resumed)
    else:
        loaded = tower_loading.load_towers(
            config.model.name, config.model.pretrained, data.captions
        )
        # trained before: what a model card names
        if loaded.logit_scale is not None:
            loaded.description |= {"base": config.model.name, "pretrained": config.model.pretrained}
    build_tuning.tune(config, loaded)
    build_tuning.lean(config, loaded)
    return loaded


def dual_encoder(config: Config, loaded: Loaded, setting: RunContext) -> DualEncoder:
    """Towers with the scale, bias and heads that the objective asks for."""
    scale, bias = build_objective.starts(config, loaded, setting)
    through = build_objective.through(config)
    # a checkpoint says so, or nobody could evaluate it
    if through:
        given = build_objective.head_options(config)[through]
        loaded.description["retrieval"] = {
            "head": through,
            "width": setting.width,
            "options": given,
        }
    asked = build_objective.kinds(config)
    if "sigmoid" in config.objective.mix and config.objective.sigmoid.relative_bias:
        # in units of the scale: others want the product
        loaded.description["relative_bias"] = True
    # SigLIP's are around 117
    largest = loaded.description.setdefault("largest_scale", max(100.0, scale))
    return DualEncoder(
        loaded.towers,
        loaded.spec,
        scale,
        bias,
        learn_scale=config.tune.logit_scale
        and any(build_objective.learns_scale(config, kind) for kind in asked),
        learn_bias=config.tune.logit_bias and any(kind.bias is not None for kind in asked),
        heads=build_objective.heads(config, setting),
        through=through,
        largest_scale=largest,
    )


def synchronised(model: DualEncoder) -> DualEncoder:
    """BatchNorm over all ranks, as one process would have it.

    Raises:
        ValueError: on CPU ranks, where torch cannot; with FSDP, where nobody has tried.
    """
    kind = torch.nn.modules.batchnorm._BatchNorm
    norms = any(isinstance(part, kind) and not frozen(part) for part in model.modules())
    if world.size() == 1 or not norms:
        return model
    if sharded.asked():
        raise ValueError(
            "this model has BatchNorm, which FSDP does not take here; launch without it"
        )
    if not next(model.parameters()).is_cuda:
        raise ValueError(
            "this model has BatchNorm, which several CPU ranks would each compute for themselves: run one"
        )
    model.towers = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.towers)  # type: ignore[no-untyped-call]
    return model


def optimizer(config: Config, model: DualEncoder) -> torch.optim.Optimizer:
    """AdamW that keeps the logit scale within its bounds after every step."""
    lr = optim.scaled_lr(config.optim.lr, config.data.batch_size, config.optim.lr_scaling)
    scale = build_tuning.lr_scale(config, model)
    made = optim.adamw(
        model, lr, config.optim.weight_decay, config.optim.betas, config.optim.eps, scale
    )
    build_tuning.refuse_idle(made, model)
    made.register_step_post_hook(lambda *_: model.after_step())
    return made


def scheduler(config: Config, optimizer: torch.optim.Optimizer) -> Any:
    return optim.warmup_cosine(
        optimizer, config.steps, config.optim.warmup_pairs // config.data.batch_size
    )


def resumed_folder(config: Config, folder: RunFolder, device: torch.device) -> Path | None:
    """The checkpoint to continue: the newest good one (`auto`; None if there is none yet), or the
    one named.

    Raises:
        CheckpointError: the named one is not whole, or none of those there; ranks see different
            ones.
    """
    if config.resume == "auto":
        found = checkpoint.newest(folder.checkpoints)
        names = world.gather_bytes(str(found).encode(), device)
        # a network disk that some machines see as it was
        if len(set(names)) > 1:
            raise ValueError(
                f"{folder.checkpoints}: ranks see different checkpoints: {b', '.join(names).decode()}"
            )
        return found
    if config.resume:
        checkpoint.verify(Path(config.resume))
        return Path(config.resume)
    return None


def run_state(
    config: Config, accelerator: Accelerator, resumed: Path | None, stop: Stop
) -> tuple[torch.nn.Module, RunState]:
    """The model as Accelerate wraps it, and all state of the run, put back from `resumed` if
    given.
    """
    set_seed(config.seed)
    data = training_data(config)
    progress = Progress()
    device = accelerator.device
    loaded = loaded_towers(config, data, resumed)
    setting = build_objective.setting(config, loaded, data.ids)
    # from_pretrained leaves towers in eval mode
    encoder = dual_encoder(config, loaded, setting).to(device).train()
    build_chunks.checkpoint_blocks(config, accelerator, loaded, encoder)
    encoder.chunk_size = build_chunks.chunk_size(config, accelerator, loaded, encoder)
    objective = build_objective.objective(config, setting)
    if isinstance(objective, torch.nn.Module):
        objective = objective.to(device)
    data.made |= build_cache.frozen_features(config, data, loaded, encoder, accelerator, resumed)
    batches = build_mining.batches(config, data, loaded, progress, accelerator, encoder)
    encoder = synchronised(encoder)
    if sharded.asked():
        # whole so far: what was tried out and cached above, each rank did alone
        sharded.shard(encoder, device)
    adamw = optimizer(config, encoder)
    # before prepare, which keeps the step function it finds
    schedule = scheduler(config, adamw)
    # sharded towers average their gradients themselves: of Accelerate they need autocast, as in
    # evaluation
    model = accelerator.prepare_model(encoder, evaluation_mode=sharded.asked())
    adamw = accelerator.prepare_optimizer(adamw)
    state = RunState(
        accelerator=accelerator,
        model=encoder,
        loaded=loaded,
        optimizer=adamw,
        scheduler=schedule,
        objective=objective,
        feed=Feed(
            batches,
            device,
            stop,
            config.data.max_error_rate,
            data.pairs,
            images=not encoder.chunk_size,
        ),
        progress=progress,
        config=config.model_dump(mode="json"),
        fingerprint=data.fingerprint,
        source=data.words,
        fixed=build_objective.sections(config) + build_mining.fixed(config),
    )
    # equal weights, but dropout of its own on every rank
    set_seed(config.seed + world.rank())
    if resumed is not None:
        state.load(resumed)
    return model, state
