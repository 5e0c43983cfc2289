"""Which columns belong to which rows, and how a row's own pair compares with all others: what pair
losses share.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout


def own_places(rows: Embeddings, columns: Embeddings) -> Tensor:
    """(b,) where each row's own pair stands among the N columns; found by `index`, so no rank
    offset exists.

    A queue holds older copies of a pair: the first column of that index is its own.
    """
    known, order = columns.index.sort(stable=True)
    places: Tensor = order[torch.searchsorted(known, rows.index)]
    return places


def layout(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool, keep_own: bool = False
) -> Layout:
    """Rows against columns, without a row's own pair (unless `keep_own`) and, if asked, without
    equal captions.

    A pair is never its own negative: of a queue, older copies of it are left out, asked or not.
    """
    groups = []
    if mask_duplicates and repeats(columns.caption_hash):
        groups.append((rows.caption_hash, columns.caption_hash))
    if columns.live is not None and repeats(columns.index):
        groups.append((rows.index, columns.index))
    if columns.own_only:
        others = torch.arange(len(columns.index), device=columns.index.device) >= columns.own_only
        groups.append((torch.zeros_like(rows.index), others.long()))
    return Layout(
        own=own_places(rows, columns),
        columns=len(columns.index),
        groups=tuple(groups),
        keep_own=keep_own,
        ring=len(columns.text) < len(columns.index),
    )


def both(first: Tensor, second: Tensor) -> Tensor:
    """(b,), (b,) log sums -> log(e^first + e^second). Both may be -inf: a row with no column, whose
    gradient is 0 where logaddexp's own is NaN."""
    none = (first == -torch.inf) & (second == -torch.inf)
    sums = torch.logaddexp(first.masked_fill(none, 0.0), second.masked_fill(none, 0.0))
    return sums.masked_fill(none, -torch.inf)


def repeats(numbers: Tensor) -> bool:
    return len(torch.unique(numbers)) < len(numbers)


def negatives(place: Layout) -> Tensor:
    """(b,) int64 how many columns each row is told apart from: all but its own and those of its
    groups.
    """
    others = torch.full_like(place.own, place.columns - 1)
    if not place.groups:
        return others
    if len(place.groups) == 1:
        of_rows, of_columns = place.groups[0]
        known = of_columns.sort().values
        return (
            others
            + 1
            - (torch.searchsorted(known, of_rows, right=True) - torch.searchsorted(known, of_rows))
        )
    counted = replace(place, keep_own=False, chosen=None)
    others = torch.zeros_like(place.own)
    for start in range(0, place.columns, 1024):
        j = slice(start, min(start + 1024, place.columns))
        others += (~counted.left_out(slice(None), j)).sum(dim=1)
    return others


def dots(x: Tensor, y: Tensor) -> Tensor:
    """(b,) row by row, at least in float32."""
    return (x.to(similarity.wide(x)) * y.to(similarity.wide(x))).sum(dim=1)


def own_column(mine: Tensor, columns: Tensor, place: Layout) -> Tensor:
    """(b, D) each row's own column of one modality; a queue's keys are others than `mine`, the
    rows' own.
    """
    return mine if place.ring else picked(columns, place.own)


def picked(columns: Tensor, places: Tensor) -> Tensor:
    """Some of the columns, which may lie in host memory, where `places` are."""
    return columns[places.to(columns.device)].to(places.device)


def whole_batch(rows: Embeddings, columns: Embeddings) -> bool:
    """The columns are exactly all ranks' rows: then one matrix serves both directions."""
    return columns.live is None and len(columns.index) == len(rows.index) * world.size()


class Way(NamedTuple):
    """My rows of one modality, what they are compared with, and each row's own column of it (b,
    D).
    """

    x: Tensor
    y: Tensor
    own: Tensor


def ways(rows: Embeddings, columns: Embeddings, place: Layout, both: bool = False) -> list[Way]:
    """Images among texts, and texts among images; the latter only for a queue, or if asked for.

    Where the columns are the batch itself, the second matrix is the first one's transpose.
    """
    forth = Way(rows.image, columns.text, own_column(rows.text, columns.text, place))
    if not both and whole_batch(rows, columns):
        return [forth]
    return [forth, Way(rows.text, columns.image, own_column(rows.image, columns.image, place))]


class Direction(NamedTuple):
    """My rows of one modality against the columns of the other, as logits."""

    # (b,) of the true pairs; differentiable
    own: Tensor
    # (b,) log sum exp of the columns that are negatives, −inf where none is; differentiable
    others: Tensor
    # (b,) the highest of these
    hardest: Tensor

    @property
    def accuracy(self) -> Tensor:
        """The share of rows whose own pair scores higher than every negative."""
        return (self.own > self.hardest).float().mean().detach()

    @property
    def surprise(self) -> Tensor:
        """(b,) −log softmax of the own pair: LSE over all columns less the own logit, without
        cancellation.
        """
        return F.softplus(self.others - self.own)


def directions(
    rows: Embeddings,
    columns: Embeddings,
    place: Layout,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Direction, Direction]:
    """Images among texts, and texts among images.

    One sweep over one matrix serves both where the columns are the batch itself and both have one
    scale; its column sums go over all ranks' rows. Elsewhere (a queue, temperatures of each row)
    there are two matrices.

    Args:
        scales: (b,) or () of my images and of my texts; default: the model's logit_scale for both.
    """
    of_image, of_text = scales if scales is not None else (rows.logit_scale, rows.logit_scale)
    image = scaled(rows.image, of_image)
    own = dots(image, own_column(rows.text, columns.text, place))
    if scales is None and whole_batch(rows, columns):
        sums = similarity.logsumexp(image, columns.text, place)
        there = sums.columns[place.own], sums.column_max[place.own]
        return Direction(own, sums.rows, sums.row_max), Direction(own, *there)
    text = scaled(rows.text, of_text)
    forth = similarity.logsumexp(image, columns.text, place, columns=False)
    back = similarity.logsumexp(text, columns.image, place, columns=False)
    its = dots(text, own_column(rows.image, columns.image, place))
    return Direction(own, forth.rows, forth.row_max), Direction(its, back.rows, back.row_max)


def within(rows: Embeddings, columns: Embeddings, place: Layout) -> tuple[Tensor, Tensor]:
    """(b,) log sums of each image among the other images, and of each text among the other texts,
    scaled.
    """
    image = scaled(rows.image, rows.logit_scale)
    text = scaled(rows.text, rows.logit_scale)
    return (
        similarity.logsumexp(image, columns.image, place, columns=False).rows,
        similarity.logsumexp(text, columns.text, place, columns=False).rows,
    )


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """(b, D) rows times a scale () or (b,), at least in float32."""
    x = x.to(similarity.wide(x))
    return x * (scale[:, None] if scale.dim() else scale).to(x.dtype)
