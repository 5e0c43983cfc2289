"""Sets up the two ways to save activation memory: chunks and activation checkpointing."""

from typing import Literal

import torch
from accelerate import Accelerator

from clipsmall.batch import Pairs
from clipsmall.distributed import world
from clipsmall.model.chunks import largest_chunk
from clipsmall.model.dual_encoder import DualEncoder, frozen
from clipsmall.model.towers import Loaded
from clipsmall.training import fsdp

# bytes of memory for the loss: two tiles of 4,096 x 8,192 in float32, with masks
LOSS_BYTES = 512 << 20


def chunk_size(
    asked: int | Literal["auto"],
    rows: int,
    parts: int,
    accelerator: Accelerator,
    loaded: Loaded,
    model: DualEncoder,
) -> int:
    """Number of pairs encoded at a time; 0 = all of a rank's pairs at once.

    Args:
        asked: model.chunk_size. `auto` finds the largest chunk that fits the GPU by trying forward
            and backward passes; all ranks use the smallest result.
        rows: pairs per rank.
        parts: number of parts into which naive accumulation cuts the batch; 1 = no accumulation.

    Raises:
        ValueError: the model has BatchNorm, whose statistics would be those of a chunk; or not
            even one pair fits.
    """
    norms = trains_batch_norm(model)
    given = asked
    if not given and parts > 1 and not norms:
        # with accumulation, a part of the batch has to fit, not all of it
        given = rows // parts
    if given and norms:
        raise ValueError(
            "model.chunk_size: this model has BatchNorm, whose statistics would be those of a "
            "chunk; use a model with LayerNorm (a ViT, a ConvNeXt), or model.chunk_size=0"
        )
    if given != "auto":
        return given
    if accelerator.device.type != "cuda":
        # a CPU host swaps instead of running out of memory, so trying tells nothing
        return 0
    # DDP moves all of a rank's pixels to the GPU before the forward pass; a single GPU moves them
    # chunk by chunk
    waiting = rows if world.size() > 1 else 0
    largest = largest_chunk(rows, lambda size: fits(size, accelerator, loaded, model, waiting))
    # 0 = all fit at once
    found = largest or rows
    least = -int(world.max_over_ranks(torch.tensor(-found, device=accelerator.device)))
    return 0 if least == rows else least


def trains_batch_norm(model: DualEncoder) -> bool:
    """Whether the towers have a BatchNorm layer that computes batch statistics."""
    # the base class of all BatchNorm layers in torch, SyncBatchNorm included
    kind = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(part, kind) and not frozen(part) for part in model.towers.modules())


def checkpoint_blocks(
    asked: bool | Literal["auto"],
    chunk_size: int | Literal["auto"],
    rows: int,
    accelerator: Accelerator,
    loaded: Loaded,
    model: DualEncoder,
) -> None:
    """Turn activation checkpointing on if the config asks for it; all ranks decide alike.

    `auto` turns it on if a rank's pairs do not fit the GPU at once and model.chunk_size is 0:
    chunks cost as much time and save more memory.

    Args:
        asked: model.checkpoint_activations.
        chunk_size: model.chunk_size.
        rows: pairs per rank.

    Raises:
        ValueError: these towers do not support activation checkpointing.
    """
    on_gpu = accelerator.device.type == "cuda"
    if asked == "auto" and on_gpu and not chunk_size and loaded.towers.can_checkpoint:
        # Towers that FSDP will shard are still whole here, so nothing can be tried; with FSDP
        # memory is assumed to be short.
        short = fsdp.asked() or not fits(rows, accelerator, loaded, model)
        asked = bool(world.max_over_ranks(torch.tensor(float(short), device=accelerator.device)))
    if asked is True:
        loaded.towers.checkpoint_activations()
    loaded.checkpointed = asked is True


def fits(
    size: int, accelerator: Accelerator, loaded: Loaded, model: DualEncoder, waiting: int = 0
) -> bool:
    """Try whether a forward and backward pass over `size` pairs fits the GPU.

    The other memory of a step is allocated first: the optimizer's moments, DDP's copy of the
    gradients, the loss, and the pixels of `waiting` pairs. The model is left unchanged.
    """
    # the trial batch of zeros changes BatchNorm's running statistics: restore them
    kept = [buffer.clone() for buffer in model.buffers()]
    try:
        try_step(size, accelerator, loaded, model, waiting)
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)
        torch.cuda.empty_cache()
    return True


def try_step(
    size: int, accelerator: Accelerator, loaded: Loaded, model: DualEncoder, waiting: int
) -> None:
    """One forward and backward pass for `fits`. Raises torch.OutOfMemoryError."""
    device = accelerator.device
    side = loaded.spec.size
    # AdamW keeps two moments of each weight; DDP copies the gradients into buckets
    copies = 2 + (world.size() > 1)
    held = []
    for weight in model.parameters():
        if weight.requires_grad:
            held += [torch.empty_like(weight) for _ in range(copies)]
    waiting_bytes = waiting * 3 * side**2
    held.append(torch.empty(LOSS_BYTES + waiting_bytes, dtype=torch.uint8, device=device))

    pixels = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=device)
    ids = loaded.tokenize(["a"] * size).to(device)
    numbers = torch.arange(size, device=device)
    with accelerator.autocast():
        image, text = model.outputs(Pairs(pixels, ids, numbers, numbers), model.towers)
    total = image.float().sum() + text.float().sum()
    # with both towers frozen there is no backward pass
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
