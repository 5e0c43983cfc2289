"""Features of one shard, encoded by one rank; images that cannot be read are left out.

Those who keep features beside shards (frozen towers, search, scores for mining) divide the shards
among the ranks; each rank then encodes its shards as if it were the only one.
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
    """One shard as a catalog of its own, whose file is closed at the end: there may be more shards
    than a process may hold open files.
    """
    of_shard = catalog.only(shard)
    try:
        yield of_shard
    finally:
        os.close(of_shard.descriptor(0))


def encode_shard_images(encoder: Encoder, catalog: Catalog, shard: int) -> tuple[Tensor, Tensor]:
    """Features of the images of a shard that can be read; no other rank need take part.

    Args:
        shard: number of the shard in the catalog.

    Returns:
        (m, D) features, m = 0 where no image can be read, and (m,) their rows, ascending: ordinals
        among the good pairs of the shard.

    Raises:
        ShardError: the shard was cut while in use.
    """
    with _one_shard(catalog, shard) as of_shard, world.single_process():
        try:
            return encoder.images(of_shard)
        except NoReadableImage:
            # nothing to encode: the caption only tells D
            no_features = encoder.texts(["a"])[:0]
            return no_features, torch.empty(0, dtype=torch.int64)


def read_shard_captions(
    catalog: Catalog, shard: int, rows: list[int] | None = None
) -> list[list[str]]:
    """All captions of each good pair of a shard, or of some: ordinals among its good pairs.

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
    """(n, D) features of n captions, n = 0 among them; no other rank need take part."""
    with world.single_process():
        return encoder.texts(captions)
