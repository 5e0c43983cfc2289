"""The pair matrix M = x yᵀ + u + v, tile by tile: log sums, sums, maxima and their gradients.

No function here ever holds M: forward and backward passes need memory for a few tiles beside the
features, whatever the batch size. `logsumexp` computes every tile twice (once for the sums, once
for the gradient), which takes four matrix products; autograd over two dense matrices takes six.
`total` computes its gradient while it sums, which takes three.

Shapes: b rows and N columns of D features. Over ranks, the rows x are local (this rank's pairs) and
the columns y are those of all ranks: either gathered (`world.gather`, whose backward sums over
ranks), or passed around in a ring, so that no rank ever holds all of them. y may be in host memory
while x is on a device; its tiles are copied when they are needed. There is no logit scale here:
callers multiply x by it.

All ranks must call these functions together, with the same options and equally many rows, because
rings and column sums exchange tensors between ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipsmall.distributed import world

# Rows and columns of a tile. On a CPU a tile takes 4 MiB in float32: larger tiles exceed the cache,
# smaller ones slow down the matrix product (2 cores, d = 512, B = 8,192: 256² 3.0 s, 512² 1.9 s,
# 1,024² 1.7 s, 2,048² 1.75 s).
TILE = {"cpu": (1024, 1024), "cuda": (4096, 8192)}
# A tile with few rows may be wider than TILE by up to this factor; its half-precision features are
# converted to float32, too, so it cannot be arbitrarily wide.
MAX_WIDENING = 16

# maps entries to (values, derivatives), both of the entries' shape
Elementwise = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """Which entries of the pair matrix count, and where its columns are.

    An entry whose row and column are in the same group (same caption, or copies of one pair) is
    left out, and so is a row's own column (its positive), unless `keep_own`.

    Args:
        own: (b,) for each row, the number of its own column.
        columns: N, over all ranks.
        groups: tuples of (b,) group numbers of rows and (N,) group numbers of columns.
        keep_own: whether a row's own column counts.
        chosen: (N,) bool. If set, row i keeps column (i + k) mod N as a negative only where
            chosen[k] is True; i is the number of the row's own column.
        ring: y holds only this rank's columns; those of other ranks are passed around.
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
    """A tile of the pair matrix, and the features that it is computed from."""

    # rows and columns of the tile within the whole matrix
    i: slice
    j: slice
    # (tile rows, D) and (tile columns, D), on x's device and in its dtype
    x: Tensor
    y: Tensor
    # (tile columns, D) view into the gradient of y, to add to; None if y needs no gradient
    dy: Tensor | None
    # (tile rows, tile columns) x yᵀ + u + v; the next tile overwrites it
    entries: Tensor


def wide(x: Tensor) -> torch.dtype:
    """The dtype that sums are computed in: at least float32.

    At logit scale 100, logits in bf16 change the gradient by 2 %.
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
    """Yield every tile of x yᵀ + u + v once.

    The outer loop goes over column tiles, so that each column comes from the ring or from host
    memory only once.

    Args:
        x: (b, D) local rows.
        y: (N, D) all columns; for a ring (b, D) local ones.
        u: (b,) added to rows.
        v: (N,) added to columns.
        dy: like y; the caller adds the gradient of y to it.
    """
    height, width = TILE.get(x.device.type, TILE["cuda"])

    # With few rows (and a queue), use fewer, wider tiles with as many entries. Tiles copied from
    # host memory stay narrow.
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

    Column sums and maxima are over the rows of all ranks, and the same on every rank.
    """

    # (b,) log sum exp of each row; differentiable
    rows: Tensor
    # (N,) log sum exp of each column; differentiable, the backward sums gradients over ranks
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
    is this rank's contribution, which `world.gather` sums over ranks; in a ring it is the full sum.

    Args:
        x: (b, D) local rows.
        y: (N, D) all columns; for a ring (b, D) local ones.
        layout: which entries count.
        u: (b,) added to rows.
        v: (N,) added to columns.
        rows, columns: whether to compute row sums and column sums; the other tensors are empty.
    """
    return LogSums(*_LogSumExp.apply(x.to(wide(x)), y, u, v, layout, rows, columns))


def total(
    x: Tensor, y: Tensor, layout: Layout, f: Elementwise, weights: Tensor, u: Tensor | None = None
) -> Tensor:
    """() Σ_i weights_i Σ_j f(x yᵀ + u)_ij over the entries that count, of the local rows.

    Differentiable by x, y and u. The gradient is computed in the same pass, so `weights` (b,) are
    constants; backward only multiplies it.
    """
    # ask here, because gradients are always disabled inside an autograd Function's forward
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
    """(b,) the largest entry of each row among those that count, and (b,) its column.

    Of equal entries the first column is taken; no gradient.
    """
    best = x.new_full((len(x),), -torch.inf, dtype=wide(x))
    place = torch.zeros_like(layout.own)
    for tile in tiles(x.to(wide(x)), y, layout, u):
        i = tile.i
        out = layout.left_out(i, tile.j)
        tile.entries.masked_fill_(out, -torch.inf)
        here, k = tile.entries.max(dim=1)
        # from columns of the tile to columns of the whole matrix
        k += tile.j.start

        # In a ring, every rank gets the columns in a different order, so of equal entries the
        # lowest column number is taken.
        first_of_equals = (here == best[i]) & (k < place[i])
        better = here.isnan() | (here > best[i]) | first_of_equals
        best[i] = torch.where(better, here, best[i])
        place[i] = torch.where(better, k, place[i])

    return best, place


def _add_log_sum(sums: Tensor, peaks: Tensor, entries: Tensor, spare: Tensor, dim: int) -> None:
    """Add the log sums and maxima of a tile to those of the tiles before it, in place."""
    peak = entries.amax(dim)
    torch.maximum(peaks, peak, out=peaks)
    # where no entry counts: exp(−inf − lowest) is 0, but exp(−inf + inf) would be NaN
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
        # empty if not wanted
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

        # where no entry counts, subtract 0 from −inf, so that exp gives 0, not NaN
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
        # `needs_input_grad` ignores no_grad, hence the caller's `learning`
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

        # saved in the wide dtype; autograd rounds after multiplying by the incoming gradient
        ctx.save_for_backward(made.x, made.y, made.u)
        return sums @ weights.to(sums.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy, du = ctx.saved_tensors
        # y may be in host memory
        grad_y = grad.to(dy.device) * dy if dy is not None else None
        grad_u = grad * du if du is not None else None
        return grad * dx, grad_y, grad_u, None, None, None, None


class _Gradients:
    """The gradients of x, y, u and v, summed over tiles from dL/dM, in x's dtype.

    y is None if it needs no gradient, as a queue.
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

        # a view into self.y, or into the gradient passed along in a ring
        dy = tile.dy
        if dy is not None and dy.device == slope.device:
            dy.addmm_(slope.T, tile.x)
        elif dy is not None:
            dy += (slope.T @ tile.x).to(dy.device)

        if self.u is not None:
            self.u[tile.i] += slope.sum(dim=1)
        if self.v is not None:
            self.v[tile.j] += slope.sum(dim=0)
