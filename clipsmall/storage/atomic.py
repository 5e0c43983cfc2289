"""Files and folders that appear whole under their name, or not at all.

Everything is written under a temporary name in the folder where it belongs, forced to the disk and
then renamed, which file systems do in one step. A reader sees the old content or the new one, never
half of it; an error removes what was begun. Only a killed process leaves something behind: a name
that begins with `.tmp-`, which readers ignore and `sweep` deletes.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PREFIX = ".tmp-"
# Of the final name, kept for whoever lists the folder. A name may have 255 bytes, a character 4.
NAME_CHARACTERS = 50


def _temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process or call uses; it keeps the ending."""
    unique = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}-"
    return path.with_name(unique + path.name[-NAME_CHARACTERS:])


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot flush a folder; their names are safe once written
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends without an error.

    Folders above it are made. A file of that name is replaced; on an error it stays as it was.

    Raises:
        OSError: no room, or no right to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    finally:
        # the error that led here says more than one about the clearing up
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty temporary folder to fill, which becomes `path` when the block ends without an error.

    Args:
        overwrite: delete a folder of that name just before; else only an empty one is replaced.

    Raises:
        OSError: no room, no right to write, or a folder of that name that is not empty.
    """
    temporary = _temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for part in sorted(temporary.rglob("*")):
            _flush_to_disk(part)
        _flush_to_disk(temporary)
        if overwrite and path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of bytes, whole or not at all. Raises OSError."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all. Raises OSError."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON with a newline at its end, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def move(path: Path, to: Path) -> None:
    """Rename a file or folder on the same disk."""
    os.replace(path, to)


def sweep(folder: Path) -> None:
    """Delete what killed processes left in a folder. No other process may be writing to it."""
    for leftover in folder.glob(f"{PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
