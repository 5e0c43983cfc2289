"""Ranks that do not exist: `world` as the first of W ranks sees it, with no others to ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from clipsmall.distributed import world


class NoOtherRanks:
    """Stands for torch.distributed in `world`: every exchange leaves its tensors as they are.

    Their shapes are right, and a plan needs no more.
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
    """Inside, this process is the first of so many ranks: b rows are gathered to W·b columns."""
    with patch.multiple(
        world,
        size=lambda: ranks,
        rank=lambda: 0,
        dist=NoOtherRanks(),
        _gather_single=_gather_nothing,
    ):
        yield
