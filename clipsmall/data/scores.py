"""Embeddings and hashes of pairs for mining, stored next to shards as `NNNNN.scores.parquet`."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipsmall import __version__
from clipsmall.data.catalog import Catalog
from clipsmall.data.index import ShardError, proof, read_index, text_metadata
from clipsmall.data.order import Rows
from clipsmall.storage import atomic

VERSION = 1


class Scorer(NamedTuple):
    """The model that scored the pairs."""

    # name given by the user
    model: str
    pretrained: str
    # digest of its weights and image preprocessing
    digest: str
    # side of the input image in pixels
    image_size: int
    logit_scale: float
    logit_bias: float


class Scores(NamedTuple):
    """All n scored pairs of a catalog; they take 4 D bytes each in memory."""

    # (n,) rows of the catalog, ascending
    row: Rows
    # (n,) hashes of the images
    image_hash: Rows
    # (n, D), unit length
    image: NDArray[np.float16]
    # (n, D), unit length
    text: NDArray[np.float16]
    scorer: Scorer

    def features(self, places: Rows) -> NDArray[np.float32]:
        """(len(places), 2 D) image and text embeddings, concatenated.

        The inner product of two rows is the sum of the image cosine and the text cosine.
        """
        both = [self.image[places], self.text[places]]
        return np.concatenate(both, axis=1).astype(np.float32)


def sidecar(shard: Path, folder: Path | None = None) -> Path:
    """The path of a shard's scores: next to the shard, or in a folder of scores."""
    return (folder or shard.parent) / f"{shard.stem}.scores.parquet"


def write_scores(shard: Path, folder: Path | None, table: pa.Table, scorer: Scorer) -> None:
    """Write the sidecar of a shard atomically."""
    path = sidecar(shard, folder)
    metadata = {
        "clipsmall_scores": str(VERSION),
        "clipsmall": __version__,
        "tar_proof": proof(shard),
        "scorer": json.dumps(scorer._asdict()),
    }
    with atomic.new_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, use_dictionary=False)


def read_scores(shard: Path, folder: Path | None, columns: list[str]) -> tuple[pa.Table, Scorer]:
    """Read columns of a shard's sidecar, and check that it belongs to the shard's present content.

    Raises:
        ShardError: no sidecar, or one that is truncated, of another version, or older than the
            shard.
    """
    path = sidecar(shard, folder)
    again = "run: python -m data_tools.mine_shards score"
    if not path.exists():
        raise ShardError(f"{path}: {shard} has no scores; {again}")
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: cut or broken ({error}); {again}") from None
    metadata = text_metadata(table)
    if metadata.get("clipsmall_scores") != str(VERSION):
        raise ShardError(f"{path}: not scores of version {VERSION}; {again}")
    if metadata["tar_proof"] != proof(shard):
        raise ShardError(f"{path}: {shard} was replaced since it was scored; {again}")
    return table, Scorer(**json.loads(metadata["scorer"]))


def all_scores(catalog: Catalog, folder: Path | None = None) -> Scores:
    """The scores of all shards of a catalog, without pairs that have none (broken images).

    Raises:
        ShardError: a shard without usable scores, or scores of different models.
    """
    row = []
    image_hash = []
    image = []
    text = []
    first: Scorer | None = None
    # number of catalog rows in the preceding shards
    before = 0
    for shard, size in zip(catalog.shards, catalog.sizes, strict=True):
        if size == 0:
            continue
        table, scorer = read_scores(shard, folder, ["row", "image_hash", "image", "text"])
        first = first or scorer
        if scorer.digest != first.digest:
            raise ShardError(
                f"{sidecar(shard, folder)}: scored by {scorer.model} "
                f"(weights {scorer.digest[:8]}), others by {first.model} ({first.digest[:8]}); "
                "score them alike with: data_tools.mine_shards score --rescore"
            )
        good = good_rows(read_index(shard, ["status"]))
        rows = table["row"].to_numpy()
        # a pair may have been found bad since it was scored
        still_good = np.isin(rows, good)
        row.append(before + np.searchsorted(good, rows[still_good]))
        image_hash.append(table["image_hash"].to_numpy()[still_good])
        image.append(_matrix(table["image"])[still_good])
        text.append(_matrix(table["text"])[still_good])
        before += size
    # a catalog is never empty
    assert first is not None
    return Scores(
        row=np.concatenate(row),
        image_hash=np.concatenate(image_hash),
        image=np.concatenate(image),
        text=np.concatenate(text),
        scorer=first,
    )


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """A column of n lists of D numbers as an (n, D) array."""
    lists = column.combine_chunks()
    numbers = lists.flatten().to_numpy()
    found: NDArray[np.float16] = numbers.reshape(len(lists), lists.type.list_size)
    return found


def good_rows(index: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The rows of a shard's index that a catalog keeps, in its order."""
    return np.flatnonzero(index["status"].to_numpy() == "")
