"""Global batches from shards: the same ones for any number of ranks and workers, resumed at any
batch.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipsmall.batch import Pairs
from clipsmall.data.batch_plan import PlannedOrder
from clipsmall.data.captions import caption_hash, captions_of, fields_of
from clipsmall.data.catalog import Catalog
from clipsmall.data.features import Features
from clipsmall.data.index import ShardError, image_hash
from clipsmall.data.order import Order, permutation
from clipsmall.data.preprocess import BadImage, ImageTransform

# bytes: what Linux reads at most for one WILLNEED advice
READAHEAD = 128 * 1024
# tries to replace one bad pair before the run stops
MAX_SUBSTITUTES = 16
# n captions -> (n, L) int64
Tokenize = Callable[[list[str]], Tensor]


@dataclass
class Skips:
    """Pairs that could not be read, counted by reason, with a few names of each."""

    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: Callable[[], str]) -> None:
        """Count; `name` is asked for the first five of a reason only."""
        self.reasons[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < 5:
            named.append(name())

    def merge(self, other: "Skips") -> None:
        self.seen += other.seen
        self.reasons.update(other.reasons)
        for reason, names in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += [name for name in names if name not in mine][: 5 - len(mine)]

    @property
    def total(self) -> int:
        return sum(self.reasons.values())

    @property
    def rate(self) -> float:
        return self.total / max(self.seen, 1)

    def __str__(self) -> str:
        return "; ".join(
            f"{n} x {why} (e.g. {', '.join(self.examples[why][:2])})"
            for why, n in self.reasons.items()
        )


class LoadedBatch(NamedTuple):
    pairs: Pairs
    skips: Skips
    # (B,) int64, of the encoded images, by which mining keeps copies apart; 0 where nobody asked
    image_hash: Tensor


class GlobalBatches(Dataset[LoadedBatch]):
    """`batches[k]` is this rank's slice of global batch k, a pure function of (catalog, seed, k).

    Global batch k of an epoch is places k·B … (k+1)·B of its order, and rank r of W takes the r-th
    W-th of it, so every world size sees the same batches. The `length mod B` pairs that fill no
    batch are left for other epochs, whose order differs. A bad pair is replaced by the pair at the
    same slot of a following batch: that depends on no rank, and no pair comes twice in one batch.

    Args:
        order: of the pairs, or of the batches of a plan.
        batch_size: B, pairs of one step over all ranks.
        rank, world_size: which slice is mine.
        hash_images: 90 µs for 150 KB, which only mining needs.
        made: features of the `image` or the `text`, which stand in the batch in place of pixels or
            token ids.

    Raises:
        ValueError: B does not divide by the ranks, or the data set is smaller than one batch.
    """

    def __init__(
        self,
        catalog: Catalog,
        order: Order | PlannedOrder,
        image: ImageTransform,
        tokenize: Tokenize,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        hash_images: bool = False,
        made: Mapping[str, Features] = MappingProxyType({}),
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"data.batch_size={batch_size} is not divisible by {world_size} ranks")
        if batch_size > order.length:
            raise ValueError(
                f"data.batch_size={batch_size} is more than the {order.length} pairs of the data set"
            )
        self.catalog = catalog
        self.order = order
        self.image = image
        self.tokenize = tokenize
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        # no proxy could travel to a spawned worker
        self.hash_images = hash_images
        self.made = dict(made)
        self.per_epoch = order.length // batch_size
        self._advised: tuple[int, int] | None = None

    def place(self, number: int) -> tuple[int, int]:
        """Global batch number since the start of the run -> (epoch, batch within the epoch)."""
        return divmod(number, self.per_epoch)

    def rows(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """(B/W,) rows of the catalog: my slice of global batch `number`, before bad pairs are
        replaced.
        """
        epoch, batch = self.place(number)
        local = self.batch_size // self.world_size
        first = batch * self.batch_size + self.rank * local
        return self.order.rows(epoch, np.arange(first, first + local))

    def __getitem__(self, number: int) -> LoadedBatch:
        epoch, batch = self.place(number)
        self._read_ahead(epoch, batch)
        local = self.batch_size // self.world_size
        skips = Skips(seen=local)
        loaded = [
            self._pair(epoch, batch * self.batch_size + self.rank * local + slot, row, skips)
            for slot, row in enumerate(self.rows(number).tolist())
        ]
        images, captions, made, rows, hashes = zip(*loaded, strict=True)
        pairs = Pairs(
            image=torch.stack(images),
            text=torch.stack(made) if "text" in self.made else self.tokenize(list(captions)),
            index=torch.from_numpy(self.catalog.index[list(rows)]),
            caption_hash=torch.tensor([caption_hash(caption) for caption in captions]),
        )
        return LoadedBatch(pairs, skips, torch.tensor(hashes))

    def _pair(
        self, epoch: int, position: int, row: int, skips: Skips
    ) -> tuple[Tensor, str, Tensor | None, int, int]:
        """The pair at `position` of the epoch, or its deterministic substitute: image, caption and
        its features if they were made, row, image hash."""
        for step in range(1, MAX_SUBSTITUTES + 1):
            try:
                looked_at = "image" not in self.made or self.hash_images
                members = self.catalog.read(row) if looked_at else self.catalog.read_text(row)
                image = (
                    self.made["image"](row)
                    if "image" in self.made
                    else self._augmented(members.image, epoch, row)
                )
                captions = captions_of(members.text, fields_of(members.json))
                chosen = self._choice(len(captions), epoch, row)
                hashed = image_hash(members.image) if self.hash_images else 0
                made = self.made["text"](row, chosen) if "text" in self.made else None
                return image, captions[chosen], made, row, hashed
            except BadImage as reason:
                skips.add(str(reason), partial(self.catalog.name, row))
            position = (position + self.batch_size) % (self.per_epoch * self.batch_size)
            row = int(self.order.rows(epoch, np.array([position]))[0])
            if step >= self.per_epoch:
                break
        raise ShardError(
            f"no good pair found in place of a bad one after {skips}; run data_tools.check_shards --decode"
        )

    def _choice(self, captions: int, epoch: int, row: int) -> int:
        """Which of a pair's captions this epoch shows: each once before any comes again."""
        return (
            int(permutation(captions, self.order.seed, row)[epoch % captions])
            if captions > 1
            else 0
        )

    def _augmented(self, data: bytes, epoch: int, row: int) -> Tensor:
        """Random crops seeded by (seed, epoch, row): the same in any worker, and the global RNG
        untouched.
        """
        if not self.image.random:
            return self.image(data)
        with torch.random.fork_rng(devices=[]):
            seed = np.random.SeedSequence((self.order.seed, epoch, row)).generate_state(
                1, np.uint64
            )[0]
            torch.default_generator.manual_seed(int(seed) >> 1)
            return self.image(data)

    def _read_ahead(self, epoch: int, batch: int) -> None:
        """On entering a window, ask the system to read the next one into memory, in the order of
        the disk.
        """
        if self.order.window == 0 or not hasattr(os, "posix_fadvise"):
            return
        window = batch * self.batch_size // self.order.window
        if self._advised == (epoch, window):
            return
        first_time = self._advised is None
        self._advised = (epoch, window)
        for ahead in (window, window + 1) if first_time else (window + 1,):
            for row, count in self.order.window_blocks(epoch, ahead):
                low = int(self.catalog.spans[row, 0, 0])
                last = self.catalog.spans[row + count - 1]
                for offset in range(low, int(last.sum(axis=1).max()), READAHEAD):
                    descriptor = self.catalog.descriptor(int(self.catalog.shard[row]))
                    os.posix_fadvise(descriptor, offset, READAHEAD, os.POSIX_FADV_WILLNEED)
