"""Where image bytes come from: a folder, a zip (never unpacked), or a `datasets` table."""

import hashlib
import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from clipsmall.data.preprocess import BadImage

if TYPE_CHECKING:
    from datasets import Dataset

# larger "images" are mistakes or zip bombs
MAX_FILE_BYTES = 256 << 20
TOO_LARGE = "file over 256 MiB"
MISSING = "no such image file"
UNREADABLE = "file cannot be read"
# a path within the store, or a row's number
Place = str | int


class ImageStore(Protocol):
    """Image bytes by place. Stores travel to worker processes, so they hold no open files."""

    def names(self) -> list[str]:
        """Every file in the store, sorted; [] where places are numbers."""
        ...

    def read(self, place: Place) -> bytes:
        """The bytes of one file. Raises BadImage when it is missing, too large or unreadable."""
        ...

    def fingerprint(self) -> str:
        """Changes when the store's content does, as far as that is cheap to know."""
        ...


def _is_visible(name: str) -> bool:
    """Neither hidden nor what macOS adds to a zip."""
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


@dataclass(frozen=True)
class FolderStore:
    """Files under `root`; places are paths relative to it, or absolute."""

    root: Path

    def names(self) -> list[str]:
        found = list[str]()
        seen = set[str]()
        for at, folders, files in os.walk(self.root, followlinks=True):
            # a link that leads back, or twice to one place
            real = os.path.realpath(at)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            found += (Path(at, name).relative_to(self.root).as_posix() for name in files)
        return sorted(filter(_is_visible, found))

    def read(self, place: Place) -> bytes:
        path = self.root / str(place)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadImage(MISSING) from None
        except (OSError, ValueError):
            # ValueError: a NUL in the name
            raise BadImage(UNREADABLE) from None
        if len(data) > MAX_FILE_BYTES:
            raise BadImage(TOO_LARGE)
        return data

    def fingerprint(self) -> str:
        # a stat of every file would cost minutes on millions
        return "folder"


@lru_cache(maxsize=2)
def _open_zip(path: Path, size: int, changed: int) -> zipfile.ZipFile:
    """One handle per process: reading the directory of a large zip takes seconds."""
    return zipfile.ZipFile(path)


@dataclass(frozen=True)
class ZipStore:
    """Members of a zip, read one at a time into memory."""

    path: Path

    def _zip(self) -> zipfile.ZipFile:
        stat = self.path.stat()
        try:
            return _open_zip(self.path, stat.st_size, stat.st_mtime_ns)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: not a whole zip ({error}); copy it again") from None

    def names(self) -> list[str]:
        files = [member.filename for member in self._zip().infolist() if not member.is_dir()]
        return sorted(filter(_is_visible, files))

    def read(self, place: Place) -> bytes:
        archive = self._zip()
        try:
            member = archive.getinfo(str(place).removeprefix("./"))
            # zipfile itself stops at the size that the directory claims
            if member.file_size > MAX_FILE_BYTES:
                raise BadImage(TOO_LARGE)
            return archive.read(member)
        except KeyError:
            raise BadImage(MISSING) from None
        except (
            OSError,
            EOFError,
            RuntimeError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
        ):
            # wrong checksum, encrypted, unknown compression
            raise BadImage(UNREADABLE) from None

    def fingerprint(self) -> str:
        members = self._zip().infolist()
        listing = [(member.filename, member.file_size, member.CRC) for member in members]
        return f"zip {hashlib.sha256(repr(listing).encode()).hexdigest()}"


@dataclass(frozen=True)
class DatasetStore:
    """One column of a `datasets.Dataset` holding bytes, or `{bytes, path}`; places are row
    numbers.
    """

    dataset: "Dataset"
    column: str

    def names(self) -> list[str]:
        return []

    def read(self, place: Place) -> bytes:
        value: Any = self.dataset[int(place)][self.column]
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            # of a data set that keeps its images in files
            if value is None and path:
                value = FolderStore(Path()).read(path)
        if not isinstance(value, bytes):
            raise BadImage(MISSING)
        if len(value) > MAX_FILE_BYTES:
            raise BadImage(TOO_LARGE)
        return value

    def fingerprint(self) -> str:
        return f"dataset {self.dataset._fingerprint}"


def open_store(path: Path) -> FolderStore | ZipStore:
    """A folder or a zip of images.

    Raises:
        ValueError: neither of them.
    """
    if path.is_dir():
        return FolderStore(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ZipStore(path)
    reason = "neither a folder nor a zip" if path.exists() else "no such file or folder"
    raise ValueError(f"{path}: {reason}")
