"""The only module that calls torch.distributed; all others see plain tensors.

Terms: a *rank* is one process; W ranks train together. A *local* tensor holds the b rows of one
rank, a *gathered* tensor the W·b rows of all ranks, in rank order.

All ranks must call the functions that exchange tensors, in the same order and with equal shapes and
dtypes (except `gather_uneven` and `gather_bytes`); if a rank does not call, the others wait until
the time-out. With a single rank they return their input, or do nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipsmall.batch import Embeddings

# How long ranks wait for one that computes features, saves or plans; NCCL's default is 10 minutes.
PATIENCE = timedelta(hours=6)
# True inside `single_process`. A variable of the process, not of a thread, because on a GPU the
# backward pass runs in another thread.
_single = False


def rank() -> int:
    """The number of this rank, from 0; 0 without torch.distributed."""
    if dist.is_initialized() and not _single:
        return dist.get_rank()
    return 0


def size() -> int:
    """W, the number of ranks; 1 without torch.distributed."""
    if dist.is_initialized() and not _single:
        return dist.get_world_size()
    return 1


@contextmanager
def single_process() -> Iterator[None]:
    """A context in which this process is the only rank: size 1, rank 0, no exchange.

    A forward pass inside the context must also run its backward pass there.
    """
    global _single
    before = _single
    _single = True
    try:
        yield
    finally:
        _single = before


def check_ranks(accelerate_processes: int) -> None:
    """Wait for all ranks, and check that they form one process group.

    `torchrun` on CPU without ACCELERATE_USE_CPU=1 starts processes that Accelerate does not join:
    each would train alone, as the main rank.

    Raises:
        ValueError: launcher, torch.distributed and Accelerate disagree on the number of ranks.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not launched == size() == accelerate_processes:
        raise ValueError(
            f"the launcher started {launched} ranks, torch.distributed joins {size()}, Accelerate "
            f"{accelerate_processes}: each rank would train alone; on CPU start with: "
            "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N ..."
        )

    # Without the barrier, a rank that ends at once because nothing is left to do breaks a rank that
    # is still connecting (seen with gloo).
    barrier()


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if size() > 1:
        dist.barrier()


def leave() -> None:
    """End the process group, if there is one; torch warns of a leak otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


# all_gather_single is the name since torch 2.14, where the old name warns at every call
_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _AllGather(torch.autograd.Function):
    """Forward: every rank's rows, stacked in rank order.

    Backward: the *sum* over ranks of the gradients for this rank's rows.
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
    """(b, ...) on every rank -> (W·b, ...) in rank order; differentiable.

    Every rank must call with the same b, and must run backward if any does. The backward sums over
    ranks. If the loss is the mean over local rows and DDP averages gradients over ranks, the result
    is the gradient of one process with the whole batch, without any factor W.
    """
    if size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x)
    return gathered


def gather_uneven(x: Tensor) -> Tensor:
    """(b_r, ...) on rank r, with any b_r -> (sum of b_r, ...) in rank order; no gradient."""
    if size() == 1:
        return x
    count = torch.tensor([len(x)], device=x.device)
    counts = gather(count).tolist()

    # collectives need equal shapes: pad to the longest, then remove the padding
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x.detach()
    parts = gather(padded).chunk(size())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """Every rank's bytes, of any length, in rank order, on every rank."""
    # a bytearray, because torch warns of read-only buffers
    local = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    length = torch.tensor([len(data)], device=device)
    lengths = gather(length).tolist()
    gathered = gather_uneven(local.to(device))
    parts = gathered.split(lengths)  # type: ignore[no-untyped-call]
    return [part.cpu().numpy().tobytes() for part in parts]


def gathered_columns(rows: Embeddings) -> Embeddings:
    """The columns for local rows: the embeddings of the whole global batch, (W·b, D)."""
    numbers = ring_columns(rows)
    return numbers._replace(image=gather(rows.image), text=gather(rows.text))


def ring_columns(rows: Embeddings) -> Embeddings:
    """The columns for exchange=ring.

    Index and caption hash are gathered, (W·b,). Image and text are local features, (b, D); those of
    the other ranks are passed around by `ring`.
    """
    return rows._replace(index=gather(rows.index), caption_hash=gather(rows.caption_hash), extra={})


def host_columns(rows: Embeddings) -> Embeddings:
    """As `gathered_columns`, but the gathered features are kept in host memory.

    Features and their gradients are gathered on the device. Between the two passes the device holds
    only the local rows, and tiles of the columns are copied to it.
    """
    gathered = gathered_columns(rows)
    return gathered._replace(image=gathered.image.cpu(), text=gathered.text.cpu())


class _DifferentiableSum(torch.autograd.Function):
    """Forward and backward: the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_ranks(grad)


def differentiable_sum(x: Tensor) -> Tensor:
    """The elementwise sum over ranks, the same on every rank; differentiable.

    The backward sums gradients over ranks, so every rank must run it if any does.
    """
    if size() == 1:
        return x
    summed: Tensor = _DifferentiableSum.apply(x)
    return summed


def sum_over_ranks(x: Tensor) -> Tensor:
    """The elementwise sum over ranks, the same on every rank; a new tensor without gradient."""
    x = x.detach().clone()
    if size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The elementwise mean over ranks, the same on every rank; no gradient."""
    return sum_over_ranks(x) / size()


def max_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum over ranks, the same on every rank; no gradient."""
    x = x.detach().clone()
    if size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """Log of the sum over ranks of exp(x), elementwise, the same on every rank; no gradient."""
    if size() == 1:
        return x.detach()
    # −inf on every rank stays −inf
    peak = max_over_ranks(x).clamp(min=torch.finfo(x.dtype).min)
    return peak + sum_over_ranks((x - peak).exp()).log()


def ring(x: Tensor, carried: Tensor | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Every rank's rows in turn, local ones first, without ever holding all of them.

    Yields the position of the block's first row among the gathered rows, the block (b, ...), and
    the tensor `carried` along with the block. Ranks may add to it; at the end, this rank's
    `carried` holds the sum of what all ranks added for its rows. Every rank must have the same b
    and iterate to the end.
    """
    rows = x.detach()
    baggage = carried
    for hop in range(size()):
        sender = (rank() - hop) % size()
        yield sender * len(x), rows, baggage
        if hop + 1 < size():
            rows = _pass_on(rows)
        if baggage is not None and size() > 1:
            baggage = _pass_on(baggage)

    if carried is not None and baggage is not None:
        carried.copy_(baggage)


def _pass_on(x: Tensor) -> Tensor:
    """Send x to the next rank; returns the tensor sent by the previous rank."""
    sent = x.contiguous()
    received = torch.empty_like(sent)
    after = (rank() + 1) % size()
    before = (rank() - 1) % size()
    exchange = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()
    return received


def shard_parameters(parts: list[Any], passes: tuple[str, ...], device: torch.device) -> None:
    """Shard parameters: each rank keeps 1/W of them, and gathers a module's while it computes.

    The backward averages gradients over ranks, as DDP does.

    Args:
        parts: modules, inner ones before those that contain them.
        passes: names of the last module's methods that run a forward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (size(),))
    for part in parts:
        # reshard the last part, too; by default it would stay whole
        fully_shard(part, mesh=mesh, reshard_after_forward=True)

    for name in passes:
        register_fsdp_forward_method(parts[-1], name)


def shard_like(like: Any, x: Tensor) -> Tensor:
    """Shard x, a whole tensor equal on every rank, as `like` is sharded (if it is)."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
