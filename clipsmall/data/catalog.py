"""All shards of a data set as one table of pairs: which file, which bytes, which number, which
caption.
"""

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

# in a folder that make_shards fills: how many pairs there shall be
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


class Members(NamedTuple):
    """The raw bytes of one sample; b"" for a member that is not there."""

    image: bytes
    text: bytes
    json: bytes
    label: bytes


@dataclass
class Catalog:
    """N good pairs over several shards; a *row* is a pair's place in this table.

    Files are opened on first use and kept open, one descriptor a shard and process.
    """

    shards: list[Path]
    # (N,) which shard
    shard: NDArray[np.int32]
    # (N,) the pair's stable number
    index: NDArray[np.int64]
    # (N, 4, 2) offset and size of image, text, json, label
    spans: NDArray[np.int64]
    # (N,) of the first caption
    caption_hash: NDArray[np.int64]
    # reason -> pairs that the index knows to be bad
    left_out: dict[str, int]
    # of shard names, sizes and pair numbers
    fingerprint: str
    _files: dict[int, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def total(self) -> int:
        """Pairs in the shards, the bad ones among them."""
        return len(self) + sum(self.left_out.values())

    @property
    def sizes(self) -> list[int]:
        """Pairs in each shard."""
        return np.bincount(self.shard, minlength=len(self.shards)).tolist()  # type: ignore[no-any-return]

    def only(self, place: int) -> "Catalog":
        """One of the shards, with a descriptor of its own, to be closed: there may be more than a
        process may hold.
        """
        mine = self.shard == place
        return replace(
            self,
            shards=[self.shards[place]],
            shard=self.shard[mine] * 0,
            index=self.index[mine],
            spans=self.spans[mine],
            caption_hash=self.caption_hash[mine],
            _files={},
        )

    def read(self, row: int) -> Members:
        """The members of one pair, in one read: they lie side by side in the tar."""
        spans = self.spans[row]
        there = spans[spans[:, 0] >= 0]
        low = int(there[:, 0].min())
        high = int(there.sum(axis=1).max())
        data = self._bytes(row, low, high - low)
        return Members(*(data[o - low : o - low + n] if o >= 0 else b"" for o, n in spans.tolist()))

    def read_text(self, row: int) -> Members:
        """The same without the image, which is most of the bytes."""
        return Members(
            b"",
            *(self._bytes(row, o, n) if o >= 0 else b"" for o, n in self.spans[row, 1:].tolist()),
        )

    def _bytes(self, row: int, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor(int(self.shard[row])), size, offset)
        if len(data) < size:
            raise ShardError(
                f"{self.shards[self.shard[row]]}: ends before its index says; it was cut while in use"
            )
        return data

    def name(self, row: int) -> str:
        """For messages: shard and key of a pair (read from the index file, so not for hot
        paths).
        """
        shard = self.shards[self.shard[row]]
        table = read_index(shard, ["key", "image_offset"])
        place = int(np.flatnonzero(table["image_offset"].to_numpy() == self.spans[row, 0, 0])[0])
        return f"{shard}:{table['key'][place].as_py()}"

    def descriptor(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        # descriptors stay in the process that opened them
        return {**self.__dict__, "_files": {}}


def shard_paths(patterns: str | list[str]) -> list[Path]:
    """Folders, globs and `{000..123}` brace lists -> sorted tar paths.

    Raises:
        ShardError: a pattern that names no tar, a URL, a compressed tar.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise ShardError(
                f"{pattern}: not a local path; remote shards are read with data.streaming=true"
            )
        for name in braceexpand.braceexpand(pattern):
            here = (
                sorted(Path(name).glob("[!.]*.tar"))
                if Path(name).is_dir()
                else [Path(p) for p in sorted(glob(name))]
            )
            if not here:
                raise ShardError(f"{name}: no shards there (*.tar)")
            if lacking := unfinished(Path(name)):
                raise ShardError(
                    f"{name}: {lacking}; to use what is there name the tars themselves ({name}/*.tar)"
                )
            found += here
    if odd := [path for path in found if path.suffix != ".tar"]:
        raise ShardError(
            f"{odd[0]}: not a .tar; compressed shards cannot be read at random, unpack them first"
        )
    # named by two patterns, still there once
    return list(dict.fromkeys(found))


def unfinished(folder: Path) -> str:
    """What a folder lacks that make_shards has not filled; empty for a whole one, and for one that
    others made.
    """
    try:
        pairs = int(json.loads((folder / RECORD).read_text())["pairs"])
        there = sum(
            int(json.loads(stats.read_text())["count"])
            for stats in folder.glob("[0-9]*_stats.json")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return (
        f"make_shards has made {there} of {pairs} pairs: type its command again"
        if there < pairs
        else ""
    )


def _allow_files(shards: int) -> None:
    """Every process opens every shard in the course of an epoch; most systems allow 1,024 until
    asked for more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # with test sets, workers and libraries
    needed = 2 * shards + 256
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    most = max(soft, needed) if hard == resource.RLIM_INFINITY else hard
    if most < shards + 256:
        raise ShardError(
            f"{shards} shards, but a process may open {most} files here; allow more (ulimit -n {needed}), or make "
            "larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_catalog(patterns: str | list[str], captions: bool = True) -> Catalog:
    """Open the indexes of all shards, and leave out the pairs known to be bad (counted in
    `left_out`).

    `captions=False` keeps images without one, for classification sets that have labels only.

    A pair's number is what its json says, when all pairs have one and no two the same (make_shards
    writes it so); otherwise its place in the list of shards.

    Raises:
        ShardError: a shard is missing, has no index, has changed since it was indexed, or nothing
            good is left.
    """
    shards = shard_paths(patterns)
    _allow_files(len(shards))
    tables = [read_index(shard, COLUMNS) for shard in shards]
    sizes = [len(table) for table in tables]
    table = pa.concat_tables([t.replace_schema_metadata(None) for t in tables]).combine_chunks()
    status = table["status"].to_numpy(zero_copy_only=False)
    good = (
        (status == "")
        if captions
        else np.isin(status.astype(str), ["", "no caption", "empty caption"])
    )
    if not good.any():
        raise ShardError(f"{patterns}: no usable pair in {len(shards)} shards")
    index = table["index"].to_numpy()
    if (index < 0).any() or len(np.unique(index)) < len(index):
        index = np.arange(len(index), dtype=np.int64)
    spans = np.stack(
        [
            np.stack([table[f"{m}_offset"], table[f"{m}_size"]], axis=-1)
            for m in ("image", "text", "json", "label")
        ],
        axis=1,
    )
    reasons, counts = np.unique(status[~good].astype(str), return_counts=True)
    digest = hashlib.sha256(index[good].tobytes())
    for shard, each in zip(shards, tables, strict=True):
        digest.update(
            shard.name.encode()
            + each.schema.metadata[b"tar_size"]
            + each.schema.metadata[b"tar_proof"]
        )
    return Catalog(
        shards=shards,
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), sizes)[good],
        index=index[good],
        spans=spans[good],
        caption_hash=table["caption_hash"].to_numpy()[good],
        left_out=dict(zip(reasons.tolist(), counts.tolist(), strict=True)),
        fingerprint=digest.hexdigest(),
    )
