"""The tiled pair matrix against the dense one and its autograd: one rank, several, and a ring.

Seen to fail when: a tile forgets the sums of those before it, or a gradient those of other tiles;
the last, smaller tile is skipped; u or v is that of the first tile; a row with no entry divides by
its zero; an own column counts among its group, or is left out against `keep_own`; `chosen` is
counted backwards; half precision is not raised; ranks keep their column sums, maxima or gradients
to themselves; a ring's gradients stop one rank too early; its order decides between equals.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout

WORLDS = [1, 2, 4, 8]
SHAPES = [(1, 1), (1, 9), (13, 13), (5, 7), (12, 31), (31, 12)]
LAYOUTS = ["plain", "groups", "own", "chosen", "all at once", "two lonely rows", "nothing"]


def small_tiles(height: int = 5, width: int = 7) -> Any:
    """Tiles that cut every matrix here into uneven parts, set in whichever process the test
    runs.
    """
    return mock.patch.dict(similarity.TILE, cpu=(height, width))


def layout(kind: str, b: int, n: int, **changes: Any) -> Layout:
    """My b rows' own columns lie anywhere among n; about every third pair shares a group."""
    generator = torch.Generator().manual_seed(b * 100 + n)
    own = torch.randperm(max(b, n), generator=generator)[:b] % n
    groups = torch.randint(0, max(n // 2, 1), (n,), generator=generator)
    row_groups = groups[own]
    if kind == "two lonely rows":
        groups = torch.zeros_like(groups)
        row_groups = 1 + torch.arange(b)
        row_groups[:2] = 0
    if kind == "nothing":
        groups = torch.zeros_like(groups)
        row_groups = torch.zeros_like(row_groups)
    grouped = kind in ("groups", "all at once", "two lonely rows", "nothing")
    return Layout(
        own=own,
        columns=n,
        groups=((row_groups, groups),) if grouped else (),
        keep_own=kind in ("own", "all at once"),
        chosen=torch.rand(n, generator=generator) < 0.6
        if kind in ("chosen", "all at once")
        else None,
        **changes,
    )


def counts(place: Layout) -> Tensor:
    """(b, N) which entries count, said once more, entry by entry."""
    out = torch.zeros(len(place.own), place.columns, dtype=torch.bool)
    for i, own in enumerate(place.own.tolist()):
        for j in range(place.columns):
            if j == own:
                out[i, j] = place.keep_own
                continue
            same = any(bool(mine[i] == theirs[j]) for mine, theirs in place.groups)
            out[i, j] = not same and (
                place.chosen is None or bool(place.chosen[(j - own) % place.columns])
            )
    return out


def inputs(
    b: int, n: int, width: int = 3, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, y, u, v."""
    generator = torch.Generator().manual_seed(b + n)
    shapes = [(b, width), (n, width), (b,), (n,)]
    made = [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def dense(x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None, place: Layout) -> Tensor:
    matrix = x @ y.T
    matrix = matrix if u is None else matrix + u[:, None]
    matrix = matrix if v is None else matrix + v
    return matrix.masked_fill(~counts(place), -torch.inf)


def close(found: Any, expected: Any, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of a weighted sum of all that is given, the −inf of rows without entries not left out."""
    generator = torch.Generator().manual_seed(7)
    weights = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        for out in outputs
    ]
    return list(torch.autograd.grad(outputs, leaves, weights, retain_graph=True))


# ---- one rank


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("b", "n"), SHAPES)
def test_log_sums_and_their_gradients_are_those_of_the_dense_matrix(
    b: int, n: int, kind: str
) -> None:
    place = layout(kind, b, n)
    leaves = inputs(b, n)
    matrix = dense(*leaves, place)  # type: ignore[arg-type]
    expected = [matrix.logsumexp(dim=1), matrix.logsumexp(dim=0)]
    with small_tiles():
        found = similarity.logsumexp(leaves[0], leaves[1], place, leaves[2], leaves[3])
        close([found.rows, found.columns], expected)
        close([found.row_max, found.column_max], [matrix.amax(dim=1), matrix.amax(dim=0)])
        close(gradients([found.rows, found.columns], leaves), gradients(expected, leaves))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("offsets", ["none", "u", "v"])
def test_rows_or_columns_alone_with_either_offset(rows: bool, offsets: str) -> None:
    place, (x, y, u, v) = layout("groups", 12, 31), inputs(12, 31)
    u_or_none = u if offsets == "u" else None
    v_or_none = v if offsets == "v" else None
    leaves = [x, y, *([u] if offsets == "u" else []), *([v] if offsets == "v" else [])]
    expected = dense(x, y, u_or_none, v_or_none, place).logsumexp(dim=1 if rows else 0)
    with small_tiles():
        sums = similarity.logsumexp(x, y, place, u_or_none, v_or_none, rows=rows, columns=not rows)
        found = sums.rows if rows else sums.columns
        close(found, expected)
        close(gradients([found], leaves), gradients([expected], leaves))
    unwanted = (sums.columns, sums.column_max) if rows else (sums.rows, sums.row_max)
    assert all(len(tensor) == 0 for tensor in unwanted)


@pytest.mark.parametrize("kind", ["two lonely rows", "nothing"])
def test_rows_without_an_entry_are_minus_infinity_and_move_nothing(kind: str) -> None:
    place = layout(kind, 12, 31)
    leaves = inputs(12, 31)
    lonely = ~counts(place).any(dim=1)
    with small_tiles():
        sums = similarity.logsumexp(leaves[0], leaves[1], place, leaves[2], leaves[3])
        assert (sums.rows[lonely] == -torch.inf).all()
        assert torch.isfinite(sums.rows[~lonely]).all()
        dx, dy, du, dv = gradients([sums.rows, sums.columns], leaves)
        assert (dx[lonely] == 0).all()
        assert (du[lonely] == 0).all()
        assert all(torch.isfinite(grad).all() for grad in (dx, dy, du, dv))
        assert (similarity.nearest(leaves[0], leaves[1], place)[0][lonely] == -torch.inf).all()
        assert (similarity.row_sums(leaves[0], leaves[1], place, softplus)[lonely] == 0).all()


def softplus(entries: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(entries), torch.sigmoid(entries)


def square(entries: Tensor) -> tuple[Tensor, Tensor]:
    return entries**2, 2 * entries


def itself(entries: Tensor) -> tuple[Tensor, Tensor]:
    return entries, torch.ones_like(entries)


@pytest.mark.parametrize("f", [softplus, square, itself])
@pytest.mark.parametrize("with_u", [True, False])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("b", "n"), SHAPES)
def test_totals_and_row_sums_are_those_of_the_dense_matrix(
    b: int, n: int, kind: str, with_u: bool, f: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    place, (x, y, u, _) = layout(kind, b, n), inputs(b, n)
    leaves = [x, y, u] if with_u else [x, y]
    weights = torch.linspace(-1.0, 2.0, b, dtype=torch.float64)
    matrix = x @ y.T + (u[:, None] if with_u else 0)
    sums = (f(matrix)[0] * counts(place)).sum(dim=1)
    expected = sums @ weights
    with small_tiles():
        found = similarity.total(x, y, place, f, weights, u if with_u else None)
        close(found, expected)
        close(gradients([found], leaves), gradients([expected], leaves))
        close(similarity.row_sums(x, y, place, f, u if with_u else None), sums.detach())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("b", "n"), SHAPES)
def test_nearest_is_the_first_of_the_largest(b: int, n: int, kind: str) -> None:
    place, (x, y, u, _) = layout(kind, b, n), inputs(b, n)
    # few values: many equals
    x = (2 * x).round()
    y = (2 * y).round()
    best, where = dense(x, y, u, None, place).detach().max(dim=1)
    with small_tiles():
        found, column = similarity.nearest(x, y, place, u)
    close(found, best)
    assert torch.equal(column[best > -torch.inf], where[best > -torch.inf])


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 6),
    more=st.integers(0, 4),
    width=st.integers(1, 3),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kind=st.sampled_from(LAYOUTS),
)
def test_gradients_by_finite_differences(
    b: int, more: int, width: int, tile: tuple[int, int], kind: str
) -> None:
    place = layout(kind, b, b + more)
    leaves = inputs(b, b + more, width)
    weights = torch.linspace(0.5, 2.0, b, dtype=torch.float64)

    def outputs(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        sums = similarity.logsumexp(x, y, place, u, v)
        finite = [part.masked_fill(part == -torch.inf, 0.0) for part in (sums.rows, sums.columns)]
        return *finite, similarity.total(x, y, place, softplus, weights, u)

    with small_tiles(*tile):
        assert torch.autograd.gradcheck(outputs, leaves)


def test_outputs_may_serve_twice_and_graphs_be_walked_twice() -> None:
    place = layout("plain", 12, 31)
    leaves = inputs(12, 31)
    matrix = dense(*leaves, place)  # type: ignore[arg-type]
    rows = matrix.logsumexp(dim=1)
    columns = matrix.logsumexp(dim=0)
    expected = (
        rows.exp().mean() + rows.square().mean() + columns[place.own].mean() + columns.sum(),
    )
    with small_tiles():
        sums = similarity.logsumexp(leaves[0], leaves[1], place, leaves[2], leaves[3])
        found = (
            sums.rows.exp().mean()
            + sums.rows.square().mean()
            + sums.columns[place.own].mean()
            + sums.columns.sum(),
        )
        total = similarity.total(leaves[0], leaves[1], place, softplus, torch.ones(12))
        for _ in range(2):
            close(gradients(list(found), leaves), gradients(list(expected), leaves))
        close(gradients([total], leaves[:2]), gradients([total], leaves[:2]))


def test_without_gradients_the_values_are_the_same() -> None:
    place, (x, y, u, v) = layout("groups", 12, 31), inputs(12, 31)
    weights = torch.ones(12)

    def outputs() -> list[Tensor]:
        return [
            *similarity.logsumexp(x, y, place, u, v),
            similarity.total(x, y, place, softplus, weights, u),
        ]

    with small_tiles():
        expected = outputs()
        with torch.no_grad():
            found = outputs()
    assert all(tensor.requires_grad is False for tensor in found)
    close(found, [tensor.detach() for tensor in expected], rtol=0.0)


def test_without_gradients_none_is_made() -> None:
    place, (x, y, u, _) = layout("groups", 12, 31), inputs(12, 31)
    made = mock.patch.object(
        similarity._Gradients, "add", side_effect=AssertionError("a gradient that nobody wants")
    )
    with small_tiles(), made, torch.no_grad():
        similarity.total(x, y, place, softplus, torch.ones(12), u)


# ---- numbers at their limits


def test_float32_logits_of_200_are_those_of_float64() -> None:
    """Cosines of ±1 at scale 200, in tiles: as near as float32 can hold a number of 200."""
    place = layout("groups", 40, 40)
    unit = [F.normalize(tensor.detach(), dim=1) for tensor in inputs(40, 40, width=4)[:2]]
    # true pairs at +200
    unit[1][:20] = unit[0][place.own.argsort()][:20]
    # and others at −200
    unit[1][20:30] = -unit[0][:10]
    high = [(200 * unit[0]).requires_grad_(), unit[1].clone().requires_grad_()]
    low = [tensor.detach().float().requires_grad_() for tensor in high]
    matrix = dense(*high, None, None, place)  # type: ignore[arg-type]
    expected = [matrix.logsumexp(dim=1), matrix.logsumexp(dim=0)]
    with small_tiles():
        sums = similarity.logsumexp(low[0], low[1], place)
        grads = gradients([sums.rows, sums.columns], low)
    assert matrix.max() > 190
    for found, exact in zip([sums.rows, sums.columns], expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    for found, exact in zip(grads, gradients(expected, high), strict=True):
        torch.testing.assert_close(
            found.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item()
        )


def test_offsets_of_minus_infinity_leave_rows_and_columns_out() -> None:
    place, (x, y, u, v) = layout("plain", 12, 31), inputs(12, 31)
    with torch.no_grad():
        u[3], v[5] = -torch.inf, -torch.inf
    with small_tiles():
        sums = similarity.logsumexp(x, y, place, u, v)
        dx, dy, du, dv = gradients([sums.rows, sums.columns], [x, y, u, v])
    assert sums.rows[3] == sums.columns[5] == -torch.inf
    assert dx[3].abs().sum() == dy[5].abs().sum() == du[3] == dv[5] == 0
    assert all(torch.isfinite(grad).all() for grad in (dx, dy, du, dv))


@pytest.mark.parametrize("broken", range(4))
def test_a_nan_is_never_a_silent_number(broken: int) -> None:
    """In x or u it spoils that row and all columns, in y or v that column and all rows; likewise
    the gradients.
    """
    place = layout("own", 12, 31)
    leaves = inputs(12, 31)
    with torch.no_grad():
        leaves[broken].view(len(leaves[broken]), -1)[10, 0] = torch.nan
    with small_tiles():
        sums = similarity.logsumexp(leaves[0], leaves[1], place, leaves[2], leaves[3])
        total = similarity.total(leaves[0], leaves[1], place, softplus, torch.ones(12), leaves[2])
        of_row = sums.rows.isnan()
        of_column = sums.columns.isnan()
        dx, dy, _, _ = gradients([sums.rows, sums.columns], leaves)
    if broken in (0, 2):
        assert of_row.nonzero().tolist() == [[10]]
        assert of_column.all()
    else:
        assert of_column.nonzero().tolist() == [[10]]
        assert of_row.all()
    assert total.isnan() == (broken != 3)
    assert dx.isnan().any()
    assert dy.isnan().any()
    assert (sums.row_max.isnan() == of_row).all()
    assert (sums.column_max.isnan() == of_column).all()


def test_nearest_to_a_nan_is_nan() -> None:
    place, (x, y, _, _) = layout("own", 12, 31), inputs(12, 31)
    with torch.no_grad():
        y[10, 0] = torch.nan
    with small_tiles():
        best, _ = similarity.nearest(x, y, place)
    assert best.isnan().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_summed_as_float32(dtype: torch.dtype, autocast: bool) -> None:
    place = layout("groups", 12, 31)
    offsets = inputs(12, 31, dtype=torch.float32)[2:]
    low = [*inputs(12, 31, dtype=dtype)[:2], *offsets]
    high = [*(tensor.detach().float().requires_grad_() for tensor in low[:2]), *offsets]

    def outputs(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> list[list[Tensor]]:
        sums = similarity.logsumexp(x, y, place, u, v)
        return [
            [sums.rows, sums.columns],
            [similarity.total(x, y, place, softplus, torch.ones(12), u)],
        ]

    with small_tiles():
        expected = outputs(*high)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = outputs(*low)
            # a backward inside autocast is bad manners, and must not matter; v is no part of the
            # total
            grads = [*gradients(found[0], low), *gradients(found[1], [low[0], low[2]])]
            nearest = similarity.nearest(low[0], low[1], place)[0]
            row_sums = similarity.row_sums(low[0], low[1], place, softplus)
        close(found, expected, rtol=0.0)
        close(nearest, similarity.nearest(high[0], high[1], place)[0], rtol=0.0)
        close(row_sums, similarity.row_sums(high[0], high[1], place, softplus), rtol=0.0)
        exact = [*gradients(expected[0], high), *gradients(expected[1], [high[0], high[2]])]
    for grad, true, leaf in zip(grads, exact, [*low, low[0], low[2]], strict=True):
        assert grad.dtype == leaf.dtype
        assert torch.equal(grad, true.to(leaf.dtype))


def test_half_precision_offsets_get_gradients_summed_in_float32() -> None:
    """In 2,000 tiles a sum of ones in bf16 stands still at 256."""
    place = layout("own", 4, 2000)
    x = torch.zeros(4, 1)
    y = torch.zeros(2000, 1)
    u = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    with small_tiles(4, 1):
        (found,) = torch.autograd.grad(similarity.total(x, y, place, itself, torch.ones(4), u), [u])
    assert found.tolist() == [2000.0] * 4


def test_a_loss_scaled_up_saves_the_gradient_of_fp16_columns() -> None:
    """As GradScaler does it: what is too small for fp16 must be multiplied before it is rounded."""
    place = layout("own", 12, 31)
    low = inputs(12, 31, dtype=torch.float16)[:2]
    high = [tensor.detach().float().requires_grad_() for tensor in low]
    found, exact = (
        torch.autograd.grad(
            2**16 * similarity.total(x, y, place, itself, torch.full((12,), 1e-9)), [x, y]
        )
        for x, y in (low, high)
    )
    torch.testing.assert_close(found, tuple(grad.half() for grad in exact), rtol=1e-3, atol=1e-7)


def test_autocast_is_as_it_was_after_a_sweep_and_after_an_error() -> None:
    place, (x, y, _, _) = layout("plain", 12, 31), inputs(12, 31, dtype=torch.float32)

    def broken(entries: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("f")

    with torch.autocast("cpu", dtype=torch.bfloat16), small_tiles():
        similarity.logsumexp(x, y, place)
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError, match="f"):
            similarity.row_sums(x, y, place, broken)
        assert torch.is_autocast_enabled("cpu")
        assert (x @ y.T).dtype == torch.bfloat16


def test_columns_may_have_another_dtype_than_rows() -> None:
    """bf16 columns, as in a queue: they are raised to the rows' dtype and get their gradient in
    their own.
    """
    place, (x, y, _, _) = layout("groups", 12, 31), inputs(12, 31, dtype=torch.float32)
    half = y.detach().bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    with small_tiles():
        found = similarity.logsumexp(x, half, place)
        exact = similarity.logsumexp(x, full, place)
        close([found.rows, found.columns], [exact.rows, exact.columns], rtol=0.0)
        mine, true = (
            gradients([s.rows, s.columns], [x, y]) for s, y in ((found, half), (exact, full))
        )
    assert torch.equal(mine[0], true[0])
    assert torch.equal(mine[1], true[1].bfloat16())


# ---- several ranks

# rows and columns over all ranks: 3 a rank on eight of them
B = 24


def mine(x: Tensor) -> Tensor:
    return x.chunk(world.size())[world.rank()]


def over_ranks(kind: str, ring: bool, dtype: torch.dtype, offsets: bool) -> list[Tensor]:
    """Loss, maxima and all gradients of one global batch; each rank's part in the convention of
    world.gather.
    """
    place = layout(kind, B, B)
    part = Layout(
        own=mine(place.own),
        columns=B,
        groups=tuple((mine(of_rows), of_columns) for of_rows, of_columns in place.groups),
        keep_own=place.keep_own,
        chosen=place.chosen,
        ring=ring,
    )
    leaves = [mine(tensor.detach()).clone().requires_grad_() for tensor in inputs(B, B)]
    x = leaves[0]
    y = leaves[1].to(dtype)
    u, v = (leaves[2], world.gather(leaves[3])) if offsets else (None, None)
    by_row, by_column = (
        mine(torch.linspace(start, 2.0, B, dtype=torch.float64)) for start in (-1.0, 0.3)
    )
    columns = y if ring else world.gather(y)
    with small_tiles():
        sums = similarity.logsumexp(x, columns, part, u, v)
        finite = [s.masked_fill(s == -torch.inf, 0.0) for s in (sums.rows, sums.columns[part.own])]
        ours = by_row * finite[0] + by_column * finite[1].square()
        total = similarity.total(x, columns, part, softplus, by_row / len(x), u)
        loss = ours.mean() + total
        grads = torch.autograd.grad(loss, leaves if offsets else leaves[:2])
        # many equals
        best, where = similarity.nearest(x.detach().round(), columns.detach().round(), part, u)
        negative = similarity.row_sums(x, columns, part, softplus, u)
    gathered = [
        world.gather(tensor.detach()) for tensor in (sums.rows, sums.row_max, best, where, negative)
    ]
    mean = [world.gather(grad) / world.size() for grad in grads]
    return [world.mean_over_ranks(loss), sums.columns.detach(), sums.column_max, *gathered, *mean]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_ranks_make_the_sums_and_gradients_of_one_process(
    ranks: Any, world_size: int, ring: bool, dtype: torch.dtype
) -> None:
    for kind in ("plain", "all at once", "two lonely rows"):
        for offsets in (True, False):
            expected = over_ranks(kind, False, dtype, offsets)
            results = ranks(world_size, over_ranks, kind, ring, dtype, offsets)
            for found in results:
                y_gradient = found.pop(-3 if offsets else -1)
                y_expected = expected[-3 if offsets else -1]
                close(found, [tensor for tensor in expected if tensor is not y_expected], 1e-10)
                # each rank rounds its part of y's gradient to y's dtype before they are added
                close(y_gradient, y_expected, 1e-10 if dtype == torch.float64 else 0.02)


def from_transposed_columns() -> Tensor:
    x, y = (mine(tensor.detach()) for tensor in inputs(B, B)[:2])
    # as `weights.T` has it: no copy, another order in memory
    turned = y.T.contiguous().T.requires_grad_()
    place = Layout(own=mine(torch.arange(B)), columns=B, ring=True)
    sums = similarity.logsumexp(x, turned, place)
    return world.gather(
        torch.autograd.grad(sums.rows.sum() + sums.columns.mean() / world.size(), turned)[0]
    )


def test_columns_of_any_memory_order_go_round_the_ring(ranks: Any) -> None:
    (expected,) = ranks(1, from_transposed_columns)
    for found in ranks(2, from_transposed_columns):
        close(found, expected)


def carried() -> tuple[list[list[float]], list[float]]:
    """Every rank adds 100 times its number to each row that comes by, and 1."""
    rank = world.rank()
    size = world.size()
    x = torch.arange(3 * rank, 3 * rank + 3.0)
    bag = torch.zeros(3)
    seen = []
    for offset, rows, baggage in world.ring(x, bag):
        assert baggage is not None
        seen.append([float(offset), *rows.tolist()])
        baggage += rows + 10.0**rank
    assert len(seen) == size
    return seen, bag.tolist()


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_ring_shows_every_row_once_and_brings_its_baggage_home(
    ranks: Any, world_size: int
) -> None:
    for rank, (seen, bag) in enumerate(ranks(world_size, carried)):
        # mine first
        assert seen[0][0] == 3 * rank
        assert sorted(seen) == [
            [3.0 * r, 3.0 * r, 3.0 * r + 1, 3.0 * r + 2] for r in range(world_size)
        ]
        everyones = sum(10.0**r for r in range(world_size))
        assert bag == [world_size * (3.0 * rank + k) + everyones for k in range(3)]


def added() -> tuple[float, list[float]]:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64).mul_(world.rank() + 1).requires_grad_()
    loss = (world.rank() + 1) * world.differentiable_sum(x).square().sum()
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad.tolist()


@pytest.mark.parametrize("world_size", WORLDS)
def test_add_is_a_sum_whose_gradient_is_what_all_ranks_ask_for(ranks: Any, world_size: int) -> None:
    # of 1 ... W
    whole = world_size * (world_size + 1) / 2
    for rank, (loss, grad) in enumerate(ranks(world_size, added)):
        assert loss == (rank + 1) * 5 * whole**2
        assert grad == [2 * whole * whole, 4 * whole * whole]


def log_summed() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(world.rank())
    x = 200 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    # on all ranks
    x[0] = -torch.inf
    # on some
    x[1, world.rank() % 3] = -torch.inf
    x[2, 1] = torch.nan if world.rank() == 0 else 1.0
    return world.logsumexp_over_ranks(x), world.gather(x[None]).logsumexp(dim=0)


@pytest.mark.parametrize("world_size", WORLDS)
def test_log_sums_over_ranks_with_minus_infinity_and_nan(ranks: Any, world_size: int) -> None:
    for found, expected in ranks(world_size, log_summed):
        assert (found[0] == -torch.inf).all()
        assert found[2, 1].isnan()
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0, equal_nan=True)


def maximum_with_nan() -> Tensor:
    return world.max_over_ranks(torch.tensor([torch.nan if world.rank() == 0 else 1.0, 2.0]))


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_maximum_over_ranks_of_a_nan_is_nan(ranks: Any, world_size: int) -> None:
    for found in ranks(world_size, maximum_with_nan):
        assert found[0].isnan()
        assert found[1] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("host", [False, True], ids=["all on the device", "columns in host memory"])
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(host: bool) -> None:
    place = layout("all at once", 12, 31)
    leaves = inputs(12, 31)
    there = Layout(
        **{
            name: part.cuda() if isinstance(part, Tensor) else part
            for name, part in vars(place).items()
        }
    )
    copies = [tensor.detach().cuda().requires_grad_() for tensor in leaves]
    if host:
        copies[1] = leaves[1].detach().clone().requires_grad_()

    def outputs(x: Tensor, y: Tensor, u: Tensor, v: Tensor, at: Layout) -> list[Tensor]:
        sums = similarity.logsumexp(x, y, at, u, v)
        total = similarity.total(x, y, at, softplus, torch.ones(12, device=x.device), u)
        return [
            sums.rows.sum() + sums.columns.square().sum() + total,
            *similarity.nearest(x, y, at, u),
        ]

    with small_tiles(), mock.patch.dict(similarity.TILE, cuda=(5, 7)):
        expected = outputs(*leaves, place)
        found = outputs(*copies, there)
        close([tensor.cpu() for tensor in found], expected)
        grads = torch.autograd.grad(found[0], copies)
        assert [grad.device for grad in grads] == [copy.device for copy in copies]
        close([grad.cpu() for grad in grads], list(torch.autograd.grad(expected[0], leaves)))
