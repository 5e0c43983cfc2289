"""The plan file: batches chosen before training, and the order that plays them."""

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
# batches that are read ahead together: with 256 pairs of 30 kB each 120 MB
AHEAD = 16
MAKE = "make it with: python -m data_tools.mine_shards plan"


class BatchPlan(NamedTuple):
    """m batches of B pairs."""

    # (m, B), of the catalog
    rows: Rows
    # sha256 of the file
    digest: str
    # how it was made
    about: dict[str, Any]


def write_plan(path: Path, pairs: Rows, fingerprint: str, about: dict[str, Any]) -> None:
    """Write a plan file, whole or not at all.

    Args:
        pairs: (m, B) numbers of pairs.
        fingerprint: of the catalog that has these pairs.
        about: how the plan was made, for whoever reads the file.
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
    """The plan in a file, after checking that it is one for this catalog.

    Args:
        batch_size: B that it must have; 0 = any.

    Raises:
        ShardError: no plan, another data set's, another batch size, a pair that is not there, or
            there twice.
    """
    try:
        data = path.read_bytes()
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: no plan can be read there ({error}); {MAKE}") from None
    metadata = text_metadata(table)
    if metadata.get("clipsmall_plan") != str(VERSION):
        raise ShardError(f"{path}: not a plan of version {VERSION}; {MAKE}")
    if metadata["fingerprint"] != catalog.fingerprint:
        raise ShardError(
            f"{path}: a plan for other shards than {catalog.shards[0].parent} holds now; {MAKE}"
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
    """(m, B) numbers of pairs -> their rows in the catalog."""
    # numbers need not be in order in the catalog: search them sorted
    order = np.argsort(catalog.index)
    found = np.searchsorted(catalog.index, pairs, sorter=order)
    # a number beyond the last one is found at the end, and compared below
    rows: Rows = order[found.clip(max=len(order) - 1)]
    unknown = catalog.index[rows] != pairs
    if unknown.any():
        raise ShardError(
            f"{path}: names pair {pairs[unknown][0]}, which the shards do not have; {MAKE}"
        )
    numbers, counts = np.unique(pairs, return_counts=True)
    twice = numbers[counts > 1]
    if len(twice):
        raise ShardError(f"{path}: has pair {twice[0]} twice; {MAKE}")
    return rows


class PlannedOrder:
    """The batches of a plan, in another order each epoch; the pairs of a batch stay the same.

    Used in place of `Order`, and like it a pure function of (plan, seed, epoch, position). Its
    window, the unit of reading ahead, is AHEAD batches.

    Args:
        plan: (m, B) rows of the catalog.
        seed: of the order of the batches.
    """

    def __init__(self, plan: Rows, seed: int) -> None:
        self._plan = plan
        self.seed = seed
        self.length = plan.size
        self.window = AHEAD * plan.shape[1]

    def rows(self, epoch: int, positions: Rows) -> Rows:
        """(n,) positions within an epoch, each in [0, length) -> (n,) rows of the data set."""
        batch, slot = np.divmod(positions, self._plan.shape[1])
        order = permutation(len(self._plan), self.seed, epoch)
        found: Rows = self._plan[order[batch], slot]
        return found

    def window_blocks(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """The (first row, number of rows) pieces that a window reads, in the order of the disk.

        Here a piece is a single pair.
        """
        low = window * self.window
        high = min((window + 1) * self.window, self.length)
        positions = np.arange(low, max(low, high))
        rows = np.sort(self.rows(epoch, positions))
        return [(row, 1) for row in rows.tolist()]
