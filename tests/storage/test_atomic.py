"""Whatever happens while a file or folder is written, its name holds the old content or the new."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipsmall.data import shard_paths
from clipsmall.storage import atomic
from tests import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half_a_file(path: Path, error: type[BaseException]) -> None:
    with atomic.new_file(path) as temporary:
        temporary.write_text("half")
        raise error


def fill_half_a_folder(folder: Path, error: Exception) -> None:
    with atomic.new_folder(folder, overwrite=True) as new:
        (new / "inner").mkdir()
        (new / "inner" / "half").touch()
        raise error


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    atomic.write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    atomic.write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    atomic.write_bytes(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert names(path.parent) == ["a.json"]


def test_while_it_is_written_the_old_file_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic.new_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        # libraries add an ending to a name that lacks it
        assert temporary.suffix == ".txt"
        assert temporary.parent == tmp_path
    assert path.read_text() == "half"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_half_a_file(path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_before_a_byte_is_written_is_the_one_that_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first"), atomic.new_file(tmp_path / "a.txt"):
        raise ValueError("first")
    assert names(tmp_path) == []


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(ValueError, match="half"):
        fill_half_a_folder(folder, ValueError("half"))
    assert names(tmp_path) == ["a"]
    assert names(folder) == ["old"]


def test_a_folder_is_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "a"
    with atomic.new_folder(folder) as new:
        (new / "inner").mkdir()
        (new / "inner" / "one").touch()
    assert names(folder) == ["inner"]
    with pytest.raises(OSError, match="not empty"), atomic.new_folder(folder) as new:
        (new / "two").touch()
    assert names(folder) == ["inner"]
    with atomic.new_folder(folder, overwrite=True) as new:
        (new / "two").touch()
    assert names(folder) == ["two"]
    assert names(folder.parent) == ["a"]


def test_a_name_of_any_allowed_length_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 251 + ".txt", "é" * 125 + ".txt"):
        atomic.write_text(tmp_path / name, "a")
        assert (tmp_path / name).read_text() == "a"


# Writes 1 MiB of its own letter, again and again, until half a second is over.
WRITER = """
import sys, time
from pathlib import Path
from clipsmall.storage import atomic
end = time.monotonic() + 0.5
while time.monotonic() < end:
    atomic.write_text(Path(sys.argv[1]), sys.argv[2] * (1 << 20))
"""


def test_two_processes_that_write_one_name_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter], cwd=ROOT)
        for letter in "ab"
    ]
    seen = set[str]()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert text in ("a" * (1 << 20), "b" * (1 << 20))
            seen.add(text[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(path: Path, *arguments: object, **options: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", full)
    for write in (atomic.write_json, atomic.write_text):
        with pytest.raises(OSError, match="No space left"):
            write(path, "new")
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_at_the_flush_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    # network file systems say only then that there is no room
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(path, "new")
    with pytest.raises(OSError, match="No space left"), atomic.new_folder(tmp_path / "b") as new:
        (new / "one").touch()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_disk_that_cannot_flush_a_folder_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr("os.fsync", files_only)
    atomic.write_text(tmp_path / "a.txt", "a")
    with atomic.new_folder(tmp_path / "b") as new:
        (new / "one").touch()
    assert names(tmp_path) == ["a.txt", "b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from clipsmall.storage import atomic
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
stage, folder = sys.argv[1], Path(sys.argv[2])
if stage == "rename":
    os.replace = die
if stage == "folder":
    with atomic.new_folder(folder / "b", overwrite=True) as new:
        (new / "one").write_text("half")
        die()
with atomic.new_file(folder / "a.tar") as temporary:
    temporary.write_text("half")
    if stage == "file":
        die()
"""


@pytest.mark.parametrize("stage", ["file", "rename", "folder"])
def test_a_kill_leaves_the_old_content_and_a_name_that_is_ignored_and_swept(
    tmp_path: Path, stage: str
) -> None:
    (tmp_path / "a.tar").write_text("old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, stage, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.tar").read_text() == "old"
    assert names(tmp_path / "b") == ["old"]
    leftover, *others = names(tmp_path)
    assert leftover.startswith(".tmp-")
    assert others == ["a.tar", "b"]
    assert shard_paths(str(tmp_path)) == [tmp_path / "a.tar"]
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["a.tar", "b"]


def test_leftovers_of_older_names_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-4711-00001.tar").touch()
    (tmp_path / ".tmp-run.yaml").touch()
    (tmp_path / ".tmp-4711-step_00000001").mkdir()
    (tmp_path / "kept").touch()
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["kept"]
