"""Shards whose pairs lie in the order of a plan: for loaders that read along, whole batches in each
shard.
"""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipsmall.data import Catalog, ShardError, captions_of, fields_of, read_index
from clipsmall.data.batch_plan import BatchPlan
from clipsmall.data.making.shard_writer import ShardSample, write_shard
from clipsmall.data.order import Rows
from clipsmall.data.scores import good_rows
from clipsmall.storage import atomic

RECORD = "repacked.json"


def repack(catalog: Catalog, plan: BatchPlan, out: Path, pairs_per_shard: int) -> int:
    """Write the plan's batches into new shards, but for those that a run with the same plan has
    finished.

    Images, captions, json fields and numbers of the pairs stay as they are; keys are new, and a
    `.cls` is left behind.

    Args:
        pairs_per_shard: rounded down to whole batches, one at least.

    Returns:
        The number of shards.

    Raises:
        ValueError: `out` holds other shards.
    """
    batches = max(pairs_per_shard // plan.rows.shape[1], 1)
    _claim(out, {"plan": plan.digest, "data": catalog.fingerprint, "batches_per_shard": batches})
    suffixes = _suffixes(catalog)
    starts = range(0, len(plan.rows), batches)
    for number, start in enumerate(tqdm(starts, desc="repack", unit="shard", disable=None)):
        rows = plan.rows[start : start + batches].reshape(-1)
        if not _finished(out, number, len(rows)):
            write_shard(out, number, _samples(catalog, rows, suffixes[rows]))
    return len(starts)


def _claim(out: Path, record: dict[str, object]) -> None:
    """Refuse a folder of other shards; note whose these are."""
    path = out / RECORD
    if path.exists():
        if path.read_text() != json.dumps(record):
            raise ValueError(
                f"{out}: holds shards of another plan, data set or size; choose another folder"
            )
    elif any(out.glob("*.tar")):
        raise ValueError(f"{out}: holds shards that were not made by repack; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    # without a newline: the text is compared as a whole
    atomic.write_text(path, json.dumps(record))


def _finished(out: Path, number: int, pairs: int) -> bool:
    """`_stats.json` is written last."""
    try:
        return (out / f"{number:05d}_stats.json").exists() and len(
            read_index(out / f"{number:05d}.tar")
        ) == pairs
    except ShardError:
        return False


def _suffixes(catalog: Catalog) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    """(N,) of the image files."""
    found = []
    for shard in catalog.shards:
        index = read_index(shard, ["image_suffix", "status"])
        found.append(index["image_suffix"].to_numpy()[good_rows(index)].astype("U4"))
    return np.concatenate(found)


def _samples(
    catalog: Catalog, rows: Rows, suffixes: np.ndarray[tuple[int], np.dtype[np.str_]]
) -> Iterator[ShardSample]:
    for row, suffix in zip(rows.tolist(), suffixes.tolist(), strict=True):
        members = catalog.read(row)
        fields = fields_of(members.json)
        width = fields.get("width")
        height = fields.get("height")
        if not (isinstance(width, int) and isinstance(height, int)):
            with Image.open(BytesIO(members.image)) as header:
                width, height = header.size
        captions = captions_of(members.text, fields)
        yield ShardSample(
            int(catalog.index[row]), members.image, suffix, captions, width, height, fields
        )
