"""The pair matrix M = x yᵀ + u + v, seen one tile at a time: its log sums, sums and maxima, with
exact gradients.

No function here ever holds M: both passes need a few tiles beside the features, whatever the batch.
`logsumexp` sees every tile twice (once for the sums, once for the gradient): four matrix products
forward and backward, where autograd over two dense matrices takes six. `total` needs no statistics
and makes its gradient while it sums: three.

Over ranks, x are my rows and y all columns: either gathered (`world.gather`, whose backward sums
over ranks), or each rank's own, passed around in a ring so that no rank ever holds all of them. y
may lie in host memory while x is on a
device: tiles travel. A temperature is folded into x, so nothing here knows one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipsmall.distributed import world
from clipsmall.distributed.tiles import TILE, Layout, tiles, wide

# entries -> (values, slopes), both of the entries' shape
Elementwise = Callable[[Tensor], tuple[Tensor, Tensor]]


class LogSums(NamedTuple):
    """Over the entries that count; −inf where there are none. Columns: over all ranks' rows, the
    same on all ranks.
    """

    # (b,) log sum exp of each row; differentiable
    rows: Tensor
    # (N,) of each column; differentiable, backward sums what all ranks ask for
    columns: Tensor
    # (b,)
    row_max: Tensor
    # (N,)
    column_max: Tensor


__all__ = [
    "TILE",
    "Elementwise",
    "Layout",
    "LogSums",
    "logsumexp",
    "nearest",
    "row_sums",
    "tiles",
    "total",
    "wide",
]


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
    """Log sums of exp(x yᵀ + u + v) along rows and columns, differentiable by all four.

    Args:
        x: (b, D) my rows. y: (N, D) all columns, or (b, D) mine for a ring.
        u: (b,) added to rows. v: (N,) added to columns.
        rows, columns: which of the two are wanted; the other's tensors are empty.
    """
    return LogSums(*_LogSumExp.apply(x.to(wide(x)), y, u, v, layout, rows, columns))


def total(
    x: Tensor, y: Tensor, layout: Layout, f: Elementwise, weights: Tensor, u: Tensor | None = None
) -> Tensor:
    """Σ_i weights_i Σ_j f(x yᵀ + u)_ij over the entries that count: a scalar, differentiable by x,
    y and u.

    The gradient is made in the same pass, so `weights` (b,) are constants.
    """
    with torch.autocast(x.device.type, enabled=False):
        made: Tensor = _Total.apply(
            x.to(wide(x)), y, u, weights.detach(), layout, f, torch.is_grad_enabled()
        )
        return made


@torch.no_grad()
def row_sums(
    x: Tensor, y: Tensor, layout: Layout, f: Elementwise, u: Tensor | None = None
) -> Tensor:
    """(b,) Σ_j f(x yᵀ + u)_ij over the entries that count; no gradient."""
    sums = x.new_zeros(len(x), dtype=wide(x))
    for i, j, _, _, _, tile in tiles(x.to(wide(x)), y, layout, u):
        sums[i] += f(tile)[0].masked_fill_(layout.left_out(i, j), 0.0).sum(dim=1)
    return sums


@torch.no_grad()
def nearest(x: Tensor, y: Tensor, layout: Layout, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(b,) largest entry of each row that counts, and (b,) its column; the first of equals; no
    gradient.
    """
    best = x.new_full((len(x),), -torch.inf, dtype=wide(x))
    place = torch.zeros_like(layout.own)
    for i, j, _, _, _, tile in tiles(x.to(wide(x)), y, layout, u):
        here, k = tile.masked_fill_(layout.left_out(i, j), -torch.inf).max(dim=1)
        k += j.start
        # a ring brings columns in another order on every rank: of equals the lowest place wins,
        # wherever it lies
        better = here.isnan() | (here > best[i]) | ((here == best[i]) & (k < place[i]))
        best[i], place[i] = torch.where(better, here, best[i]), torch.where(better, k, place[i])
    return best, place


