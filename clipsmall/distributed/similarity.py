"""The pair matrix M = x yᵀ + u + v, seen one tile at a time: log sums, sums, maxima, gradients.

No function here ever holds M: both passes need a few tiles beside the features, whatever the batch.
`logsumexp` sees every tile twice (once for the sums, once for the gradient): four matrix products
forward and backward, where autograd over two dense matrices takes six. `total` needs no statistics
and computes its gradient while it sums: three.

Shapes: b rows and N columns of D features. Over ranks, the rows x are local (this rank's pairs) and
the columns y are those of all ranks: either gathered (`world.gather`, whose backward sums over
ranks), or passed around in a ring, so that no rank ever holds all of them. y may lie in host memory
while x is on a device: tiles are copied as they are needed. A temperature is folded into x, so
nothing here knows one.

Every rank must call these functions together, with the same options and equally many rows: a ring
and the column sums exchange tensors between ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipsmall.distributed import world

# Rows and columns of a tile, in its accumulation dtype 4 MiB on a CPU: larger ones leave the cache,
# smaller ones cost the matrix product (2 cores, d = 512, B = 8,192: 256² 3.0 s, 512² 1.9 s, 1,024²
# 1.7 s, 2,048² 1.75 s).
TILE = {"cpu": (1024, 1024), "cuda": (4096, 8192)}
# A tile of few rows may be so many times as wide as TILE says. No wider: half-precision features
# are converted to float32 a tile at a time, too.
MAX_WIDENING = 16

# entries -> (values, derivatives), both of the entries' shape
Elementwise = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """Which entries of the pair matrix count, and where its columns live.

    Entries of a row and a column of the same group are left out (same caption, another copy of the
    pair), and so is a row's own column, unless `keep_own`.

    Args:
        own: (b,) for each row, the number of its own column.
        columns: N, over all ranks.
        groups: pairs of (b,) and (N,): group numbers of rows and of columns.
        keep_own: a row's own column counts.
        chosen: (N,) bool. If set, row i keeps column (i + k) mod N as a negative only where
            chosen[k] is True; i is the number of the row's own column.
        ring: y holds this rank's columns only; those of the other ranks are passed around.
    """

    own: Tensor
    columns: int
    groups: tuple[tuple[Tensor, Tensor], ...] = ()
    keep_own: bool = False
    chosen: Tensor | None = None
    ring: bool = False

    def left_out(self, i: slice, j: slice) -> Tensor:
        """(tile rows, tile columns) bool, True where an entry does not count."""
        own = self.own[i, None]
        places = torch.arange(j.start, j.stop, device=own.device)
        is_own = own == places
        out = is_own
        for of_rows, of_columns in self.groups:
            same_group = of_rows[i, None] == of_columns[j]
            out = out | same_group

        if self.chosen is not None:
            distance = (places - own) % self.columns
            out = out | ~self.chosen[distance]

        if self.keep_own:
            return out & ~is_own
        return out | is_own


class Tile(NamedTuple):
    """A piece of the pair matrix, and the features that it is made of."""

    # which rows and which columns of the whole matrix
    i: slice
    j: slice
    # (tile rows, D) and (tile columns, D), on x's device and in its dtype
    x: Tensor
    y: Tensor
    # (tile columns, D) view into the gradient of y, to add to; None where none is asked for
    dy: Tensor | None
    # (tile rows, tile columns) x yᵀ + u + v; overwritten by the next tile
    entries: Tensor


def wide(x: Tensor) -> torch.dtype:
    """The dtype that sums are computed in: at least float32.

    bf16 logits at scale 100 cost 2 % of the gradient.
    """
    return torch.promote_types(x.dtype, torch.float32)


def tiles(
    x: Tensor,
    y: Tensor,
    layout: Layout,
    u: Tensor | None = None,
    v: Tensor | None = None,
    dy: Tensor | None = None,
) -> Iterator[Tile]:
    """Every tile of x yᵀ + u + v, once.

    Column tiles are the outer loop, so that a ring, or host memory, delivers each column once.

    Args:
        x: (b, D) local rows.
        y: (N, D) all columns; for a ring (b, D) local ones.
        u: (b,) added to rows.
        v: (N,) added to columns.
        dy: like y, what the caller adds y's gradient to.
    """
    height, width = TILE.get(x.device.type, TILE["cuda"])

    # Few rows against a queue: as many entries in fewer tiles. Those that are copied from host
    # memory stay narrow.
    if 0 < len(x) < height and y.device == x.device:
        width = min(height * width // len(x), MAX_WIDENING * width)
    memory = x.new_empty(min(height, len(x)) * min(width, len(y)))
    blocks = world.ring(y, dy) if layout.ring else iter([(0, y, dy)])
    with torch.autocast(x.device.type, enabled=False):
        for offset, block, gradient in blocks:
            for start in range(0, len(block), width):
                part = slice(start, min(start + width, len(block)))
                j = slice(offset + part.start, offset + part.stop)
                y_j = block[part].to(x.device, x.dtype, non_blocking=True)
                dy_j = gradient[part] if gradient is not None else None
                for first in range(0, len(x), height):
                    i = slice(first, min(first + height, len(x)))
                    shape = (i.stop - i.start, j.stop - j.start)
                    out = memory[: shape[0] * shape[1]].view(shape)
                    entries = torch.mm(x[i], y_j.T, out=out)
                    if u is not None:
                        entries += u[i, None]
                    if v is not None:
                        entries += v[j]
                    yield Tile(i, j, x[i], y_j, dy_j, entries)


class LogSums(NamedTuple):
    """Log sums and maxima over the entries that count; −inf where there are none.

    Those of columns are over the rows of all ranks, and the same on every rank.
    """

    # (b,) log sum exp of each row; differentiable
    rows: Tensor
    # (N,) of each column; differentiable, its backward sums the gradients of all ranks
    columns: Tensor
    # (b,) largest entry of each row; no gradient
    row_max: Tensor
    # (N,) largest entry of each column; no gradient
    column_max: Tensor


def logsumexp(
    x: Tensor,
    y: Tensor,
    layout: Layout,
    u: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rows: bool = True,
    columns: bool = True,
) -> LogSums:
    """Log sums of exp(x yᵀ + u + v) along rows and columns, differentiable by x, y, u and v.

    Every rank must call, and must run backward if any does. With gathered columns the gradient of y
    is this rank's part, which `world.gather` sums over ranks; in a ring it is already the sum.

    Args:
        x: (b, D) local rows.
        y: (N, D) all columns; for a ring (b, D) local ones.
        layout: which entries count.
        u: (b,) added to rows.
        v: (N,) added to columns.
        rows, columns: which of the two are wanted; the other's tensors are empty.
    """
    return LogSums(*_LogSumExp.apply(x.to(wide(x)), y, u, v, layout, rows, columns))


def total(
    x: Tensor, y: Tensor, layout: Layout, f: Elementwise, weights: Tensor, u: Tensor | None = None
) -> Tensor:
    """() Σ_i weights_i Σ_j f(x yᵀ + u)_ij over the entries that count, of the local rows.

    Differentiable by x, y and u. The gradient is computed in the same pass, so `weights` (b,) are
    constants; backward only multiplies it.
    """
    # inside the function's forward gradients are always disabled
    learning = torch.is_grad_enabled()
    weights = weights.detach()
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(wide(x))
        weighted_sum: Tensor = _Total.apply(x, y, u, weights, layout, f, learning)
        return weighted_sum


@torch.no_grad()
def row_sums(
    x: Tensor, y: Tensor, layout: Layout, f: Elementwise, u: Tensor | None = None
) -> Tensor:
    """(b,) Σ_j f(x yᵀ + u)_ij over the entries that count; no gradient."""
    sums = x.new_zeros(len(x), dtype=wide(x))
    for tile in tiles(x.to(wide(x)), y, layout, u):
        values, _ = f(tile.entries)
        out = layout.left_out(tile.i, tile.j)
        values.masked_fill_(out, 0.0)
        sums[tile.i] += values.sum(dim=1)
    return sums


@torch.no_grad()
def nearest(x: Tensor, y: Tensor, layout: Layout, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(b,) largest entry of each row that counts, and (b,) its column.

    The first of equal ones; no gradient.
    """
    best = x.new_full((len(x),), -torch.inf, dtype=wide(x))
    place = torch.zeros_like(layout.own)
    for tile in tiles(x.to(wide(x)), y, layout, u):
        i = tile.i
        out = layout.left_out(i, tile.j)
        tile.entries.masked_fill_(out, -torch.inf)
        here, k = tile.entries.max(dim=1)
        # columns of the whole matrix
        k += tile.j.start

        # A ring delivers columns in another order on every rank: of equal entries the column with
        # the lowest number wins, wherever it lies.
        first_of_equals = (here == best[i]) & (k < place[i])
        better = here.isnan() | (here > best[i]) | first_of_equals
        best[i] = torch.where(better, here, best[i])
        place[i] = torch.where(better, k, place[i])

    return best, place


