"""The index of one tar shard: position and hash of each sample's files, and which are unusable.

The index is stored next to the shard as `NAME.index.parquet`. It makes three things possible that
streaming a tar does not: random access (hence exact resume), noticing truncated shards before
training, and leaving out samples known to be bad.

A *member* is a file inside the tar. A *sample* is the group of members whose names are equal up to
the first dot.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from clipsmall.data.captions import caption_hash, captions_of, fields_of
from clipsmall.storage import atomic

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")
VERSION = 1
PROOF_BYTES = 64 << 10
# a longer caption or json is surely an error, and could exhaust memory
MAX_TEXT_BYTES = 1 << 20

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        # the pair's number in its json; -1 if there is none
        ("index", pa.int64()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("image_suffix", pa.string()),
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        # CLIP_benchmark's .cls file
        ("label_offset", pa.int64()),
        ("label_size", pa.int64()),
        # hash of the image's bytes
        ("sha256", pa.string()),
        # hash of the first caption
        ("caption_hash", pa.int64()),
        ("caption_chars", pa.int64()),
        # "" = usable; else the reason why the pair is left out
        ("status", pa.string()),
    ]
)


class ShardError(ValueError):
    """A shard or its index is unusable; the message names the file and says what to do."""


def image_hash(image: bytes) -> int:
    """Signed 64-bit hash of an encoded image: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "little", signed=True)


class Member(NamedTuple):
    """A file inside a tar."""

    name: str
    # where the content starts in the tar
    offset: int
    # bytes of content
    size: int


def text_metadata(table: pa.Table) -> dict[str, str]:
    """The metadata of a Parquet table, which is stored as bytes, as text."""
    raw = table.schema.metadata or {}
    return {key.decode(): value.decode() for key, value in raw.items()}


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.parquet")


