"""Features of one shard, encoded by one rank; images that cannot be read are left out.

Used wherever features are stored beside shards (frozen towers, search, scores for mining): the
shards are divided among the ranks, and each rank encodes its own without talking to the others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clipsmall.data import Catalog, captions_of, fields_of
from clipsmall.distributed import world
from clipsmall.evaluation.features import Encoder, NoReadableImage


@contextmanager
def _one_shard(catalog: Catalog, shard: int) -> Iterator[Catalog]:
    """One shard as its own catalog.

    Its file is closed at the end: there may be more shards than a process may have open files.
    """
    of_shard = catalog.only(shard)
    try:
        yield of_shard
    finally:
        os.close(of_shard.descriptor(0))


def encode_shard_images(encoder: Encoder, catalog: Catalog, shard: int) -> tuple[Tensor, Tensor]:
    """Features of a shard's readable images; the other ranks need not call.

    Args:
        shard: number of the shard in the catalog.

    Returns:
        (m, D) features (m = 0 if no image can be read), and their (m,) rows, ascending: ordinals
        among the shard's good pairs.

    Raises:
        ShardError: the shard was cut while in use.
    """
    with _one_shard(catalog, shard) as of_shard, world.single_process():
        try:
            return encoder.images(of_shard)
        except NoReadableImage:
            # no image to encode; a caption is encoded to learn D
            no_features = encoder.texts(["a"])[:0]
            return no_features, torch.empty(0, dtype=torch.int64)


def read_shard_captions(
    catalog: Catalog, shard: int, rows: list[int] | None = None
) -> list[list[str]]:
    """All captions of each good pair of a shard, or of some pairs (ordinals among the good ones).

    Raises:
        ShardError: the shard was cut while in use.
    """
    found = list[list[str]]()
    with _one_shard(catalog, shard) as of_shard:
        if rows is None:
            rows = list(range(len(of_shard)))
        for row in rows:
            data = of_shard.read_text(row)
            found.append(captions_of(data.text, fields_of(data.json)))
    return found


def encode_shard_texts(encoder: Encoder, captions: list[str]) -> Tensor:
    """(n, D) features of n captions (n may be 0); the other ranks need not call."""
    with world.single_process():
        return encoder.texts(captions)
