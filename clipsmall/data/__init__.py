"""WebDataset shards: an index for random access, the order of pairs, and decoded batches."""

from clipsmall.data.batch_plan import PlannedOrder, read_plan
from clipsmall.data.captions import caption_hash, captions_of, fields_of
from clipsmall.data.catalog import Catalog, open_catalog, shard_paths
from clipsmall.data.index import (
    ShardError,
    build_index,
    check_stats,
    index_path,
    read_index,
    write_index,
)
from clipsmall.data.loader import batch_loader, outlive_the_signal
from clipsmall.data.order import Order
from clipsmall.data.reader import GlobalBatches, LoadedBatch, Skips
from clipsmall.data.streaming import StreamedBatches

__all__ = [
    "Catalog",
    "GlobalBatches",
    "LoadedBatch",
    "Order",
    "PlannedOrder",
    "ShardError",
    "Skips",
    "StreamedBatches",
    "batch_loader",
    "build_index",
    "caption_hash",
    "captions_of",
    "check_stats",
    "fields_of",
    "index_path",
    "open_catalog",
    "outlive_the_signal",
    "read_index",
    "read_plan",
    "shard_paths",
    "write_index",
]
