"""Pretends that this process is the first of W ranks, without the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from clipsmall.distributed import world


class NoOtherRanks:
    """Replaces torch.distributed in `world`: every exchange leaves its tensors unchanged.

    Their shapes are right, which is all that a plan needs.
    """

    class ReduceOp:
        MAX = None

    isend = irecv = None

    def all_reduce(self, *_: Any) -> None:
        pass

    def P2POp(self, *_: Any) -> None:
        pass

    def batch_isend_irecv(self, _: Any) -> list[Any]:
        return []


def _gather_nothing(out: Any, rows: Any) -> None:
    pass


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `ranks`: b rows are gathered to W·b columns."""
    with patch.multiple(
        world,
        size=lambda: ranks,
        rank=lambda: 0,
        dist=NoOtherRanks(),
        _gather_single=_gather_nothing,
    ):
        yield
