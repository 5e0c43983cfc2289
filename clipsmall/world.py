"""The only room that speaks torch.distributed: every other file sees plain tensors."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipsmall.batch import Embeddings


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def check(accelerate_processes: int) -> None:
    """Refuse to train when the launcher, torch.distributed and Accelerate count different ranks.

    `torchrun` on CPU without ACCELERATE_USE_CPU=1 starts processes that Accelerate does not join: each would
    train alone and call itself the main one.

    Raises:
        ValueError: the three counts differ.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not launched == size() == accelerate_processes:
        raise ValueError(
            f"the launcher started {launched} ranks, torch.distributed joins {size()}, Accelerate "
            f"{accelerate_processes}: they would train apart; on CPU start them with: "
            "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N ..."
        )


class _AllGather(torch.autograd.Function):
    """Forward: every rank's rows, stacked in rank order. Backward: the *sum* of all ranks' gradients for my rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(size())[rank()]


def gather(x: Tensor) -> Tensor:
    """(b, ...) on every rank -> (W·b, ...) in rank order, differentiable; every rank must bring the same b.

    The backward sums over ranks. With losses that are means over a rank's own rows, and DDP's mean over ranks,
    the gradient is then that of one process with the whole batch; no factor W anywhere.
    """
    if size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x)
    return gathered


def gather_uneven(x: Tensor) -> Tensor:
    """(b_r, ...) with any b_r on each rank -> (sum of b_r, ...) in rank order; no gradient."""
    if size() == 1:
        return x
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x.detach()
    out = gather(padded)
    return torch.cat([part[:count] for part, count in zip(out.chunk(size()), counts, strict=True)])


def columns(rows: Embeddings) -> Embeddings:
    """What my rows are compared with: the embeddings of the whole global batch."""
    return rows._replace(
        image=gather(rows.image),
        text=gather(rows.text),
        index=gather(rows.index),
        caption_hash=gather(rows.caption_hash),
    )


def logsumexp(x: Tensor) -> Tensor:
    """log of the sum over all ranks and over dim 0 of exp(x): (b, N) on each rank -> (N,), no gradient."""
    x = x.detach()
    peak = x.max(dim=0).values
    if size() > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    total = (x - peak).exp().sum(dim=0)
    if size() > 1:
        dist.all_reduce(total)
    return peak + total.log()


def mean(x: Tensor) -> Tensor:
    """The mean over ranks of a detached tensor, the same on every rank."""
    return total(x) / size()


def total(x: Tensor) -> Tensor:
    """The sum over ranks, the same on every rank."""
    x = x.detach().clone()
    if size() > 1:
        dist.all_reduce(x)
    return x


def maximum(x: Tensor) -> Tensor:
    """The elementwise maximum over ranks."""
    x = x.detach().clone()
    if size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """Every rank's bytes, in rank order, on every rank."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    lengths = gather(torch.tensor([len(data)], device=device)).tolist()
    return [part.cpu().numpy().tobytes() for part in gather_uneven(mine).split(lengths)]  # type: ignore[no-untyped-call]


def barrier() -> None:
    if size() > 1:
        dist.barrier()


def leave() -> None:
    """Leave the process group in good order; torch warns of a leak otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()