def _add_log_sum(sums: Tensor, peaks: Tensor, tile: Tensor, spare: Tensor, dim: int) -> None:
    """Put the log sums and maxima of a tile to those of the tiles before it."""
    peak = tile.amax(dim)
    torch.maximum(peaks, peak, out=peaks)
    # nothing counts: exp(−inf − lowest) is 0, exp(−inf + inf) is NaN
    peak.clamp_(min=torch.finfo(peak.dtype).min)
    torch.sub(tile, peak.unsqueeze(dim), out=spare).exp_()
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
        r, r_max = (x.new_full((len(x) * rows,), -torch.inf) for _ in range(2))
        c, c_max = (x.new_full((layout.columns * columns,), -torch.inf) for _ in range(2))
        spare = torch.empty(0)
        for i, j, _, _, _, tile in tiles(x, y, layout, u, v):
            tile.masked_fill_(layout.left_out(i, j), -torch.inf)
            spare = spare if spare.shape == tile.shape else torch.empty_like(tile)
            if rows:
                _add_log_sum(r[i], r_max[i], tile, spare, dim=1)
            if columns:
                _add_log_sum(c[j], c_max[j], tile, spare, dim=0)
        if columns:
            c = world.logsumexp(c)
            c_max = world.maximum(c_max)
        ctx.save_for_backward(x, y, u, v, r, c)
        ctx.layout = layout
        ctx.rows = rows
        ctx.columns = columns
        ctx.mark_non_differentiable(r_max, c_max)
        return r, c, r_max, c_max

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_r: Tensor, grad_c: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dM_ij = grad_r_i exp(M_ij − r_i) + grad_c_j exp(M_ij − c_j), where grad_c is what all
        ranks ask for.
        """
        x, y, u, v, r, c = ctx.saved_tensors
        if ctx.columns:
            grad_c = world.total(grad_c)
        # every entry there is −inf: exp gives 0, not NaN
        r, c = (s.masked_fill(s == -torch.inf, 0.0) for s in (r, c))
        made = _Gradients(x, y if ctx.needs_input_grad[1] else None, u, v)
        spare = torch.empty(0)
        for i, j, x_i, y_j, dy_j, tile in tiles(x, y, ctx.layout, u, v, made.y):
            tile.masked_fill_(ctx.layout.left_out(i, j), -torch.inf)
            spare = spare if spare.shape == tile.shape else torch.empty_like(tile)
            if ctx.rows:
                torch.sub(tile, r[i, None], out=spare).exp_().mul_(grad_r[i, None])
            if ctx.columns:
                tile.sub_(c[j]).exp_().mul_(grad_c[j])
            slope = tile.add_(spare) if ctx.rows and ctx.columns else spare if ctx.rows else tile
            made.add(i, j, x_i, y_j, dy_j, slope)
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
        # under no_grad these still say what could be asked
        wanted = learning and any(ctx.needs_input_grad)
        made = _Gradients(x, y if wanted and ctx.needs_input_grad[1] else None, u, None)
        sums = x.new_zeros(len(x))
        for i, j, x_i, y_j, dy_j, tile in tiles(x, y, layout, u, None, made.y):
            values, slopes = f(tile)
            out = layout.left_out(i, j)
            sums[i] += values.masked_fill_(out, 0.0).sum(dim=1)
            if wanted:
                made.add(i, j, x_i, y_j, dy_j, slopes.masked_fill_(out, 0.0).mul_(weights[i, None]))
        # wide: autograd rounds them after the loss's factor
        ctx.save_for_backward(made.x, made.y, made.u)
        return sums @ weights.to(sums.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy, du = ctx.saved_tensors
        of_y = grad.to(dy.device) * dy if dy is not None else None
        return grad * dx, of_y, grad * du if du is not None else None, None, None, None, None


class _Gradients:
    """What the tiles' slopes dL/dM add up to, for x, y (unless it is a constant: a queue), u and v,
    in x's dtype.
    """

    def __init__(self, x: Tensor, y: Tensor | None, u: Tensor | None, v: Tensor | None) -> None:
        self.x = torch.zeros_like(x)
        self.y = torch.zeros_like(y, dtype=x.dtype) if y is not None else None
        self.u = torch.zeros_like(u, dtype=x.dtype) if u is not None else None
        self.v = torch.zeros_like(v, dtype=x.dtype) if v is not None else None

    def add(
        self, i: slice, j: slice, x_i: Tensor, y_j: Tensor, dy_j: Tensor | None, slope: Tensor
    ) -> None:
        self.x[i].addmm_(slope, y_j)
        if dy_j is not None and dy_j.device == slope.device:
            dy_j.addmm_(slope.T, x_i)
        elif dy_j is not None:
            dy_j += (slope.T @ x_i).to(dy_j.device)
        if self.u is not None:
            self.u[i] += slope.sum(dim=1)
        if self.v is not None:
            self.v[j] += slope.sum(dim=0)
