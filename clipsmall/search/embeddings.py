"""Embeddings of all images and captions of a data set: made once, a shard at a time, and read from
then on.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from clipsmall.data import Catalog, caption_hash, read_index
from clipsmall.data.index import proof
from clipsmall.data.scores import good_rows
from clipsmall.evaluation import Encoder
from clipsmall.evaluation.shard_features import (
    encode_shard_images,
    encode_shard_texts,
    read_shard_captions,
)
from clipsmall.evaluation.top_k import refuse_non_finite
from clipsmall.search.store import EmbeddingStore, Part, alone


@dataclass
class StoredEmbeddings:
    """n captions, each with its image, over all parts: an image with five captions has five
    rows.
    """

    # (n_i, D) each, float16 unit rows, mapped from their files
    images: list[Tensor]
    texts: list[Tensor]
    # (n,)
    captions: pa.ChunkedArray
    # (n,) int64, ascending: the pair's row in the catalog
    rows: Tensor
    # images that cannot be read, and are not among these
    broken: int

    def distinct_images(self) -> Tensor:
        """(images,) the first row of each."""
        return torch.cat([torch.tensor([True]), self.rows.diff() != 0]).nonzero()[:, 0]

    def distinct_captions(self) -> Tensor:
        """(captions,) the first row of each; letter case and white space make no difference."""
        hashes = np.fromiter(
            (caption_hash(each.as_py()) for each in self.captions), np.int64, len(self.captions)
        )
        return torch.from_numpy(np.sort(np.unique(hashes, return_index=True)[1]))


def embed(encoder: Encoder, catalog: Catalog, folder: Path, model: str = "") -> StoredEmbeddings:
    """The embeddings of a catalog, from `folder`; what is missing there, or is of another model or
    shard, is made.

    Interrupt it at will: it goes on with the next shard.

    Args:
        model: its name, for the record.

    Raises:
        ValueError: a folder of something else, or that cannot be written; no image can be read;
            features that are not finite.
    """
    prints = [
        (shard.name, _fingerprint(catalog, number)) for number, shard in enumerate(catalog.shards)
    ]
    with alone(folder):
        store = EmbeddingStore(folder, model, encoder.digest(), prints)
        if store.note:
            print(f"{folder}: {store.note}; embedding anew", file=sys.stderr)
        missing = store.missing()
        for number in tqdm(
            missing, desc="embedding shards", disable=not (missing and encoder.progress)
        ):
            store.add(number, *_made(encoder, catalog, number))
        parts = [part for number in range(len(prints)) if (part := store.part(number))]
    assert len(parts) == len(prints)
    starts = np.cumsum([0, *catalog.sizes])
    rows = [
        part.table["row"].to_numpy() + start for part, start in zip(parts, starts, strict=False)
    ]
    if not sum(map(len, rows)):
        raise ValueError(f"{catalog.shards[0]} ...: none of {len(catalog)} images can be read")
    return StoredEmbeddings(
        images=[part.image for part in parts],
        texts=[part.text for part in parts],
        captions=pa.chunked_array(
            [chunk for part in parts for chunk in part.table["caption"].chunks]
        ),
        rows=torch.from_numpy(np.concatenate(rows)),
        broken=store.broken,
    )


def _fingerprint(catalog: Catalog, number: int) -> str:
    """Of a shard and of which pairs in it are good."""
    shard = catalog.shards[number]
    found = hashlib.sha256(f"{shard.name} {proof(shard)}".encode())
    found.update(catalog.only(number).spans.tobytes())
    return found.hexdigest()


def _made(encoder: Encoder, catalog: Catalog, number: int) -> tuple[Part, int]:
    """A shard's part, and how many of its images cannot be read."""
    shard = catalog.shards[number]
    image, found = encode_shard_images(encoder, catalog, number)
    captions = read_shard_captions(catalog, number, found.tolist())
    flat = [caption for each in captions for caption in each]
    text = encode_shard_texts(encoder, flat)
    refuse_non_finite(image, f"{shard}: image")
    refuse_non_finite(text, f"{shard}: text")
    counts = torch.tensor([len(each) for each in captions], dtype=torch.int64)
    rows = found.repeat_interleave(counts).numpy()
    index = read_index(shard, ["key", "status"])
    keys = index["key"].take(good_rows(index)[rows])
    columns = {
        "shard": [shard.name] * len(rows),
        "row": rows,
        "key": keys,
        "caption": pa.array(flat, pa.string()),
    }
    part = Part(image.half().repeat_interleave(counts, dim=0), text.half(), pa.table(columns))
    return part, catalog.sizes[number] - len(found)
