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
def alone(folder: Path) -> Iterator[None]:
    """No other command writes to the folder meanwhile. Raises ValueError if one is at it."""
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
    with locks.exclusive(folder, "another command embeds there; wait, or give another --embeddings"):
        yield


class EmbeddingStore:
    """The parts of one model and one list of shards; those of others are deleted, or made anew.

    Args:
        model: its name, for the record; digest: of it.
        prints: of each shard, by name.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """

    def __init__(
        self, folder: Path, model: str, digest: str, prints: list[tuple[str, str]]
    ) -> None:
        self.folder = folder
        self.prints = prints
        # why parts are made anew
        self.note = ""
        found = self._read()
        if found and found["digest"] != digest:
            self.note = f"the embeddings there are of another model ({found['model']} {found['digest'][:8]})"
        old = found["parts"] if found.get("digest") == digest else {}
        kept = {
            place: old[place]
            for number, (_, fingerprint) in enumerate(prints)
            if old.get(place := str(number), {}).get("fingerprint") == fingerprint
            and self.part(number)
        }
        if len(kept) < len(old):
            self.note = (
                f"{len(old) - len(kept)} of {len(old)} shards have changed, or their embeddings"
            )
        self.record: dict[str, Any] = {
            "version": VERSION,
            "model": model,
            "digest": digest,
            "parts": kept,
        }
        mine = {self.file(kind, number) for kind in ENDINGS for number in range(len(prints))}
        # before a part is replaced it is not of the record
        self._save_record()
        for kind, ending in ENDINGS.items():
            for file in set((folder / kind).glob(f"{kind}_*.{ending}")) - mine:
                file.unlink()

    def file(self, kind: str, number: int) -> Path:
        # clip-retrieval's, which reads parts in the order of their names
        width = len(str(len(self.prints)))
        return self.folder / kind / f"{kind}_{number:0{width}d}.{ENDINGS[kind]}"

    def missing(self) -> list[int]:
        return [
            number for number in range(len(self.prints)) if str(number) not in self.record["parts"]
        ]

    def add(self, number: int, part: Part, broken: int) -> None:
        """Write a part, and then that it is there. `broken`: images that are not in it, for they
        cannot be read.
        """
        for kind, rows in (("img_emb", part.image), ("text_emb", part.text)):
            self._write(self.file(kind, number), partial(_save, rows))
        self._write(self.file("metadata", number), lambda path: pq.write_table(part.table, path))
        shard, fingerprint = self.prints[number]
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
            image, text = (
                np.load(self.file(kind, number), mmap_mode="c") for kind in ("img_emb", "text_emb")
            )
            table = pq.read_table(self.file("metadata", number))
        except (OSError, ValueError, EOFError, pa.ArrowException):
            return None
        if not image.ndim == text.ndim == 2 or not image.shape == text.shape == (
            len(table),
            image.shape[1],
        ):
            return None
        return Part(torch.from_numpy(image), torch.from_numpy(text), table)

    @property
    def broken(self) -> int:
        """Images that cannot be read."""
        return sum(int(part["broken"]) for part in self.record["parts"].values())

    def _read(self) -> dict[str, Any]:
        path = self.folder / "embeddings.json"
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder}: holds something else than our embeddings; give a new --embeddings"
                )
            return {}
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            if found["version"] == VERSION:
                return found
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(
            f"{path}: not a record of version {VERSION}; delete the folder, or give a new --embeddings"
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
