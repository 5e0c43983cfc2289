"""Shared by pair losses: a row's own column (its positive), its negatives, and log sums.

Rows are local, columns gathered: see `clipsmall.batch.Embeddings`.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout

# number of columns masked at a time when negatives are counted by the mask itself
COUNTED_AT_ONCE = 1024


def own_columns(rows: Embeddings, columns: Embeddings) -> Tensor:
    """(b,) for each row the column that holds the same pair, its positive.

    Found by `index`, so no rank offset is needed. A queue may hold older copies of a pair; the
    first matching column is taken, which is that of the batch.
    """
    # stable: among equal numbers, the first column stays first
    known, order = columns.index.sort(stable=True)
    sorted_positions = torch.searchsorted(known, rows.index)

    positions: Tensor = order[sorted_positions]
    return positions


def layout_of(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool, keep_own: bool = False
) -> Layout:
    """Which columns are negatives of which rows.

    A pair is never its own negative: older copies of it in a queue are left out in any case.

    Args:
        rows: my b pairs.
        columns: the N pairs they are compared with.
        mask_duplicates: columns with the row's own caption are no negatives of it.
        keep_own: whether a row's own column counts like the others.
    """
    # (b,), (N,): a column whose number equals the row's is no negative
    groups = []

    # if no caption is repeated, only the own column has the row's caption; it is left out anyway
    if mask_duplicates and has_repeats(columns.caption_hash):
        groups.append((rows.caption_hash, columns.caption_hash))

    # older copies of a pair in a queue
    if columns.live is not None and has_repeats(columns.index):
        groups.append((rows.index, columns.index))

    # columns that serve as positives only get group 0, as all rows do
    if columns.own_only:
        positions = torch.arange(len(columns.index), device=columns.index.device)
        is_negative = (positions >= columns.own_only).long()
        zeros = torch.zeros_like(rows.index)
        groups.append((zeros, is_negative))

    return Layout(
        own=own_columns(rows, columns),
        columns=len(columns.index),
        groups=tuple(groups),
        keep_own=keep_own,
        ring=len(columns.text) < len(columns.index),
    )


def add_log_sums(first: Tensor, second: Tensor) -> Tensor:
    """(b,) log(e^first + e^second) of two log sums (b,).

    Where both are −inf (a row without columns) the gradient is 0; with logaddexp alone it is NaN.
    """
    no_first = first == -torch.inf
    no_second = second == -torch.inf
    empty = no_first & no_second

    # finite placeholders where both are −inf; the last line cuts off their gradient
    first = first.masked_fill(empty, 0.0)
    second = second.masked_fill(empty, 0.0)
    sums = torch.logaddexp(first, second)
    return sums.masked_fill(empty, -torch.inf)


def has_repeats(numbers: Tensor) -> bool:
    return len(torch.unique(numbers)) < len(numbers)


def negative_counts(layout: Layout) -> Tensor:
    """(b,) int64 how many negatives each row has: all columns but its own and those left out."""
    others = torch.full_like(layout.own, layout.columns - 1)
    if not layout.groups:
        return others

    # with one group, count equal columns by binary search; the row's own column is among them
    if len(layout.groups) == 1:
        of_rows, of_columns = layout.groups[0]
        known = of_columns.sort().values
        before = torch.searchsorted(known, of_rows)
        up_to = torch.searchsorted(known, of_rows, right=True)
        equal = up_to - before
        return others + 1 - equal

    # several groups may overlap, so count the mask itself, a few columns at a time
    counted = replace(layout, keep_own=False, chosen=None)
    all_rows = slice(None)
    counts = torch.zeros_like(layout.own)
    for start in range(0, layout.columns, COUNTED_AT_ONCE):
        end = min(start + COUNTED_AT_ONCE, layout.columns)
        left_out = counted.left_out(all_rows, slice(start, end))
        counts += (~left_out).sum(dim=1)
    return counts


def dots(x: Tensor, y: Tensor) -> Tensor:
    """(b,) inner products of row i of x (b, D) with row i of y (b, D), at least in float32."""
    dtype = similarity.wide(x)
    return (x.to(dtype) * y.to(dtype)).sum(dim=1)


def own_features(mine: Tensor, columns: Tensor, layout: Layout) -> Tensor:
    """(b, D) features of each row's own column, in one modality.

    Args:
        mine: (b, D) my rows' features in that modality. In a ring they are the columns' own; a
            moco queue has other features for the same pairs.
        columns: (N, D) the columns' features.
        layout: of the rows.
    """
    return mine if layout.ring else columns_at(columns, layout.own)


def columns_at(columns: Tensor, positions: Tensor) -> Tensor:
    """Some of the columns, which may lie in host memory, on the device of `positions`."""
    return columns[positions.to(columns.device)].to(positions.device)


def whole_batch(rows: Embeddings, columns: Embeddings) -> bool:
    """Whether the columns are exactly all ranks' rows, so one matrix serves both directions."""
    return columns.live is None and len(columns.index) == len(rows.index) * world.size()


