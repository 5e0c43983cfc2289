"""Builds a run from its config: calls every other builder with its section and plain values."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import Tensor

from clipsmall.batch import Progress, RunContext
from clipsmall.build import cache as build_cache
from clipsmall.build import chunks as build_chunks
from clipsmall.build import mining as build_mining
from clipsmall.build import objective as build_objective
from clipsmall.build import tuning as build_tuning
from clipsmall.build.data import TrainingData, training_data
from clipsmall.config import Config
from clipsmall.config.schema import RunSection
from clipsmall.data import LoadedBatch
from clipsmall.distributed import devices, world
from clipsmall.model import load as tower_loading
from clipsmall.model.dual_encoder import DualEncoder, frozen
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint
from clipsmall.storage.run_folder import RunFolder
from clipsmall.training import fsdp, optim
from clipsmall.training.feed import Feed, Stop
from clipsmall.training.state import RunState


def run_state(
    config: Config, accelerator: Accelerator, resumed: Path | None, stop: Stop
) -> tuple[torch.nn.Module, RunState]:
    """The model as wrapped by Accelerate, and all state of the run.

    Args:
        resumed: the checkpoint to continue from; None = a new run.
        stop: listens for signals that end the run.
    """
    set_seed(config.seed)
    device = accelerator.device
    progress = Progress()
    data = training_data(config.data, config.seed)
    loaded = loaded_towers(config, data, resumed)
    context = run_context(config, loaded, data.ids)
    # from_pretrained returns the towers in eval mode
    encoder = dual_encoder(config, loaded, context).to(device).train()
    save_memory(config, accelerator, loaded, encoder)
    losses = objective(config, context)
    if isinstance(losses, torch.nn.Module):
        losses = losses.to(device)
    cache_frozen_towers(config, data, loaded, encoder, accelerator, resumed)
    batches = training_batches(config, data, loaded, encoder, accelerator, progress)

    encoder = synchronised(encoder)
    # Shard only now: above, each rank tries sizes and computes cached features with whole towers.
    if fsdp.asked():
        fsdp.shard_towers(encoder, device)
    adamw = optimizer(config, encoder)
    # before prepare_optimizer, because LambdaLR wraps the optimizer's step function
    schedule = scheduler(config, adamw)
    # Sharded towers average their gradients themselves and need only autocast from Accelerate,
    # which is what evaluation_mode gives.
    model = accelerator.prepare_model(encoder, evaluation_mode=fsdp.asked())
    adamw = accelerator.prepare_optimizer(adamw)
    feed = Feed(
        batches,
        device,
        stop,
        config.data.max_error_rate,
        data.pairs,
        # with chunks, the model moves the images chunk by chunk
        images=not encoder.chunk_size,
    )
    state = RunState(
        accelerator=accelerator,
        model=encoder,
        loaded=loaded,
        optimizer=adamw,
        scheduler=schedule,
        objective=losses,
        feed=feed,
        progress=progress,
        config=config.model_dump(mode="json"),
        fingerprint=data.fingerprint,
        data_description=data.description,
        fixed_options=fixed_options(config),
    )
    # initial weights are equal on all ranks, but dropout differs from rank to rank
    set_seed(config.seed + world.rank())
    if resumed is not None:
        state.load(resumed)
    return model, state


def fixed_options(config: Config) -> tuple[str, ...]:
    """Options that this run cannot change when resumed, in addition to FIXED_OPTIONS."""
    of_objective = build_objective.used_sections(config.objective)
    return of_objective + build_mining.fixed_mining_options(config.mining)


def accelerator(run: RunSection, out: str, chunk_size: int | str) -> Accelerator:
    """The Accelerator, with its device and ranks checked.

    Args:
        out: folder of the run, for trackers that write files.
        chunk_size: model.chunk_size, some values of which do not work with FSDP.

    Raises:
        ValueError: the device lacks the precision, the ranks are not one process group, a tracker
            is not installed, or the launcher has a setting that this training loop ignores.
    """
    devices.check_kernels()
    gpu = torch.accelerator.is_available()
    made = Accelerator(
        cpu=not gpu,
        mixed_precision=devices.precision(run.precision),
        log_with=list(run.trackers) or None,
        project_dir=out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=world.PATIENCE)],
    )
    world.check_ranks(made.num_processes)
    # Accelerate silently drops trackers that are not installed
    available = {str(tracker) for tracker in made.log_with}
    for name in run.trackers:
        if name not in available:
            raise ValueError(
                f"run.trackers: {name} is not installed; pip install 'clipsmall[{name}]'"
            )
    # Accelerate would divide the loss by it, but this loop accumulates no gradients
    if made.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={made.gradient_accumulation_steps} of Accelerate: "
            "not supported; set model.chunk_size for a large batch on a small device, or "
            "optim.accumulate for naive gradient accumulation"
        )
    if made.mixed_precision == "fp16" and not gpu:
        raise ValueError(
            "run.precision=fp16 needs a GPU (on a CPU Accelerate trains in fp32 silently); "
            "use fp32 or bf16"
        )
    if made.mixed_precision == "bf16" and made.device.type == "cuda" and not devices.has_bf16():
        raise ValueError(
            f"run.precision=bf16: {torch.cuda.get_device_name()} has no bf16; use fp16"
        )
    if fsdp.asked():
        fsdp.check_settings(made.mixed_precision, chunk_size)
    return made


def resumed_folder(config: Config, folder: RunFolder, device: torch.device) -> Path | None:
    """The checkpoint to continue from; None for a new run.

    `resume=auto` takes the newest complete checkpoint of `folder`, or starts a new run if there is
    none.

    Raises:
        CheckpointError: the named checkpoint is incomplete, or every checkpoint in `folder` is.
        ValueError: ranks see different checkpoints.
    """
    if not config.resume:
        return None
    if config.resume != "auto":
        checkpoint.verify(Path(config.resume))
        return Path(config.resume)
    found = checkpoint.newest(folder.checkpoints)
    # on a network disk, some machines may still see an older state
    names = world.gather_bytes(str(found).encode(), device)
    if len(set(names)) > 1:
        listed = b", ".join(names).decode()
        raise ValueError(f"{folder.checkpoints}: ranks see different checkpoints: {listed}")
    return found


def loaded_towers(config: Config, data: TrainingData, resumed: Path | None) -> Loaded:
    """The towers: those of the checkpoint (with its vocabulary) when resuming, else by name.

    Also applies the config's choice of trainable parts and of the attention implementation.
    """
    if resumed is not None:
        loaded = tower_loading.rebuild(resumed)
    else:
        model = config.model
        loaded = tower_loading.load_towers(model.name, model.pretrained, data.captions)
        # only trained weights have a scale; the model card names them as the base model
        if loaded.logit_scale is not None:
            loaded.description |= {"base": model.name, "pretrained": model.pretrained}
    build_tuning.tune(config.tune, loaded)
    if config.model.attention != "auto":
        loaded.towers.set_attention(config.model.attention)
    return loaded


def run_context(config: Config, loaded: Loaded, ids: Tensor | None) -> RunContext:
    """Facts about the run for heads and stateful objectives.

    Args:
        ids: (n,) `index` of all training pairs, ascending; None for streamed data.
    """
    return build_objective.context_of_run(
        loaded,
        ids,
        batch_size=config.compared,
        steps=config.steps * config.optim.accumulate,
        seed=config.seed,
    )


def objective(config: Config, context: RunContext) -> Callable[..., dict[str, Tensor]]:
    """The objective of the run: one or a weighted sum of several, with the queue, if any."""
    return build_objective.objective_of_mix(
        config.objective,
        context,
        pairs=config.optim.pairs,
        accumulate=config.optim.accumulate,
    )


def dual_encoder(config: Config, loaded: Loaded, context: RunContext) -> DualEncoder:
    """The towers with the logit_scale, logit_bias and heads that the objective needs."""
    section = config.objective
    scale = build_objective.initial_scale(section, config.model.logit_scale, loaded)
    bias = build_objective.initial_bias(section, config.model.logit_bias, loaded, context, scale)
    # stored in the checkpoint, because evaluation needs it
    retrieval_head = build_objective.retrieval_head(section)
    if retrieval_head:
        loaded.description["retrieval"] = {
            "head": retrieval_head,
            "width": context.width,
            "options": build_objective.head_options(section)[retrieval_head],
        }
    if build_objective.relative_bias(section):
        # the bias is in units of the scale; other programs expect the product
        loaded.description["relative_bias"] = True
    # SigLIP's trained scales are around 117
    largest = loaded.description.setdefault("largest_scale", max(100.0, scale))
    return DualEncoder(
        loaded.towers,
        loaded.spec,
        scale,
        bias,
        learn_scale=config.tune.logit_scale and build_objective.learns_scale(section),
        learn_bias=config.tune.logit_bias and build_objective.learns_bias(section),
        heads=build_objective.heads(section, context),
        retrieval_head=retrieval_head,
        largest_scale=largest,
    )


def save_memory(
    config: Config, accelerator: Accelerator, loaded: Loaded, encoder: DualEncoder
) -> None:
    """Set up activation checkpointing, then chunks, whose `auto` tries the model as it is then."""
    rows = config.data.batch_size // world.size()
    build_chunks.checkpoint_blocks(
        config.model.checkpoint_activations,
        config.model.chunk_size,
        rows,
        accelerator,
        loaded,
        encoder,
    )
    encoder.chunk_size = build_chunks.chunk_size(
        config.model.chunk_size,
        rows,
        config.optim.accumulate,
        accelerator,
        loaded,
        encoder,
    )


def cache_frozen_towers(
    config: Config,
    data: TrainingData,
    loaded: Loaded,
    encoder: DualEncoder,
    accelerator: Accelerator,
    resumed: Path | None,
) -> None:
    """Make the data return cached features of towers whose outputs are the same in every epoch."""
    towers = build_cache.cacheable_towers(
        config.tune,
        data,
        encoder,
        steps=config.steps,
        augmented=config.data.crop_scale < 1,
        reads_tokens=build_objective.reads_token_ids(config.objective),
    )
    if not towers or data.catalog is None:
        return
    if resumed is not None:
        build_cache.load_towers_of(resumed, encoder)
    data.features |= build_cache.frozen_features(
        towers,
        config.tune.cache_folder,
        data.catalog,
        loaded,
        encoder,
        accelerator,
        batch_size=config.evaluate.batch_size,
        workers=config.data.workers,
        max_pixels=config.data.max_pixels,
    )


def training_batches(
    config: Config,
    data: TrainingData,
    loaded: Loaded,
    encoder: DualEncoder,
    accelerator: Accelerator,
    progress: Progress,
) -> Iterable[LoadedBatch]:
    """This rank's slices of the run's batches, in the order of the data or mined."""
    return build_mining.batches(
        config.mining,
        data,
        loaded,
        encoder,
        accelerator,
        progress,
        batch_size=config.data.batch_size,
        steps=config.steps,
        seed=config.seed,
        objective_weights=build_objective.mining_weights(config.objective),
    )


def synchronised(model: DualEncoder) -> DualEncoder:
    """The model with BatchNorm statistics over all ranks, as a single process would compute them.

    Raises:
        ValueError: several CPU ranks, where torch has no SyncBatchNorm; or FSDP, which is untested.
    """
    kind = torch.nn.modules.batchnorm._BatchNorm
    norms = any(isinstance(part, kind) and not frozen(part) for part in model.modules())
    if world.size() == 1 or not norms:
        return model
    if fsdp.asked():
        raise ValueError(
            "this model has BatchNorm, which is not supported with FSDP; launch without FSDP"
        )
    if not next(model.parameters()).is_cuda:
        raise ValueError(
            "this model has BatchNorm, which torch cannot synchronise over CPU ranks; start one "
            "process"
        )
    convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm
    model.towers = convert(model.towers)  # type: ignore[no-untyped-call]
    return model


def optimizer(config: Config, model: DualEncoder) -> torch.optim.Optimizer:
    """AdamW that keeps the logit scale within its bounds after every step."""
    asked = config.optim
    lr = optim.scaled_lr(asked.lr, config.data.batch_size, asked.lr_scaling)
    scale = build_tuning.lr_scale(asked.layer_decay, model)
    made = optim.adamw(
        model,
        lr,
        asked.weight_decay,
        asked.betas,
        asked.eps,
        scale,
    )
    build_tuning.refuse_idle(made, model)
    made.register_step_post_hook(lambda *_: model.after_step())
    return made


def scheduler(config: Config, optimizer: torch.optim.Optimizer) -> Any:
    """Warm-up and cosine over the whole run."""
    warmup = config.optim.warmup_pairs // config.data.batch_size
    return optim.warmup_cosine(optimizer, config.steps, warmup)
