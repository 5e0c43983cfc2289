"""Ranks that are not there: `world` as one of W of them sees it, with nobody to exchange anything
with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from clipsmall.distributed import world


class Nobody:
    """What `world` asks of torch.distributed: every exchange leaves its tensors as they are, of the
    right shapes.
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


@contextmanager
def imagined(ranks: int) -> Iterator[None]:
    """Inside, this process is the first of so many: W·b columns are made of its b rows."""
    given: dict[str, Any] = {"size": lambda: ranks, "rank": lambda: 0, "dist": Nobody()}
    with patch.multiple(world, _gather_single=lambda out, rows: None, **given):
        yield
