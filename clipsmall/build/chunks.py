"""Config -> how many pairs go through the towers at a time."""

import torch
from accelerate import Accelerator

from clipsmall.batch import Pairs
from clipsmall.build import tuning as build_tuning
from clipsmall.config import Config
from clipsmall.distributed import world
from clipsmall.model.chunks import largest_chunk
from clipsmall.model.dual_encoder import DualEncoder, frozen
from clipsmall.model.towers import Loaded
from clipsmall.training import fsdp as sharded

# bytes of the loss: two tiles of 4,096 x 8,192 in float32, with masks
TILES = 512 << 20


def chunk_size(config: Config, accelerator: Accelerator, loaded: Loaded, model: DualEncoder) -> int:
    """0 = all of a rank's pairs at once. `auto` tries a forward and backward pass on a GPU; all
    ranks get the least.

    Raises:
        ValueError: BatchNorm, whose statistics would be a chunk's; or not even one pair fits.
    """
    rows = config.data.batch_size // world.size()
    given = config.model.chunk_size
    kind = torch.nn.modules.batchnorm._BatchNorm
    norms = any(isinstance(part, kind) and not frozen(part) for part in model.towers.modules())
    if not given and config.optim.accumulate > 1 and not norms:
        # who accumulates has memory for a part
        given = rows // config.optim.accumulate
    if given and norms:
        raise ValueError(
            "model.chunk_size: this model has BatchNorm, which would see a chunk for the batch; take one with "
            "LayerNorm (a ViT, a ConvNeXt), or model.chunk_size=0"
        )
    if given != "auto":
        return given
    if accelerator.device.type != "cuda":
        # a host swaps rather than refuses: there is nothing to try
        return 0
    # DDP brings a rank's pixels whole
    waiting = rows if world.size() > 1 else 0
    found = (
        largest_chunk(rows, lambda size: fits(size, accelerator, loaded, model, waiting)) or rows
    )
    least = -int(world.max_over_ranks(torch.tensor(-found, device=accelerator.device)))
    return 0 if least == rows else least


def checkpoint_blocks(
    config: Config, accelerator: Accelerator, loaded: Loaded, model: DualEncoder
) -> None:
    """Make each block's activations anew, as asked; `auto`: on a GPU, if a rank's pairs do not fit
    at once and there are no chunks, which cost as much and save more. All ranks decide alike.

    Raises:
        ValueError: asked of towers that cannot.
    """
    asked = config.model.checkpoint_activations
    small = loaded.description["kind"] == "small"
    if (
        asked == "auto"
        and accelerator.device.type == "cuda"
        and not config.model.chunk_size
        and not small
    ):
        rows = config.data.batch_size // world.size()
        # towers that will be shared out are whole here: nothing can be tried, and who shares them
        # is short of memory
        full = sharded.asked() or not fits(rows, accelerator, loaded, model)
        asked = bool(world.max_over_ranks(torch.tensor(float(full), device=accelerator.device)))
    if asked is True:
        build_tuning.checkpoint_activations(loaded)
    loaded.checkpointed = asked is True


def fits(
    size: int, accelerator: Accelerator, loaded: Loaded, model: DualEncoder, waiting: int = 0
) -> bool:
    """Whether `size` pairs go forth and back beside what else a step holds; the bytes of `waiting`
    others, too.
    """
    device = accelerator.device
    weights = [p for p in model.parameters() if p.requires_grad]
    # BatchNorm counts every batch, this one of zeros, too
    kept = [buffer.clone() for buffer in model.buffers()]
    try:
        # AdamW's moments, and DDP's copy of the gradients
        copies = 2 + (world.size() > 1)
        beside = [torch.empty_like(weight) for weight in weights for _ in range(copies)]
        beside.append(
            torch.empty(TILES + waiting * 3 * loaded.spec.size**2, dtype=torch.uint8, device=device)
        )
        pixels = torch.zeros(
            size, 3, loaded.spec.size, loaded.spec.size, dtype=torch.uint8, device=device
        )
        numbers = torch.arange(size, device=device)
        with accelerator.autocast():
            pairs = Pairs(pixels, loaded.tokenize(["a"] * size).to(device), numbers, numbers)
            image, text = model.outputs(pairs, model.towers)
        total = image.float().sum() + text.float().sum()
        # not with both towers frozen
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        del beside, image, text, total
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)
        torch.cuda.empty_cache()
    return True
