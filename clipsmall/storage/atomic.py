"""Atomic writes: a file or folder appears complete under its name, or not at all.

Everything is written under a temporary name in the same folder, flushed to disk and then renamed,
which file systems do in one step. A reader sees either the old or the new content. After an error
the temporary file is removed. Only a killed process leaves one behind; its name begins with
`.tmp-`, which readers ignore, and `sweep` deletes it.
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
# Characters of the final name kept in the temporary one, for people who list the folder. A name
# may have 255 bytes, and a character up to 4.
NAME_CHARACTERS = 50


def _temporary_name(path: Path) -> Path:
    """A unique name in the folder of `path`, with the same suffix."""
    unique = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}-"
    return path.with_name(unique + path.name[-NAME_CHARACTERS:])


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot flush a folder, but store names at once
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends without an error.

    Parent folders are created. An existing file is replaced, or kept unchanged after an error.

    Raises:
        OSError: the disk is full, or the path is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    finally:
        # do not let an error during clean-up hide the original one
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty temporary folder to fill, which becomes `path` when the block ends without an error.

    Args:
        overwrite: first delete an existing folder; else only an empty one may be replaced.

    Raises:
        OSError: the disk is full, the path is not writable, or a non-empty folder exists there.
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
    """Write a file of bytes atomically. Raises OSError."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Raises OSError."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON with a final newline, atomically. Raises OSError."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def move(path: Path, to: Path) -> None:
    """Rename a file or folder on the same disk."""
    os.replace(path, to)


def sweep(folder: Path) -> None:
    """Delete the temporary files of killed processes. No other process may be writing there."""
    for leftover in folder.glob(f"{PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
