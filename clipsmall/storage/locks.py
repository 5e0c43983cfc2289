"""Locks on files and folders, held until the process ends.

Children that inherit the open file hold the lock, too: it ends with the last of them.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# seconds between tries: another process may only be looking
WAITS = (0.1, 0.2)


def take(file: IO[Any] | int) -> bool:
    """Lock an open file or folder; False if another process has it.

    True, too, on a disk without locks (some network file systems), which cannot tell.
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
    """Hold the lock of a folder for the block.

    Raises:
        ValueError: another process holds it; the message is `refusal`.
        OSError: the folder is not there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take(descriptor):
            raise ValueError(f"{folder}: {refusal}")
        yield
    finally:
        os.close(descriptor)


def held(path: Path) -> bool:
    """Whether a process has locked a file; False on a disk without locks, which cannot tell."""
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
