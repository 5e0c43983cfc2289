"""Tar shards from anywhere, read forward: what a pattern names, and the members of each tar."""

import re
import tarfile
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import braceexpand
import fsspec
from webdataset.tariterators import base_plus_ext

from clipsmall.data.catalog import shard_paths
from clipsmall.data.index import IMAGE_SUFFIXES, MAX_TEXT_BYTES, ShardError

# a larger member is a mistake, and reading it into memory a risk
MAX_IMAGE_BYTES = 256 << 20
# seconds without a byte after which an http server counts as gone
SILENCE = 60.0
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4")
# a member or, grouped, a pair, as webdataset passes them on
Sample = dict[str, Any]


def shown(url: str) -> str:
    """A URL as it may be printed: without its query and user, where signatures and passwords
    stand.
    """
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0]) if "://" in url else url


def shard_urls(patterns: str | list[str]) -> list[str]:
    """Brace lists of URLs, globs of listable stores (`hf://`, `s3://`), local folders, globs and
    brace lists.

    Raises:
        ShardError: nothing there, a compressed tar, a store whose package is not installed, or a
            `pipe:`, which would run a shell.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.lstrip().startswith("pipe:"):
            raise ShardError(f"{pattern}: shell pipes are never run; give the URL itself")
        for name in braceexpand.braceexpand(pattern):
            found += _stored(name) if "://" in name else map(str, shard_paths(name))
    if not found:
        raise ShardError("no shards given: name folders, globs or URLs in data.train")
    return found


def _stored(url: str) -> list[str]:
    web = url.startswith(("http://", "https://"))
    if urlsplit(url).path.endswith(COMPRESSED):
        raise ShardError(f"{shown(url)}: compressed shards are not read; store them as plain .tar")
    if web and "*" in url:
        raise ShardError(
            f"{shown(url)}: a web server lists no files; name them as a brace list, {{00000..00123}}.tar"
        )
    if web:
        return [url]
    try:
        store, path = fsspec.core.url_to_fs(url)
        names = (
            [store.unstrip_protocol(name) for name in sorted(store.glob(path))]
            if "*" in url
            else [url]
        )
    except (ImportError, ValueError, OSError) as error:
        raise ShardError(f"{shown(url)}: cannot be opened: {error}") from None
    if not names:
        raise ShardError(f"{shown(url)}: no shards there")
    return names


def open_shard(url: str) -> Any:
    """A binary file. http(s) by the standard library: fsspec's needs aiohttp, and seeks where we
    only read on.
    """
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=SILENCE)
    return fsspec.open(url, "rb", expand=False).open() if "://" in url else open(url, "rb")


class _Tape:
    """A file read forward in whole pieces, whose last piece stays known: `tarfile` hides how an
    archive ended.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.piece = b""
        self.start = 0

    def read(self, size: int) -> bytes:
        parts = [self.file.read(size)]
        while parts[-1] and (missing := size - sum(map(len, parts))):
            parts.append(self.file.read(missing))
        self.start += len(self.piece)
        self.piece = b"".join(parts)
        return self.piece

    def has_end_mark(self, offset: int) -> bool:
        return self.piece[offset - self.start :][:512] == b"\0" * 512


def members(file: Any, url: str) -> Iterator[Sample]:
    """The image, txt and json members of a tar stream: name, bytes (None = over the size limit),
    URL of the tar.

    Others are not read: webdataset's own reader takes members of any size and calls a cut tar a
    whole one.

    Raises:
        tarfile.ReadError: it does not end with an end mark; whatever the file raises.
    """
    tape: Any = _Tape(file)
    with tarfile.open(fileobj=tape, mode="r|") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else every header of the shard is kept
            stem, suffix = base_plus_ext(info.name)
            if not info.isreg() or stem is None or stem.rpartition("/")[2].startswith("__"):
                continue
            kind = suffix.lower()
            if kind not in (*IMAGE_SUFFIXES, "txt", "json"):
                continue
            fits = info.size <= (MAX_IMAGE_BYTES if kind in IMAGE_SUFFIXES else MAX_TEXT_BYTES)
            content = tar.extractfile(info) if fits else None
            data = content.read() if content else None
            yield {"fname": info.name, "data": data, "__url__": url}
        if not tape.has_end_mark(tar.offset):
            raise tarfile.ReadError("no end mark")
