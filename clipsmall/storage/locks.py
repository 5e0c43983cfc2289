"""Locks on files and folders, held until the process ends.

Child processes that inherit the open file also hold the lock; it is released when the last of them
ends.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# seconds between attempts: another process may hold the lock only to check it
WAITS = (0.1, 0.2)


def take(file: IO[Any] | int) -> bool:
    """Lock an open file or folder; False if another process holds the lock.

    Always True on a file system without locks, as some network file systems are.
    """
    for wait in (*WAITS, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(wait)
            continue
        except OSError:
            pass
        return True
    return False


@contextmanager
def exclusive(folder: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a folder during a `with` block.

    Raises:
        ValueError: another process holds the lock; the message is `refusal`.
        OSError: there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take(descriptor):
            raise ValueError(f"{folder}: {refusal}")
        yield
    finally:
        os.close(descriptor)


def held(path: Path) -> bool:
    """Whether a process has locked a file; always False on a file system without locks."""
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False