class ComparedFeatures(NamedTuple):
    """My rows of one modality, and what they are compared with in the other."""

    # (b, D) my rows
    x: Tensor
    # (N, D) the columns
    y: Tensor
    # (b, D) the own column of each row
    own: Tensor


def comparisons(
    rows: Embeddings, columns: Embeddings, layout: Layout, both_directions: bool = False
) -> list[ComparedFeatures]:
    """Images among texts; and texts among images for a queue, or with `both_directions`.

    Where the columns are the batch itself, the second matrix is the first one's transpose.
    """
    images_among_texts = ComparedFeatures(
        x=rows.image,
        y=columns.text,
        own=own_features(rows.text, columns.text, layout),
    )
    if not both_directions and whole_batch(rows, columns):
        return [images_among_texts]

    texts_among_images = ComparedFeatures(
        x=rows.text,
        y=columns.image,
        own=own_features(rows.image, columns.image, layout),
    )
    return [images_among_texts, texts_among_images]


class Direction(NamedTuple):
    """My rows of one modality against the columns of the other, as logits."""

    # (b,) of the true pairs; differentiable
    own: Tensor
    # (b,) log sum exp of the negatives, −inf where there is none; differentiable
    others: Tensor
    # (b,) the highest negative
    hardest: Tensor

    @property
    def accuracy(self) -> Tensor:
        """() fraction of rows whose own pair scores higher than every negative."""
        return (self.own > self.hardest).float().mean().detach()

    @property
    def cross_entropy(self) -> Tensor:
        """(b,) −log softmax of the own pair: log sum over all columns − own logit.

        Computed from the negatives' log sum, so that nothing cancels.
        """
        return F.softplus(self.others - self.own)


def directions(
    rows: Embeddings,
    columns: Embeddings,
    layout: Layout,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Direction, Direction]:
    """Images among texts, and texts among images.

    One pass over one matrix serves both where the columns are the batch itself and both directions
    have one scale; its column sums go over all ranks' rows. Elsewhere (a queue, a temperature per
    row) there are two matrices.

    Args:
        rows: my b pairs.
        columns: the N pairs they are compared with.
        layout: which of them are negatives.
        scales: (b,) or () of my images and of my texts; None = the model's logit_scale for both.
    """
    image_scale, text_scale = scales or (rows.logit_scale, rows.logit_scale)
    image = scaled(rows.image, image_scale)
    own_texts = own_features(rows.text, columns.text, layout)
    own = dots(image, own_texts)

    # one matrix: its column sums are the texts' sums over images
    if scales is None and whole_batch(rows, columns):
        sums = similarity.logsumexp(image, columns.text, layout)
        of_images = Direction(
            own=own,
            others=sums.rows,
            hardest=sums.row_max,
        )
        of_texts = Direction(
            own=own,
            others=sums.columns[layout.own],
            hardest=sums.column_max[layout.own],
        )
        return of_images, of_texts

    # two matrices
    text = scaled(rows.text, text_scale)
    forth = similarity.logsumexp(image, columns.text, layout, columns=False)
    back = similarity.logsumexp(text, columns.image, layout, columns=False)
    of_images = Direction(
        own=own,
        others=forth.rows,
        hardest=forth.row_max,
    )
    own_images = own_features(rows.image, columns.image, layout)
    of_texts = Direction(
        own=dots(text, own_images),
        others=back.rows,
        hardest=back.row_max,
    )
    return of_images, of_texts


def within_modalities(
    rows: Embeddings, columns: Embeddings, layout: Layout
) -> tuple[Tensor, Tensor]:
    """(b,) log sums of each image among the other images, and of each text among the other texts.

    Of logits: cosines times the model's logit_scale.
    """
    image = scaled(rows.image, rows.logit_scale)
    text = scaled(rows.text, rows.logit_scale)

    # only row sums are needed
    among_images = similarity.logsumexp(
        image,
        columns.image,
        layout,
        columns=False,
    )
    among_texts = similarity.logsumexp(
        text,
        columns.text,
        layout,
        columns=False,
    )
    return among_images.rows, among_texts.rows


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """(b, D) rows times a scale () or (b,), at least in float32."""
    dtype = similarity.wide(x)
    factor = scale.to(dtype)
    # one scale per row
    if factor.dim():
        factor = factor[:, None]
    return x.to(dtype) * factor
