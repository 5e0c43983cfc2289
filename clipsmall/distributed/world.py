"""The only room that speaks torch.distributed: every other file sees plain tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipsmall.batch import Embeddings

# with a rank that caches, saves or plans alone; NCCL's own is ten minutes
PATIENCE = timedelta(hours=6)
# of the process, not of a thread: on a GPU backward passes run in threads of their own
_alone = False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only rank there is; what is computed inside must also run
    backward inside.
    """
    global _alone
    before = _alone
    _alone = True
    try:
        yield
    finally:
        _alone = before


def check(accelerate_processes: int) -> None:
    """Let all ranks meet; refuse to train when the launcher, torch.distributed and Accelerate count
    different ones.

    `torchrun` on CPU without ACCELERATE_USE_CPU=1 starts processes that Accelerate does not join:
    each would train alone and call itself the main one. Raises ValueError then.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not launched == size() == accelerate_processes:
        raise ValueError(
            f"the launcher started {launched} ranks, torch.distributed joins {size()}, Accelerate "
            f"{accelerate_processes}: they would train apart; on CPU start them with: "
            "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N ..."
        )
    # or a rank that ends at once, as all is done, breaks one that is still connecting (seen with
    # gloo)
    barrier()


# its name since torch 2.14, where the older one warns at every call
_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _AllGather(torch.autograd.Function):
    """Forward: every rank's rows, stacked in rank order. Backward: the *sum* of all ranks'
    gradients for my rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(size() * len(x), *x.shape[1:])
        _gather_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(size())[rank()]


def gather(x: Tensor) -> Tensor:
    """(b, ...) on every rank -> (W·b, ...) in rank order, differentiable; every rank must bring the
    same b.

    The backward sums over ranks. With losses that are means over a rank's own rows, and DDP's mean
    over ranks, the gradient is then that of one process with the whole batch; no factor W anywhere.
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
    return ring_columns(rows)._replace(image=gather(rows.image), text=gather(rows.text))


def ring_columns(rows: Embeddings) -> Embeddings:
    """The same for comparison in a ring: everybody's numbers, but only my own features; the others'
    come by.
    """
    return rows._replace(index=gather(rows.index), caption_hash=gather(rows.caption_hash), extra={})


def host_columns(rows: Embeddings) -> Embeddings:
    """The same with the features kept in host memory from one pass to the next; tiles of them
    travel.

    They are gathered on the device, whole, and so are their gradients: between these moments it
    holds my rows only.
    """
    all_of_them = columns(rows)
    return all_of_them._replace(image=all_of_them.image.cpu(), text=all_of_them.text.cpu())


class _Add(torch.autograd.Function):
    """Forward and backward: the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return total(grad)


def add(x: Tensor) -> Tensor:
    """The sum over ranks, the same on every rank, differentiable: backward sums what all ranks ask
    for.
    """
    summed: Tensor = _Add.apply(x) if size() > 1 else x
    return summed


def ring(x: Tensor, carried: Tensor | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Every rank's rows by turns, mine first, without ever holding all of them.

    Yields the place of the first row in rank order, the rows, and what is `carried` along with
    them: add to it, and when the ring has closed, my `carried` holds what all ranks added. Every
    rank must bring equally many rows.
    """
    rows = x.detach()
    baggage = carried
    for hop in range(size()):
        yield (rank() - hop) % size() * len(x), rows, baggage
        if hop + 1 < size():
            rows = _pass_on(rows)
        if baggage is not None and size() > 1:
            baggage = _pass_on(baggage)
    if carried is not None and baggage is not None:
        carried.copy_(baggage)


def _pass_on(x: Tensor) -> Tensor:
    """To the next rank; returns what the one before me passed on."""
    sent = x.contiguous()
    received = torch.empty_like(sent)
    after = (rank() + 1) % size()
    before = (rank() - 1) % size()
    exchange = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()
    return received


def logsumexp(x: Tensor) -> Tensor:
    """Log of the sum over ranks of exp(x), elementwise, the same on every rank; no gradient."""
    if size() == 1:
        return x.detach()
    # −inf on every rank stays −inf
    peak = maximum(x).clamp(min=torch.finfo(x.dtype).min)
    return peak + total((x - peak).exp()).log()


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


def shard(parts: list[Any], passes: tuple[str, ...], device: torch.device) -> None:
    """Each rank keeps its share of every parameter (FSDP2), and gathers a part's for the time of
    its passes only.

    Backward averages over ranks, as DDP. `parts`: modules, those inside first; `passes`: methods of
    the last.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (size(),))
    for part in parts:
        # the last part, too: else it stays whole
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for name in passes:
        register_fsdp_forward_method(parts[-1], name)


def shared_as(like: Any, x: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, sharded as `like` is, if it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


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
