"""A batch through a tower chunk by chunk: the activations of one chunk, the gradient of the whole
batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(
    tower: Callable[[Tensor], Tensor], inputs: Tensor, size: int, device: torch.device
) -> Tensor:
    """tower(inputs), at most `size` rows at a time; exact, with random layers too.

    GradCache (Gao et al. 2021, arXiv 2101.06983) by checkpointing: a chunk's activations are
    dropped after its forward pass and made again, with the same random numbers, when its gradient
    is asked for. So there is one forward and one backward pass to DDP, autocast and GradScaler, and
    scale and bias are ordinary parameters. It costs a second forward
    pass: a third of a step.

    Args:
        tower: rows -> rows, each by itself: no batch statistics.
        inputs: (B, ...) on `device`, or in host memory: they travel chunk by chunk.
        size: rows of a chunk; 0 = all at once.
    """
    if not size or len(inputs) <= size:
        return tower(inputs.to(device))
    parts = torch.split(inputs, size)
    if not torch.is_grad_enabled():
        return torch.cat([tower(part.to(device)) for part in parts])
    # tells checkpoint whose generator to replay when the parts lie elsewhere
    here = torch.empty(0, device=device)

    def travelled(part: Tensor, here: Tensor) -> Tensor:
        return tower(part.to(here.device, non_blocking=True))

    return torch.cat([checkpoint(travelled, part, here, use_reentrant=False) for part in parts])


def largest_chunk(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest of `rows`, ½, ¼ … 1 that fits; 0 (all at once) if `rows` do.

    Raises:
        ValueError: not even one row fits.
    """
    size = rows
    while not fits(size):
        if size == 1:
            raise ValueError(
                "model.chunk_size=auto: not even one pair fits the device; take a smaller model or images"
            )
        size = (size + 1) // 2
    return 0 if size == rows else size
