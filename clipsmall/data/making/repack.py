"""Shards whose pairs lie in the order of a plan, for loaders that read shards front to back."""

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


def repack_shards(catalog: Catalog, plan: BatchPlan, out: Path, pairs_per_shard: int) -> int:
    """Write the plan's batches into new shards, except for those that a run with the same plan has
    finished. Each shard holds whole batches.

    Images, captions, json fields and numbers of the pairs stay as they are; keys are new, and a
    `.cls` is not copied.

    Args:
        pairs_per_shard: rounded down to whole batches, one at least.

    Returns:
        The number of shards.

    Raises:
        ValueError: `out` holds other shards.
    """
    batches = max(pairs_per_shard // plan.rows.shape[1], 1)
    record = {
        "plan": plan.digest,
        "data": catalog.fingerprint,
        "batches_per_shard": batches,
    }
    _claim(out, record)
    suffixes = _suffixes(catalog)
    starts = range(0, len(plan.rows), batches)
    bar = tqdm(starts, desc="repack", unit="shard", disable=None)
    for number, start in enumerate(bar):
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
    """Whether an earlier run has written a whole shard."""
    # its stats are written last
    if not (out / f"{number:05d}_stats.json").exists():
        return False
    try:
        index = read_index(out / f"{number:05d}.tar")
    except ShardError:
        return False
    return len(index) == pairs


def _suffixes(catalog: Catalog) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    """(N,) suffixes of the image files."""
    found = []
    for shard in catalog.shards:
        index = read_index(shard, ["image_suffix", "status"])
        suffixes = index["image_suffix"].to_numpy()[good_rows(index)]
        found.append(suffixes.astype("U4"))
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
