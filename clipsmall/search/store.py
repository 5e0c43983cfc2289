"""A folder of embeddings in clip-retrieval's layout, with a record of the model and shards.

    FOLDER/img_emb/img_emb_0.npy  text_emb/text_emb_0.npy  metadata/metadata_0.parquet
    embeddings.json

A part has the embeddings of one shard. Row i of its three files is one caption with its image.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from clipsmall.storage import atomic, locks

VERSION = 1
ENDINGS = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet"}


class Part(NamedTuple):
    """n captions with their images."""

    # (n, D) unit rows, float16
    image: Tensor
    # (n, D)
    text: Tensor
    # (n,) shard, row, key, caption
    table: pa.Table


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder of embeddings against other commands.

    Raises:
        ValueError: another command holds the lock, or the folder is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder}: holds something else than our embeddings; give a new --embeddings"
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error}); give another --embeddings"
        ) from None

    with locks.exclusive(
        folder, "another command embeds there; wait, or give another --embeddings"
    ):
        yield


class EmbeddingStore:
    """Parts for one model and one list of shards; outdated parts are deleted or replaced.

    Args:
        model: name of the model, for the record.
        digest: digest of the model's weights.
        fingerprints: (name, digest) of each shard.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self, folder: Path, model: str, digest: str, fingerprints: list[tuple[str, str]]
    ) -> None:
        self.folder = folder
        self.fingerprints = fingerprints
        # why parts must be replaced; "" if none
        self.note = ""

        found = self._read_record()
        old = {}
        if found:
            if found["digest"] == digest:
                old = found["parts"]
            else:
                other = f"{found['model']} {found['digest'][:8]}"
                self.note = f"the embeddings there are of another model ({other})"

        kept = {}
        for number, (_, fingerprint) in enumerate(fingerprints):
            name = str(number)
            same_shard = name in old and old[name].get("fingerprint") == fingerprint
            if same_shard and self.part(number):
                kept[name] = old[name]

        if len(kept) < len(old):
            changed = len(old) - len(kept)
            self.note = f"{changed} of {len(old)} shards have changed, or their embeddings"

        self.record: dict[str, Any] = {
            "version": VERSION,
            "model": model,
            "digest": digest,
            "parts": kept,
        }
        # a part must leave the record before its files are replaced
        self._save_record()
        self._delete_other_files()

    def _delete_other_files(self) -> None:
        """Delete files of shards that are gone, or named for another number of shards."""
        numbers = range(len(self.fingerprints))
        for kind, ending in ENDINGS.items():
            own = {self.file(kind, number) for number in numbers}
            there = set((self.folder / kind).glob(f"{kind}_*.{ending}"))

            for file in there - own:
                file.unlink()

    def file(self, kind: str, number: int) -> Path:
        """The path of a part's features or metadata."""
        # padded with zeros, as clip-retrieval reads parts in the order of their names
        width = len(str(len(self.fingerprints)))
        return self.folder / kind / f"{kind}_{number:0{width}d}.{ENDINGS[kind]}"

    def missing(self) -> list[int]:
        """The numbers of the missing parts."""
        there = self.record["parts"]
        return [number for number in range(len(self.fingerprints)) if str(number) not in there]

    def add(self, number: int, part: Part, broken: int) -> None:
        """Write a part's files, then enter it in the record.

        Args:
            broken: number of images of the shard that cannot be read.
        """
        for kind, rows in (("img_emb", part.image), ("text_emb", part.text)):
            self._write(self.file(kind, number), partial(_save, rows))

        self._write(self.file("metadata", number), lambda path: pq.write_table(part.table, path))
        shard, fingerprint = self.fingerprints[number]
        self.record["parts"][str(number)] = {
            "shard": shard,
            "fingerprint": fingerprint,
            "broken": broken,
        }
        self._save_record()

    def part(self, number: int) -> Part | None:
        """A part with memory-mapped features; None if it is missing or incomplete."""
        try:
            # copy-on-write, as torch wants a writable array; the file does not change
            image = np.load(self.file("img_emb", number), mmap_mode="c")
            text = np.load(self.file("text_emb", number), mmap_mode="c")
            table = pq.read_table(self.file("metadata", number))
        except (OSError, ValueError, EOFError, pa.ArrowException):
            return None

        if not image.ndim == text.ndim == 2:
            return None
        if image.shape != text.shape or len(image) != len(table):
            return None

        return Part(torch.from_numpy(image), torch.from_numpy(text), table)

    @property
    def broken(self) -> int:
        """The number of images that cannot be read."""
        return sum(int(part["broken"]) for part in self.record["parts"].values())

    def _read_record(self) -> dict[str, Any]:
        path = self.folder / "embeddings.json"
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder}: holds something else than our embeddings; "
                    "give a new --embeddings"
                )

            return {}

        try:
            found: dict[str, Any] = json.loads(path.read_text())
            if found["version"] == VERSION:
                return found
        except (ValueError, KeyError, TypeError):
            pass

        raise ValueError(
            f"{path}: not a record of version {VERSION}; "
            "delete the folder, or give a new --embeddings"
        )

    def _save_record(self) -> None:
        text = json.dumps(self.record, indent=1)
        self._write(self.folder / "embeddings.json", lambda path: path.write_text(text))

    def _write(self, file: Path, save: Callable[[Path], object]) -> None:
        """Write a file, whole or not at all."""
        try:
            with atomic.new_file(file) as temporary:
                save(temporary)
        except OSError as error:
            raise ValueError(
                f"{file}: cannot be written ({error}); give another --embeddings"
            ) from None


def _save(rows: Tensor, path: Path) -> None:
    # given a path, numpy would add .npy to its name
    with path.open("wb") as file:
        np.save(file, rows.numpy(), allow_pickle=False)
