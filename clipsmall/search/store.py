"""A folder of embeddings in clip-retrieval's layout, and the record of what they were made of.

    FOLDER/img_emb/img_emb_0.npy  text_emb/text_emb_0.npy  metadata/metadata_0.parquet
    embeddings.json

A part is a shard of the data. Row i of its three files is one caption with its image.
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
    """Keep other commands from writing to a folder of embeddings meanwhile.

    Raises:
        ValueError: another command is at it, or the folder cannot be written.
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
    """The parts of one model and one list of shards; those of others are deleted or made again.

    Args:
        model: its name, for the record.
        digest: of the model's weights.
        fingerprints: (name, digest) of each shard.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self, folder: Path, model: str, digest: str, fingerprints: list[tuple[str, str]]
    ) -> None:
        self.folder = folder
        self.fingerprints = fingerprints
        # why parts are made again
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
        # before a part is replaced it must not be in the record
        self._save_record()
        self._delete_other_files()

    def _delete_other_files(self) -> None:
        """Those of shards that are no longer there, or of another number of shards."""
        numbers = range(len(self.fingerprints))
        for kind, ending in ENDINGS.items():
            own = {self.file(kind, number) for number in numbers}
            there = set((self.folder / kind).glob(f"{kind}_*.{ending}"))

            for file in there - own:
                file.unlink()

    def file(self, kind: str, number: int) -> Path:
        """Where a part's features or metadata lie."""
        # clip-retrieval reads parts in the order of their names
        width = len(str(len(self.fingerprints)))
        return self.folder / kind / f"{kind}_{number:0{width}d}.{ENDINGS[kind]}"

    def missing(self) -> list[int]:
        """The numbers of the parts that are still to be made."""
        there = self.record["parts"]
        return [number for number in range(len(self.fingerprints)) if str(number) not in there]

    def add(self, number: int, part: Part, broken: int) -> None:
        """Write a part, and then that it is there.

        Args:
            broken: number of images that are not in it, as they cannot be read.

        Raises:
            ValueError: it cannot be written.
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
        """A part, its features mapped from their files; None if it is not there or not whole."""
        try:
            # a private map: torch wants one that it may write to, the file stays as it is
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
        """Images that cannot be read."""
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
        """Whole or not at all."""
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
