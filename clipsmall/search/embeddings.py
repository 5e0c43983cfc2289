"""Embeddings of a data set's images and captions: computed once, shard by shard, then reused."""

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
from clipsmall.search.store import EmbeddingStore, Part, lock_folder


@dataclass
class StoredEmbeddings:
    """n captions, each with its image; an image with five captions has five rows.

    The rows are divided into parts, one per shard of the data set.
    """

    # one (n_i, D) tensor per part: float16 unit rows, memory-mapped
    images: list[Tensor]
    texts: list[Tensor]
    # (n,)
    captions: pa.ChunkedArray
    # (n,) int64, ascending: the pair's row in the catalog
    rows: Tensor
    # number of images that cannot be read and so have no row
    broken: int

    def distinct_images(self) -> Tensor:
        """(images,) the first row of each image."""
        is_first = torch.cat([torch.tensor([True]), self.rows.diff() != 0])
        return is_first.nonzero()[:, 0]

    def distinct_captions(self) -> Tensor:
        """(captions,) the first row of each caption, ignoring letter case and white space."""
        # filled one by one, as a list of millions of Python numbers would be large
        hashes = np.empty(len(self.captions), np.int64)
        for row, caption in enumerate(self.captions):
            hashes[row] = caption_hash(caption.as_py())

        _, first_rows = np.unique(hashes, return_index=True)
        return torch.from_numpy(np.sort(first_rows))


def embed(encoder: Encoder, catalog: Catalog, folder: Path, model: str = "") -> StoredEmbeddings:
    """The embeddings of a catalog, kept in `folder`.

    Parts that are missing, or of another model or shard, are computed. After an interruption the
    next call continues with the next shard.

    Args:
        model: name of the model, for the record.

    Raises:
        ValueError: the folder holds other files or is not writable; no image can be read; or
            features are not finite.
    """
    fingerprints = []
    for number, shard in enumerate(catalog.shards):
        fingerprints.append((shard.name, _fingerprint(catalog, number)))

    with lock_folder(folder):
        store = EmbeddingStore(folder, model, encoder.digest(), fingerprints)
        if store.note:
            print(f"{folder}: {store.note}; embedding them again", file=sys.stderr)

        missing = store.missing()
        silent = not (missing and encoder.progress)
        for number in tqdm(missing, desc="embedding shards", disable=silent):
            store.add(number, *_embed_shard(encoder, catalog, number))

        parts = [part for number in range(len(fingerprints)) if (part := store.part(number))]

    assert len(parts) == len(fingerprints)
    # convert rows within a shard to rows of the catalog
    rows = []
    first_row = 0
    for part, size in zip(parts, catalog.sizes, strict=True):
        rows.append(part.table["row"].to_numpy() + first_row)
        first_row += size

    if not sum(map(len, rows)):
        raise ValueError(f"{catalog.shards[0]} ...: none of {len(catalog)} images can be read")

    caption_chunks = [chunk for part in parts for chunk in part.table["caption"].chunks]
    return StoredEmbeddings(
        images=[part.image for part in parts],
        texts=[part.text for part in parts],
        captions=pa.chunked_array(caption_chunks),
        rows=torch.from_numpy(np.concatenate(rows)),
        broken=store.broken,
    )


def _fingerprint(catalog: Catalog, number: int) -> str:
    """A digest of a shard and of which of its pairs are good."""
    shard = catalog.shards[number]
    identity = f"{shard.name} {proof(shard)}"
    digest = hashlib.sha256(identity.encode())

    # byte positions of the good pairs
    good = catalog.only(number).spans
    digest.update(good.tobytes())
    return digest.hexdigest()


def _embed_shard(encoder: Encoder, catalog: Catalog, number: int) -> tuple[Part, int]:
    """A shard's part, and the number of images that cannot be read.

    Raises:
        ValueError: features that are not finite.
    """
    shard = catalog.shards[number]
    image, found = encode_shard_images(encoder, catalog, number)
    captions_of = read_shard_captions(catalog, number, found.tolist())
    captions = [caption for of_image in captions_of for caption in of_image]
    text = encode_shard_texts(encoder, captions)
    refuse_non_finite(image, f"{shard}: image")
    refuse_non_finite(text, f"{shard}: text")

    # one row per caption of an image
    counts = torch.tensor([len(of_image) for of_image in captions_of], dtype=torch.int64)
    rows = found.repeat_interleave(counts).numpy()
    index = read_index(shard, ["key", "status"])
    keys = index["key"].take(good_rows(index)[rows])
    columns = {
        "shard": [shard.name] * len(rows),
        "row": rows,
        "key": keys,
        "caption": pa.array(captions, pa.string()),
    }
    repeated = image.half().repeat_interleave(counts, dim=0)
    part = Part(repeated, text.half(), pa.table(columns))
    return part, catalog.sizes[number] - len(found)