def tar_members(shard: Path) -> list[Member]:
    """Every regular file of an uncompressed tar, in order, without links and directories.

    Raises:
        ShardError: not a complete tar. `tarfile` and webdataset would silently read a file that was
            truncated at or inside a header as a shorter tar.
    """
    size = shard.stat().st_size
    if size == 0:
        raise ShardError(f"{shard}: the file is empty; copy or make it again")
    members = []
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                end = info.offset_data
                if info.isreg():
                    # content is padded to whole blocks of 512 bytes
                    end += -(-info.size // 512) * 512
                if info.offset_data + info.size > size:
                    raise ShardError(
                        f"{shard}: truncated inside member {info.name!r}; copy or make it again"
                    )
                if info.isreg():
                    members.append(Member(info.name, info.offset_data, info.size))
    except tarfile.TarError as error:
        raise ShardError(
            f"{shard}: not an uncompressed tar, or truncated ({error}); copy or make it again"
        ) from None
    # a complete tar ends with an empty block
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(512) != b"\0" * 512:
            raise ShardError(
                f"{shard}: truncated after {len(members)} members (no end mark); "
                "copy or make it again"
            )
    return members


def group_members(members: list[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group members into samples, as webdataset does; yields each key with its members by suffix.

    Adjacent members belong to one sample if their paths are equal up to the first dot of the file
    name.
    """
    key = None
    group = dict[str, Member]()
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        # skip hidden files and webdataset's `__meta__` members
        if not stem or stem.startswith("__"):
            continue
        here = f"{folder}/{stem}" if folder else stem
        suffix = suffix.lower()
        if key is not None and (here != key or suffix in group):
            yield key, group
            group = {}
        key = here
        group[suffix] = member
    if key is not None:
        yield key, group


def _row(key: str, group: dict[str, Member], read: Callable[[Member], bytes]) -> dict[str, Any]:
    """One row of the index: a sample, its first image, and why it is unusable, if it is."""
    missing = Member("", -1, 0)
    suffix = next((each for each in IMAGE_SUFFIXES if each in group), "")
    image = group.get(suffix, missing)
    text = group.get("txt", missing)
    record = group.get("json", missing)
    label = group.get("cls", missing)
    fields, captions, status = _read_caption(text, record, read)
    if image.size == 0:
        status = "no image"
    number = fields.get("index", -1)
    # bool is a subclass of int, and JSON integers have no upper limit
    if type(number) is not int or not 0 <= number < 2**63:
        number = -1
    return {
        # names in a tar need not be UTF-8
        "key": key.encode("utf-8", "replace").decode(),
        "index": number,
        "image_offset": image.offset,
        "image_size": image.size,
        "image_suffix": suffix,
        "text_offset": text.offset,
        "text_size": text.size,
        "json_offset": record.offset,
        "json_size": record.size,
        "label_offset": label.offset,
        "label_size": label.size,
        "sha256": hashlib.sha256(read(image)).hexdigest() if image.size else "",
        "caption_hash": caption_hash(captions[0]) if captions else 0,
        "caption_chars": len(captions[0]) if captions else 0,
        "status": status,
    }


def _read_caption(
    text: Member, record: Member, read: Callable[[Member], bytes]
) -> tuple[dict[str, Any], list[str], str]:
    """The json's fields, the captions, and what is wrong with them ("" = nothing)."""
    fields = dict[str, Any]()
    captions = list[str]()
    if record.size > MAX_TEXT_BYTES or text.size > MAX_TEXT_BYTES:
        return fields, captions, "caption or json over 1 MiB"
    try:
        fields = fields_of(read(record) if record.size else b"")
        captions = captions_of(read(text) if text.size > 0 else b"", fields)
    except UnicodeDecodeError:
        return fields, captions, "caption is not UTF-8"
    except (ValueError, RecursionError):
        return fields, captions, "broken json"
    if captions:
        return fields, captions, ""
    return fields, captions, "no caption" if text.offset < 0 else "empty caption"


def proof(shard: Path) -> str:
    """sha256 of a shard's first, middle and last 64 KiB.

    The size is not enough to identify a tar, because tars are padded.
    """
    size = shard.stat().st_size
    offsets = (0, size // 2, max(size - PROOF_BYTES, 0))
    digest = hashlib.sha256()
    with shard.open("rb") as file:
        for offset in offsets:
            part = os.pread(file.fileno(), PROOF_BYTES, offset)
            digest.update(part)
    return digest.hexdigest()


def check_stats(shard: Path, samples: int) -> None:
    """Raises ShardError if img2dataset's `_stats.json` gives another number of samples."""
    stats = shard.with_name(f"{shard.stem}_stats.json")
    if not stats.exists():
        return
    promised = json.loads(stats.read_text()).get("successes")
    if promised not in (None, samples):
        raise ShardError(
            f"{shard}: holds {samples} samples, {stats.name} says {promised}; copy or make it again"
        )


def build_index(shard: Path) -> pa.Table:
    """Read a whole tar shard once and describe every sample in it.

    Raises:
        ShardError: not a tar, truncated, or with another number of samples than in img2dataset's
            `_stats.json`.
    """
    members = tar_members(shard)
    with shard.open("rb") as file:
        rows = [
            _row(key, group, lambda m: os.pread(file.fileno(), m.size, m.offset))
            for key, group in group_members(members)
        ]
    check_stats(shard, len(rows))
    metadata = {
        "clipsmall_index": str(VERSION),
        "tar_size": str(shard.stat().st_size),
        "tar_proof": proof(shard),
    }
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))


def write_index(shard: Path, table: pa.Table) -> Path:
    """Write the index table next to the shard, atomically."""
    path = index_path(shard)
    with atomic.new_file(path) as temporary:
        pq.write_table(table, temporary)
    return path


def read_index(shard: Path, columns: list[str] | None = None) -> pa.Table:
    """Read the index of a shard and check that it belongs to the shard's present content.

    Raises:
        ShardError: no shard, no index, an index of another version, or a shard that has changed.
    """
    path = index_path(shard)
    if not shard.exists():
        raise ShardError(f"{shard}: no such shard")
    if not path.exists():
        raise ShardError(
            f"{shard}: has no index; make it with: python -m data_tools.check_shards {shard.parent}"
        )
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            f"{path}: unreadable ({error}); delete it and run data_tools.check_shards"
        ) from None
    metadata = text_metadata(table)
    if metadata.get("clipsmall_index") != str(VERSION):
        raise ShardError(
            f"{path}: not a clipsmall index of version {VERSION}; "
            "run data_tools.check_shards --rebuild"
        )
    mend = f"restore it, or run: python -m data_tools.check_shards {shard.parent} --rebuild"
    size = shard.stat().st_size
    if size != int(metadata["tar_size"]):
        raise ShardError(
            f"{shard}: has {size} bytes, its index was made for {metadata['tar_size']}: "
            f"truncated or replaced; {mend}"
        )
    if metadata.get("tar_proof") != proof(shard):
        raise ShardError(f"{shard}: its index was made for another file of this name; {mend}")
    return table
