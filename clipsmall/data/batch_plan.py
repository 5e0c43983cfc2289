"""The plan file: batches chosen before training, and the order in which they are read."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipsmall.data.catalog import Catalog
from clipsmall.data.index import ShardError, text_metadata
from clipsmall.data.order import Rows, permutation
from clipsmall.storage import atomic

VERSION = 1
# batches that are read ahead together; 120 MB for batches of 256 pairs of 30 kB
AHEAD = 16
MAKE = "make it with: python -m data_tools.mine_shards plan"


class BatchPlan(NamedTuple):
    """The m batches, of B pairs each, of a plan file."""

    # (m, B) rows of the catalog
    rows: Rows
    # sha256 of the file
    digest: str
    # how it was made
    about: dict[str, Any]


def write_plan(path: Path, pairs: Rows, fingerprint: str, about: dict[str, Any]) -> None:
    """Write a plan file atomically.

    Args:
        pairs: (m, B) numbers of pairs.
        fingerprint: fingerprint of the catalog that has these pairs.
        about: how the plan was made, for readers of the file.
    """
    column = pa.FixedSizeListArray.from_arrays(pa.array(pairs.reshape(-1)), pairs.shape[1])
    metadata = {
        "clipsmall_plan": str(VERSION),
        "fingerprint": fingerprint,
        "about": json.dumps(about),
    }
    table = pa.table({"pairs": column}).replace_schema_metadata(metadata)
    with atomic.new_file(path) as temporary:
        pq.write_table(table, temporary)


def read_plan(path: Path, catalog: Catalog, batch_size: int = 0) -> BatchPlan:
    """Read a plan file and check that it was made for this catalog.

    Args:
        batch_size: the batch size B that it must have; 0 = any.

    Raises:
        ShardError: no plan, a plan for another data set or batch size, or a plan with an unknown
            or repeated pair.
    """
    try:
        data = path.read_bytes()
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: cannot be read as a plan ({error}); {MAKE}") from None
    metadata = text_metadata(table)
    if metadata.get("clipsmall_plan") != str(VERSION):
        raise ShardError(f"{path}: not a plan of version {VERSION}; {MAKE}")
    if metadata["fingerprint"] != catalog.fingerprint:
        raise ShardError(
            f"{path}: made for other shards than those now in {catalog.shards[0].parent}; {MAKE}"
        )
    column = table["pairs"].combine_chunks()
    size = column.type.list_size
    if batch_size not in (0, size):
        raise ShardError(
            f"{path}: has batches of {size}, not data.batch_size={batch_size}; set that to {size}"
        )
    rows = _rows(path, column.flatten().to_numpy().reshape(-1, size), catalog)
    return BatchPlan(rows, hashlib.sha256(data).hexdigest(), json.loads(metadata["about"]))


def _rows(path: Path, pairs: Rows, catalog: Catalog) -> Rows:
    """(m, B) rows of the catalog, from (m, B) numbers of pairs."""
    # numbers need not be ascending in the catalog, so search in sorted order
    order = np.argsort(catalog.index)
    found = np.searchsorted(catalog.index, pairs, sorter=order)
    # a number larger than all others is clipped to the last row; the comparison below refuses it
    rows: Rows = order[found.clip(max=len(order) - 1)]
    unknown = catalog.index[rows] != pairs
    if unknown.any():
        raise ShardError(
            f"{path}: names pair {pairs[unknown][0]}, which is not in the shards; {MAKE}"
        )
    numbers, counts = np.unique(pairs, return_counts=True)
    twice = numbers[counts > 1]
    if len(twice):
        raise ShardError(f"{path}: has pair {twice[0]} twice; {MAKE}")
    return rows


class PlannedOrder:
    """The batches of a plan in random order, shuffled again each epoch; the pairs in them stay.

    Used in place of `Order`; like it, a pure function of (plan, seed, epoch, position). Its window,
    the unit of reading ahead, is AHEAD batches.

    Args:
        plan: (m, B) rows of the catalog.
        seed: seed of the order of batches.
    """

    def __init__(self, plan: Rows, seed: int) -> None:
        self._plan = plan
        self.seed = seed
        self.length = plan.size
        self.window = AHEAD * plan.shape[1]

    def rows(self, epoch: int, positions: Rows) -> Rows:
        """(n,) rows of the catalog at (n,) positions within an epoch, each in [0, length)."""
        batch, slot = np.divmod(positions, self._plan.shape[1])
        order = permutation(len(self._plan), self.seed, epoch)
        found: Rows = self._plan[order[batch], slot]
        return found

    def window_blocks(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """The pieces (first row, number of rows) that a window reads, in the order on disk.

        Here every piece is a single pair.
        """
        low = window * self.window
        high = min((window + 1) * self.window, self.length)
        positions = np.arange(low, max(low, high))
        rows = np.sort(self.rows(epoch, positions))
        return [(row, 1) for row in rows.tolist()]