def _add_log_sum(sums: Tensor, peaks: Tensor, entries: Tensor, spare: Tensor, dim: int) -> None:
    """Add the log sums and maxima of a tile to those of the tiles before it, in place."""
    peak = entries.amax(dim)
    torch.maximum(peaks, peak, out=peaks)
    # nothing counts: exp(−inf − lowest) is 0, exp(−inf + inf) is NaN
    peak.clamp_(min=torch.finfo(peak.dtype).min)
    torch.sub(entries, peak.unsqueeze(dim), out=spare).exp_()
    torch.logaddexp(sums, spare.sum(dim).log_().add_(peak), out=sums)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        u: Tensor | None,
        v: Tensor | None,
        layout: Layout,
        rows: bool,
        columns: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # empty where they are not wanted
        r = x.new_full((len(x) * rows,), -torch.inf)
        r_max = x.new_full((len(x) * rows,), -torch.inf)
        c = x.new_full((layout.columns * columns,), -torch.inf)
        c_max = x.new_full((layout.columns * columns,), -torch.inf)
        spare = torch.empty(0)
        for tile in tiles(x, y, layout, u, v):
            entries = tile.entries
            entries.masked_fill_(layout.left_out(tile.i, tile.j), -torch.inf)
            if spare.shape != entries.shape:
                spare = torch.empty_like(entries)
            if rows:
                _add_log_sum(r[tile.i], r_max[tile.i], entries, spare, dim=1)
            if columns:
                _add_log_sum(c[tile.j], c_max[tile.j], entries, spare, dim=0)

        if columns:
            c = world.logsumexp_over_ranks(c)
            c_max = world.max_over_ranks(c_max)

        ctx.save_for_backward(x, y, u, v, r, c)
        ctx.layout = layout
        ctx.rows = rows
        ctx.columns = columns
        ctx.mark_non_differentiable(r_max, c_max)
        return r, c, r_max, c_max

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_r: Tensor, grad_c: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dM_ij = grad_r_i exp(M_ij − r_i) + grad_c_j exp(M_ij − c_j).

        grad_c is summed over ranks first: each rank's loss may depend on every column sum.
        """
        x, y, u, v, r, c = ctx.saved_tensors
        if ctx.columns:
            grad_c = world.sum_over_ranks(grad_c)

        # where nothing counts, every entry is −inf: exp then gives 0, not NaN
        r = r.masked_fill(r == -torch.inf, 0.0)
        c = c.masked_fill(c == -torch.inf, 0.0)
        made = _Gradients(x, y if ctx.needs_input_grad[1] else None, u, v)
        spare = torch.empty(0)
        for tile in tiles(x, y, ctx.layout, u, v, made.y):
            i = tile.i
            j = tile.j
            entries = tile.entries
            entries.masked_fill_(ctx.layout.left_out(i, j), -torch.inf)
            if spare.shape != entries.shape:
                spare = torch.empty_like(entries)
            if ctx.rows:
                torch.sub(entries, r[i, None], out=spare).exp_().mul_(grad_r[i, None])
            if ctx.columns:
                entries.sub_(c[j]).exp_().mul_(grad_c[j])
            if ctx.rows and ctx.columns:
                slope = entries.add_(spare)
            else:
                slope = spare if ctx.rows else entries

            made.add(tile, slope)

        return made.x, made.y, made.u, made.v, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        u: Tensor | None,
        weights: Tensor,
        layout: Layout,
        f: Elementwise,
        learning: bool,
    ) -> Tensor:
        # `needs_input_grad` does not know of no_grad, so the caller's `learning` is asked, too
        wanted = learning and any(ctx.needs_input_grad)
        made = _Gradients(x, y if wanted and ctx.needs_input_grad[1] else None, u, None)
        sums = x.new_zeros(len(x))
        for tile in tiles(x, y, layout, u, None, made.y):
            values, slopes = f(tile.entries)
            out = layout.left_out(tile.i, tile.j)
            sums[tile.i] += values.masked_fill_(out, 0.0).sum(dim=1)
            if wanted:
                slopes.masked_fill_(out, 0.0).mul_(weights[tile.i, None])
                made.add(tile, slopes)

        # in the wide dtype: autograd rounds them after the loss's factor
        ctx.save_for_backward(made.x, made.y, made.u)
        return sums @ weights.to(sums.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy, du = ctx.saved_tensors
        # y may lie in host memory
        grad_y = grad.to(dy.device) * dy if dy is not None else None
        grad_u = grad * du if du is not None else None
        return grad * dx, grad_y, grad_u, None, None, None, None


class _Gradients:
    """Sums of what the tiles' derivatives dL/dM give to x, y, u and v, in x's dtype.

    y is None if it is a constant: a queue.
    """

    def __init__(self, x: Tensor, y: Tensor | None, u: Tensor | None, v: Tensor | None) -> None:
        def zeros(like: Tensor | None) -> Tensor | None:
            return None if like is None else torch.zeros_like(like, dtype=x.dtype)

        self.x = torch.zeros_like(x)
        self.y = zeros(y)
        self.u = zeros(u)
        self.v = zeros(v)

    def add(self, tile: Tile, slope: Tensor) -> None:
        """slope: (tile rows, tile columns) dL/dM."""
        self.x[tile.i].addmm_(slope, tile.y)

        # a view into self.y, or into what a ring carries along
        dy = tile.dy
        if dy is not None and dy.device == slope.device:
            dy.addmm_(slope.T, tile.x)
        elif dy is not None:
            dy += (slope.T @ tile.x).to(dy.device)

        if self.u is not None:
            self.u[tile.i] += slope.sum(dim=1)
        if self.v is not None:
            self.v[tile.j] += slope.sum(dim=0)
