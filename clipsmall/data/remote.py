"""Tar shards on any server, read forward: which ones a pattern names, and what a tar holds."""

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

# a larger file is surely an error, and could exhaust memory
MAX_IMAGE_BYTES = 256 << 20
# seconds without a byte after which an http server counts as gone
SILENCE = 60.0
WEB = ("http://", "https://")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4")
# a file or, after grouping, a pair, as webdataset represents them
Sample = dict[str, Any]


def printable_url(url: str) -> str:
    """A URL without its query and user, which may hold signatures and passwords."""
    if "://" not in url:
        return url
    without_query = url.partition("?")[0]
    return re.sub(r"//[^/@]*@", "//", without_query)


def shard_urls(patterns: str | list[str]) -> list[str]:
    """Brace lists of URLs, globs of listable stores (`hf://`, `s3://`), local folders, globs and
    brace lists.

    Raises:
        ShardError: nothing there, a compressed tar, a store whose package is not installed, or a
            `pipe:`, which would run a shell.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    found: list[str] = []
    for pattern in patterns:
        if pattern.lstrip().startswith("pipe:"):
            raise ShardError(f"{pattern}: shell pipes are never run; give the URL itself")
        for name in braceexpand.braceexpand(pattern):
            if "://" in name:
                found += _remote_shards(name)
            else:
                found += map(str, shard_paths(name))
    if not found:
        raise ShardError("no shards given: name folders, globs or URLs in data.train")
    return found


def _remote_shards(url: str) -> list[str]:
    """The URLs that a URL, perhaps with a `*`, stands for."""
    name = printable_url(url)
    if urlsplit(url).path.endswith(COMPRESSED):
        raise ShardError(f"{name}: compressed shards are not read; store them as plain .tar")
    if url.startswith(WEB):
        if "*" in url:
            raise ShardError(
                f"{name}: a web server lists no files; name them as a brace list, "
                "{00000..00123}.tar"
            )
        return [url]
    try:
        # finds out whether the store's package is there, too
        store, path = fsspec.core.url_to_fs(url)
        if "*" not in url:
            return [url]
        found = [store.unstrip_protocol(each) for each in sorted(store.glob(path))]
    except (ImportError, ValueError, OSError) as error:
        raise ShardError(f"{name}: cannot be opened: {error}") from None
    if not found:
        raise ShardError(f"{name}: no shards there")
    return found


def open_shard(url: str) -> Any:
    """A binary file to read forward."""
    if url.startswith(WEB):
        # fsspec would need aiohttp, and seek where we only read on
        return urllib.request.urlopen(url, timeout=SILENCE)
    if "://" in url:
        return fsspec.open(url, "rb", expand=False).open()
    return open(url, "rb")


class _Tape:
    """A file read forward in whole pieces, which remembers the last piece.

    `tarfile` does not say how an archive ended: whether its end mark came or the bytes stopped.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.piece = b""
        self.start = 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        # a socket may return fewer bytes than requested
        while 0 < len(data) < size:
            more = self.file.read(size - len(data))
            if not more:
                break
            data += more
        self.start += len(self.piece)
        self.piece = data
        return self.piece

    def has_end_mark(self, offset: int) -> bool:
        """Whether the tar's last piece holds an empty block of 512 bytes at this offset."""
        return self.piece[offset - self.start :][:512] == b"\0" * 512


def stream_members(file: Any, url: str) -> Iterator[Sample]:
    """The image, txt and json files in a tar stream, as webdataset passes them on.

    Other files are not read. webdataset's own reader would read files of any size into memory, and
    take a cut tar for a whole one.

    Yields:
        `fname`; `data`, bytes, or None for a file over the size limit; `__url__` of the tar.

    Raises:
        tarfile.ReadError: it does not end with an end mark.
        Exception: whatever the file raises.
    """
    tape: Any = _Tape(file)
    with tarfile.open(fileobj=tape, mode="r|") as tar:
        while (info := tar.next()) is not None:
            # otherwise tarfile keeps every header of the shard in memory
            tar.members = []  # type: ignore[attr-defined]
            stem, suffix = base_plus_ext(info.name)
            # webdataset's own notes begin with "__"
            if not info.isreg() or stem is None or stem.rpartition("/")[2].startswith("__"):
                continue
            kind = suffix.lower()
            if kind in IMAGE_SUFFIXES:
                most = MAX_IMAGE_BYTES
            elif kind in ("txt", "json"):
                most = MAX_TEXT_BYTES
            else:
                continue
            content = tar.extractfile(info) if info.size <= most else None
            data = content.read() if content else None
            yield {"fname": info.name, "data": data, "__url__": url}
        if not tape.has_end_mark(tar.offset):
            raise tarfile.ReadError("no end mark")
