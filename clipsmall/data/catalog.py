"""All shards of a data set as one table of pairs: file, bytes, number and caption of each."""

import hashlib
import json
import os
import resource
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipsmall.data.index import ShardError, read_index

# file in a folder made by make_shards; says how many pairs the finished folder has
RECORD = "make_shards.json"
COLUMNS = [
    "index",
    "image_offset",
    "image_size",
    "text_offset",
    "text_size",
    "json_offset",
    "json_size",
    "label_offset",
    "label_size",
    "caption_hash",
    "status",
]


class SampleBytes(NamedTuple):
    """The raw bytes of one sample's files; b"" for a missing file."""

    image: bytes
    text: bytes
    json: bytes
    label: bytes


@dataclass
class Catalog:
    """The N usable pairs of several shards; a *row* is a pair's position in this table.

    Shards are opened on first use and kept open: one file descriptor per shard and process.
    """

    shards: list[Path]
    # (N,) position in `shards` of each pair's shard
    shard: NDArray[np.int32]
    # (N,) each pair's stable number
    index: NDArray[np.int64]
    # (N, 4, 2) offset and size of image, text, json and label in the shard
    spans: NDArray[np.int64]
    # (N,) hash of each pair's first caption
    caption_hash: NDArray[np.int64]
    # number of pairs marked as bad in the indexes, by reason
    left_out: dict[str, int]
    # hash of shard names, sizes and pair numbers
    fingerprint: str
    _files: dict[int, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def total(self) -> int:
        """Number of pairs in the shards, including bad ones."""
        return len(self) + sum(self.left_out.values())

    @property
    def sizes(self) -> list[int]:
        """Number of usable pairs in each shard."""
        return np.bincount(self.shard, minlength=len(self.shards)).tolist()  # type: ignore[no-any-return]

    def only(self, number: int) -> "Catalog":
        """A catalog of one shard, given its position in `shards`.

        It opens a file descriptor of its own, which the caller must close, because there may be
        more shards than files that a process may open.
        """
        mine = self.shard == number
        return replace(
            self,
            shards=[self.shards[number]],
            shard=self.shard[mine] * 0,
            index=self.index[mine],
            spans=self.spans[mine],
            caption_hash=self.caption_hash[mine],
            _files={},
        )

    def read(self, row: int) -> SampleBytes:
        """The files of one pair, read at once because they are adjacent in the tar.

        Raises:
            ShardError: the shard was truncated while in use.
        """
        spans = self.spans[row]
        # an offset of -1 means that there is no such file
        there = spans[spans[:, 0] >= 0]
        low = int(there[:, 0].min())
        high = int(there.sum(axis=1).max())
        data = self._bytes(row, low, high - low)
        parts = []
        for offset, size in spans.tolist():
            begin = offset - low
            parts.append(data[begin : begin + size] if offset >= 0 else b"")
        return SampleBytes(*parts)

    def read_text(self, row: int) -> SampleBytes:
        """As `read`, but without the image, which has most of the bytes."""
        parts = []
        for offset, size in self.spans[row, 1:].tolist():
            parts.append(self._bytes(row, offset, size) if offset >= 0 else b"")
        return SampleBytes(b"", *parts)

    def _bytes(self, row: int, offset: int, size: int) -> bytes:
        shard = int(self.shard[row])
        data = os.pread(self.descriptor(shard), size, offset)
        if len(data) < size:
            raise ShardError(
                f"{self.shards[shard]}: shorter than its index says; it was truncated while in use"
            )
        return data

    def name(self, row: int) -> str:
        """Shard and key of a pair, for messages.

        Slow, because it reads the index file.
        """
        shard = self.shards[self.shard[row]]
        table = read_index(shard, ["key", "image_offset"])
        # the offset of its image identifies a pair within the shard
        offsets = table["image_offset"].to_numpy()
        found = int(np.flatnonzero(offsets == self.spans[row, 0, 0])[0])
        key = table["key"][found].as_py()
        return f"{shard}:{key}"

    def descriptor(self, shard: int) -> int:
        """The file descriptor of a shard, given its position in `shards`."""
        descriptor = self._files.get(shard)
        if descriptor is None:
            descriptor = os.open(self.shards[shard], os.O_RDONLY)
            self._files[shard] = descriptor
        return descriptor

    def __getstate__(self) -> dict[str, object]:
        # file descriptors belong to the process that opened them
        return {**self.__dict__, "_files": {}}


def shard_paths(patterns: str | list[str]) -> list[Path]:
    """Sorted paths of the tars that folders, globs and `{000..123}` brace lists name.

    Raises:
        ShardError: a pattern that names no tar, a URL, or a compressed tar.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    found: list[Path] = []
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise ShardError(
                f"{pattern}: not a local path; remote shards are read with data.streaming=true"
            )
        for name in braceexpand.braceexpand(pattern):
            found += _local_shards(name)
    for path in found:
        if path.suffix != ".tar":
            raise ShardError(
                f"{path}: not a .tar; compressed shards cannot be read at random, unpack them first"
            )
    # list a shard named by two patterns only once
    return list(dict.fromkeys(found))


def _local_shards(name: str) -> list[Path]:
    """The tars in a folder, or those that match a glob."""
    path = Path(name)
    if path.is_dir():
        # a leading dot marks temporary files of killed processes
        found = sorted(path.glob("[!.]*.tar"))
    else:
        found = [Path(match) for match in sorted(glob(name))]
    if not found:
        raise ShardError(f"{name}: no shards there (*.tar)")
    lacking = unfinished(path)
    if lacking:
        raise ShardError(
            f"{name}: {lacking}; to use these shards, name the tars themselves ({name}/*.tar)"
        )
    return found


def unfinished(folder: Path) -> str:
    """What is missing in a folder that make_shards has not finished.

    "" for a finished folder and for shards made by other programs.
    """
    try:
        pairs = int(json.loads((folder / RECORD).read_text())["pairs"])
        made = 0
        for stats in folder.glob("[0-9]*_stats.json"):
            made += int(json.loads(stats.read_text())["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if made >= pairs:
        return ""
    return f"make_shards has made {made} of {pairs} pairs: run the same command again"


def _allow_open_files(shards: int) -> None:
    """Raise the limit of open files so that every shard can be open; it is often only 1,024.

    In the course of an epoch, every process opens every shard.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # twice, because evaluation sets have shards, too; 256 for workers and libraries
    needed = 2 * shards + 256
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    most = max(soft, needed) if hard == resource.RLIM_INFINITY else hard
    if most < shards + 256:
        raise ShardError(
            f"{shards} shards, but a process may open {most} files here; allow more "
            f"(ulimit -n {needed}), or make larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_catalog(patterns: str | list[str], captions: bool = True) -> Catalog:
    """Read the indexes of all shards, and leave out the pairs marked as bad.

    A pair's number is taken from its json if every pair has a number and all are different (so
    make_shards writes them); otherwise it is the pair's position in the concatenated shards.

    Args:
        captions: True leaves out images without a caption; False keeps them, for classification
            sets with labels only.

    Raises:
        ShardError: a shard is missing, has no index, has changed since it was indexed, or no
            usable pair is left.
    """
    shards = shard_paths(patterns)
    _allow_open_files(len(shards))
    tables = [read_index(shard, COLUMNS) for shard in shards]
    sizes = [len(table) for table in tables]
    # drop the tables' metadata, which differs from shard to shard
    bare = [table.replace_schema_metadata(None) for table in tables]
    pairs = pa.concat_tables(bare).combine_chunks()
    status = pairs["status"].to_numpy(zero_copy_only=False)
    if captions:
        good = status == ""
    else:
        good = np.isin(status.astype(str), ["", "no caption", "empty caption"])
    if not good.any():
        raise ShardError(f"{patterns}: no usable pair in {len(shards)} shards")
    index = _pair_numbers(pairs)[good]
    reasons, counts = np.unique(status[~good].astype(str), return_counts=True)
    return Catalog(
        shards=shards,
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), sizes)[good],
        index=index,
        spans=_spans(pairs)[good],
        caption_hash=pairs["caption_hash"].to_numpy()[good],
        left_out=dict(zip(reasons.tolist(), counts.tolist(), strict=True)),
        fingerprint=_fingerprint(index, shards, tables),
    )


def _pair_numbers(pairs: pa.Table) -> NDArray[np.int64]:
    """(N,) numbers from the json files, or rows of the table if those are missing or repeated."""
    index: NDArray[np.int64] = pairs["index"].to_numpy()
    if (index < 0).any() or len(np.unique(index)) < len(index):
        return np.arange(len(index), dtype=np.int64)
    return index


def _spans(pairs: pa.Table) -> NDArray[np.int64]:
    """(N, 4, 2) offset and size of image, text, json and label."""
    found = []
    for member in ("image", "text", "json", "label"):
        columns = [pairs[f"{member}_offset"], pairs[f"{member}_size"]]
        found.append(np.stack(columns, axis=-1))
    return np.stack(found, axis=1)


def _fingerprint(index: NDArray[np.int64], shards: list[Path], tables: list[pa.Table]) -> str:
    """sha256 over the usable pairs and the shards' content; independent of the folder."""
    digest = hashlib.sha256(index.tobytes())
    for shard, table in zip(shards, tables, strict=True):
        digest.update(shard.name.encode())
        digest.update(table.schema.metadata[b"tar_size"])
        digest.update(table.schema.metadata[b"tar_proof"])
    return digest.hexdigest()
