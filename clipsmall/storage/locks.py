"""Locks on files: one process holds them, with the children that were handed the file, until the
last of these ends.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# seconds: somebody may just be looking
WAITS = (0.1, 0.2)


def take(file: IO[Any] | int) -> bool:
    """Lock an open file or folder; False if another process has it. A disk without locks (some
    network file systems)
    cannot tell: True."""
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
def alone(folder: Path, refusal: str) -> Iterator[None]:
    """Inside, no other process is inside with this folder. Raises ValueError, with the words of
    `refusal`, if one is; OSError for a folder that is not there."""
    place = os.open(folder, os.O_RDONLY)
    try:
        if not take(place):
            raise ValueError(f"{folder}: {refusal}")
        yield
    finally:
        os.close(place)


def held(path: Path) -> bool:
    """Whether a process has locked it. A disk without locks cannot tell: no."""
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
