"""Streamed objectives never hold a matrix of the batch: seen by a meter that finds open_clip's at
once.

Seen to fail when: softmax makes its scores with `@`; a mask of the whole batch is drawn up; tiles
are kept in a list, or for the backward.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity
from clipsmall.objectives import OBJECTIVES
from tests.dense import CASES
from tests.meter import Meter

WIDTH = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "sinkhorn": {"iterations": 3, "tolerance": 0.0},
    "sinkhorn_targets": {"iterations": 2},
    "nn": {"size": 64, "start": 2},
}
STREAMED = sorted({name for name, _, _ in CASES} | {"bce", "gcl", "nn", "hsic"})

Loss = Callable[[Embeddings], Tensor]


def test_the_meter_counts_storages_once_and_forgets_the_dead() -> None:
    x = torch.randn(1000, requires_grad=True)
    with Meter() as meter:
        # 4,000 bytes, kept for backward, too
        y = x.exp()
        # 4 more: views are nothing new
        total = y.view(10, 100).T.sum()
        # ones (4, expanded) and their product with y (4,000): x.grad
        total.backward()
    assert (meter.peak_bytes, meter.saved_bytes, meter.largest) == (8008, 4000, 1000)
    del y, total
    assert meter.alive_bytes == 4000
    x.grad = None
    assert meter.alive_bytes == 0


def test_the_meter_sees_no_more_alive_than_there_is_at_once() -> None:
    x = torch.randn(1000)
    with Meter() as meter:
        for _ in range(10):
            y = x * 2
            del y
        memory = torch.empty(500)
        torch.add(x[:500], 1, out=memory)
        part = memory.add_(1)[:100]
        del memory
    assert (meter.peak_bytes, meter.alive_bytes, meter.saved_bytes) == (4000, 2000, 0)
    del part
    assert meter.alive_bytes == 0


def test_the_meter_sees_what_a_function_of_ones_own_saves_and_makes_backwards() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            square = x * x
            ctx.save_for_backward(x, square)
            return square * x

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            _, square = ctx.saved_tensors
            assert torch.outer(grad, grad).shape == (100, 100)
            return 3 * square * grad

    x = torch.randn(100, requires_grad=True)
    with Meter() as meter:
        Cube.apply(x).sum().backward()
    assert (meter.saved_bytes, meter.largest) == (400, 100 * 100)
    assert 40_000 < meter.peak_bytes < 42_000


def embeddings(size: int) -> Embeddings:
    """Every caption appears twice: masks are needed."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    numbers = torch.arange(size)
    extra = {
        "image_target": image.detach(),
        "text_target": text.detach(),
        "soft_scale": torch.tensor(20.0),
    }
    scale = torch.tensor(20.0, requires_grad=True)
    bias = torch.tensor(-5.0, requires_grad=True)
    return Embeddings(image, text, numbers, numbers // 2, scale, bias, extra)


def ours(name: str) -> Loss:
    """Of a step with a memory the second: the first has none yet."""
    make = OBJECTIVES[name].make
    options = OPTIONS.get(name, {})

    def loss(e: Embeddings) -> Tensor:
        if not isinstance(make, type):
            return make(e, e, **options)["loss"]  # type: ignore[no-any-return]
        objective = make(RunContext(WIDTH, len(e.index), 10, ids=e.index), **options)
        objective(e, e)
        return objective(e, e)["loss"]  # type: ignore[no-any-return]

    return loss


def open_clips(e: Embeddings) -> Tensor:
    import open_clip

    return open_clip.loss.ClipLoss()(e.image, e.text, e.logit_scale)  # type: ignore[no-any-return]


def measured(loss: Loss, size: int) -> Meter:
    e = embeddings(size)
    with Meter() as meter:
        loss(e).backward()
    return meter


@pytest.mark.parametrize("name", STREAMED)
def test_memory_grows_with_the_batch_not_its_square(name: str) -> None:
    """In tiles of 1/64 of the smaller matrix: what grows with the batch is not hidden behind
    them.
    """
    with mock.patch.dict(similarity.TILE, cpu=(128, 128)):
        small = measured(ours(name), 512)
        large = measured(ours(name), 2048)
    assert small.largest <= 3 * 512 * WIDTH
    # a row is at most three features long (sinkhorn_targets)
    assert large.largest <= 3 * 2048 * WIDTH
    assert large.peak_bytes <= 4.05 * small.peak_bytes
    assert large.saved_bytes <= 4.05 * small.saved_bytes


@pytest.mark.parametrize("name", ["softmax", "dcl", "sigmoid", "gcl"])
def test_from_4096_to_16384_pairs_memory_stays_a_few_tiles(name: str) -> None:
    small = measured(ours(name), 4096)
    large = measured(ours(name), 16384)
    assert large.peak_bytes < 2 * small.peak_bytes
    for size, meter in ((4096, small), (16384, large)):
        assert meter.largest == 1024 * 1024 < size**2 / 8
        # where the matrix takes 1 GiB
        assert meter.peak_bytes < 32 * 2**20
    assert large.saved_bytes == pytest.approx(4 * small.saved_bytes, rel=0.01)


def test_the_meter_finds_open_clips_matrices() -> None:
    small = measured(open_clips, 1024)
    large = measured(open_clips, 4096)
    assert small.largest == 1024**2
    assert large.largest == 4096**2
    # four of them at once
    assert large.peak_bytes > 4 * 4096**2 * 4
    assert large.saved_bytes > 2 * 4096**2 * 4
    assert large.peak_bytes > 15 * small.peak_bytes
