"""Config -> how many pairs go through the towers at a time."""

import torch
from accelerate import Accelerator

from clipsmall import build_tuning, world
from clipsmall.batch import Pairs
from clipsmall.chunks import largest_chunk
from clipsmall.config import Config
from clipsmall.tower_sources import Loaded
from clipsmall.towers import DualEncoder, frozen


def chunk_size(config: Config, accelerator: Accelerator, loaded: Loaded, model: DualEncoder) -> int:
    """0 = all of a rank's pairs at once. `auto` tries a forward and backward pass on a GPU; all ranks get the least.

    Raises:
        ValueError: BatchNorm, whose statistics would be a chunk's; or not even one pair fits.
    """
    rows = config.data.batch_size // world.size()
    given = config.model.chunk_size
    kind = torch.nn.modules.batchnorm._BatchNorm
    norms = any(isinstance(part, kind) and not frozen(part) for part in model.towers.modules())
    if not given and config.optim.accumulate > 1 and not norms:
        given = rows // config.optim.accumulate  # who accumulates has memory for a part
    if given and norms:
        raise ValueError(
            "model.chunk_size: this model has BatchNorm, which would see a chunk for the batch; take one with "
            "LayerNorm (a ViT, a ConvNeXt), or model.chunk_size=0"
        )
    if given != "auto":
        return given
    if accelerator.device.type != "cuda":
        return 0  # a host swaps rather than refuses: there is nothing to try
    found = largest_chunk(rows, lambda size: fits(size, accelerator, loaded, model)) or rows
    least = -int(world.maximum(torch.tensor(-found, device=accelerator.device)))
    return 0 if least == rows else least


def checkpoint_blocks(config: Config, accelerator: Accelerator, loaded: Loaded, model: DualEncoder) -> None:
    """Make each block's activations anew, as asked; `auto`: on a GPU, if a rank's pairs do not fit at once and there
    are no chunks, which cost as much and save more. All ranks decide alike.

    Raises:
        ValueError: asked of towers that cannot.
    """
    asked = config.model.checkpoint_activations
    if asked == "auto" and accelerator.device.type == "cuda" and not config.model.chunk_size:
        rows = config.data.batch_size // world.size()
        full = loaded.description["kind"] != "small" and not fits(rows, accelerator, loaded, model)
        asked = bool(world.maximum(torch.tensor(float(full), device=accelerator.device)))
    if asked is True:
        build_tuning.checkpoint_activations(loaded)
    loaded.checkpointed = asked is True


def fits(size: int, accelerator: Accelerator, loaded: Loaded, model: DualEncoder) -> bool:
    """Whether `size` pairs go forth and back, with AdamW's two moments beside them."""
    device, weights = accelerator.device, [p for p in model.parameters() if p.requires_grad]
    kept = [buffer.clone() for buffer in model.buffers()]  # BatchNorm counts every batch, this one of zeros, too
    try:
        moments = [torch.empty_like(weight) for weight in weights for _ in range(2)]
        pixels = torch.zeros(size, 3, loaded.spec.size, loaded.spec.size, dtype=torch.uint8, device=device)
        numbers = torch.arange(size, device=device)
        with accelerator.autocast():
            pairs = Pairs(pixels, loaded.tokenize(["a"] * size).to(device), numbers, numbers)
            image, text = model.outputs(pairs, model.towers)
        total = image.float().sum() + text.float().sum()
        if total.requires_grad:  # not with both towers frozen
            total.backward()  # type: ignore[no-untyped-call]
        del moments, image, text, total
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)
        torch.cuda.empty_cache()
    return True
