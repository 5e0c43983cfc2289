"""Tiles of the pair matrix x yᵀ + u + v, and which of its entries count."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipsmall.distributed import world

# Rows and columns of a tile, in its accumulation dtype 4 MiB on a CPU: larger ones leave the cache,
# smaller ones cost the matrix product (2 cores, d = 512, B = 8,192: 256² 3.0 s, 512² 1.9 s, 1,024²
# 1.7 s, 2,048² 1.75 s).
TILE = {"cpu": (1024, 1024), "cuda": (4096, 8192)}
# times the width: half features are widened a tile at a time, too
WIDEST = 16


@dataclass(frozen=True)
class Layout:
    """Which entries of the pair matrix count, and where its columns live.

    Entries of a row and a column of one group are left out (same caption, another copy of the
    pair), and so is a row's own column, unless `keep_own`. `chosen` keeps of the rest only the
    columns that lie k places after the row's own for a True at k.
    """

    # (b,) each row's own place among the columns
    own: Tensor
    # N, over all ranks
    columns: int
    # of rows (b,) and of columns (N,)
    groups: tuple[tuple[Tensor, Tensor], ...] = ()
    keep_own: bool = False
    # (N,) bool
    chosen: Tensor | None = None
    # y holds my rank's columns only; the others' come by
    ring: bool = False

    def left_out(self, i: slice, j: slice) -> Tensor:
        """(tile rows, tile columns) True where an entry does not count."""
        own = self.own[i, None]
        places = torch.arange(j.start, j.stop, device=own.device)
        is_own = own == places
        out = is_own
        for of_rows, of_columns in self.groups:
            out = out | (of_rows[i, None] == of_columns[j])
        if self.chosen is not None:
            out = out | ~self.chosen[(places - own) % self.columns]
        return out & ~is_own if self.keep_own else out | is_own


def wide(x: Tensor) -> torch.dtype:
    """What sums are made in: at least float32. bf16 logits at scale 100 cost 2 % of the
    gradient.
    """
    return torch.promote_types(x.dtype, torch.float32)


def tiles(
    x: Tensor,
    y: Tensor,
    layout: Layout,
    u: Tensor | None = None,
    v: Tensor | None = None,
    dy: Tensor | None = None,
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor | None, Tensor]]:
    """Row slice, column slice, x and y there, the place of y's gradient in `dy`, and that tile of x
    yᵀ + u + v.

    The tile is overwritten by the next one. Column tiles are the outer loop: a ring and host memory
    bring each once.
    """
    height, width = TILE.get(x.device.type, TILE["cuda"])
    # few rows against a queue: as many entries in fewer tiles; those that travel from host memory
    # stay narrow
    if 0 < len(x) < height and y.device == x.device:
        width = min(height * width // len(x), WIDEST * width)
    memory = x.new_empty(min(height, len(x)) * min(width, len(y)))
    blocks = world.ring(y, dy) if layout.ring else iter([(0, y, dy)])
    with torch.autocast(x.device.type, enabled=False):
        for offset, block, gradient in blocks:
            for start in range(0, len(block), width):
                part = slice(start, min(start + width, len(block)))
                j = slice(offset + part.start, offset + part.stop)
                y_j = block[part].to(x.device, x.dtype, non_blocking=True)
                for first in range(0, len(x), height):
                    i = slice(first, min(first + height, len(x)))
                    shape = (i.stop - i.start, j.stop - j.start)
                    tile = torch.mm(x[i], y_j.T, out=memory[: shape[0] * shape[1]].view(shape))
                    if u is not None:
                        tile += u[i, None]
                    if v is not None:
                        tile += v[j]
                    yield i, j, x[i], y_j, gradient[part] if gradient is not None else None, tile
