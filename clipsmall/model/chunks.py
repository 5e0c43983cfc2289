"""Encodes a batch chunk by chunk: memory for one chunk, the gradient of the whole batch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(
    tower: Callable[[Tensor], Tensor], inputs: Tensor, size: int, device: torch.device
) -> Tensor:
    """Compute tower(inputs), at most `size` rows at a time; exact, even with dropout.

    GradCache (Gao et al. 2021, arXiv 2101.06983) by activation checkpointing: a chunk's activations
    are dropped after its forward pass, and recomputed with the same random numbers in the backward
    pass. So DDP, autocast and GradScaler see one forward and one backward pass,
    and scale and bias are ordinary parameters. It costs a second forward pass: a third of a step.

    Args:
        tower: maps rows to rows independently, without batch statistics.
        inputs: (B, ...) on `device`, or in host memory, from which they are copied chunk by chunk.
        size: rows per chunk; 0 = all at once.
    """
    if not size or len(inputs) <= size:
        return tower(inputs.to(device))
    parts = torch.split(inputs, size)
    if not torch.is_grad_enabled():
        return torch.cat([tower(part.to(device)) for part in parts])
    # tells checkpoint which device's random state to replay if the inputs are in host memory
    on_device = torch.empty(0, device=device)

    def move_and_encode(part: Tensor, on_device: Tensor) -> Tensor:
        return tower(part.to(on_device.device, non_blocking=True))

    outputs = [checkpoint(move_and_encode, part, on_device, use_reentrant=False) for part in parts]
    return torch.cat(outputs)


def largest_chunk(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest of `rows`, rows/2, rows/4, …, 1 that fits; 0 (all at once) if `rows` fit.

    Raises:
        ValueError: not even one row fits.
    """
    size = rows
    while not fits(size):
        if size == 1:
            raise ValueError(
                "model.chunk_size=auto: not even one pair fits the device; take a smaller model or "
                "images"
            )
        size = (size + 1) // 2
    return 0 if size == rows else size
