"""Global batches from shards, the same for any number of ranks and workers."""

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

# bytes that Linux reads at most for one POSIX_FADV_WILLNEED
READAHEAD = 128 * 1024
# attempts to replace one bad pair before the run ends
MAX_SUBSTITUTES = 16
# number of names kept per reason
EXAMPLES = 5
# maps n captions to token ids, (n, L) int64
Tokenize = Callable[[list[str]], Tensor]


@dataclass
class Skips:
    """Pairs that could not be read, counted by reason, with at most five names for each."""

    # number of pairs seen, including unreadable ones
    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: Callable[[], str]) -> None:
        """Count one more; `name`, which may be slow, is called for the first few of a reason."""
        self.reasons[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(name())

    def merge(self, other: "Skips") -> None:
        self.seen += other.seen
        self.reasons.update(other.reasons)
        for reason, names in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            new = [name for name in names if name not in mine]
            mine += new[: EXAMPLES - len(mine)]

    @property
    def total(self) -> int:
        return sum(self.reasons.values())

    def __str__(self) -> str:
        parts = []
        for reason, count in self.reasons.items():
            names = ", ".join(self.examples[reason][:2])
            parts.append(f"{count} x {reason} (e.g. {names})")
        return "; ".join(parts)


class LoadedBatch(NamedTuple):
    """One rank's pairs of a batch, and the pairs that could not be read for it."""

    pairs: Pairs
    skips: Skips
    # (B/W,) int64 hashes of the encoded images, by which mining separates copies; 0 if not computed
    image_hash: Tensor


class _LoadedPair(NamedTuple):
    """One pair, before batches are collated."""

    row: int
    # (3, H, W) uint8, or (D,) features
    image: Tensor
    caption: str
    # (D,) features of the caption; empty without cached text features
    text: Tensor
    image_hash: int


class GlobalBatches(Dataset[LoadedBatch]):
    """`batches[k]` is this rank's slice of global batch k, a pure function of (catalog, seed, k).

    Global batch k of an epoch is positions k·B … (k+1)·B of its order, and rank r of W ranks takes
    the r-th of W equal slices of it, so every world size sees the same batches. The `length mod B`
    pairs that fill no batch are left for other epochs, whose order differs. A bad pair is replaced
    by the pair at the same slot of a following batch: that does not depend on the number of ranks,
    and no pair comes twice in one batch.

    Args:
        order: of the pairs, or of the batches of a plan.
        batch_size: B, pairs of one step over all ranks.
        rank, world_size: determine this rank's slice.
        hash_images: hash every encoded image (90 µs for 150 KB), which only mining needs.
        made: cached features by tower, `image` or `text`; they replace pixels or token ids in the
            batch.

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
                f"data.batch_size={batch_size} is more than the {order.length} pairs "
                "of the data set"
            )
        self.catalog = catalog
        self.order = order
        self.image = image
        self.tokenize = tokenize
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.hash_images = hash_images
        # a mappingproxy cannot be pickled for a spawned worker
        self.made = dict(made)
        self.per_epoch = order.length // batch_size
        self._advised: tuple[int, int] | None = None

    def place(self, number: int) -> tuple[int, int]:
        """(epoch, batch within the epoch) of a global batch number counted from the run's start."""
        return divmod(number, self.per_epoch)

    def rows(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """(B/W,) rows of the catalog: my slice of global batch `number`, before bad pairs are
        replaced.
        """
        epoch, batch = self.place(number)
        return self.order.rows(epoch, self._positions(batch))

    def _positions(self, batch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """(B/W,) positions within the epoch: my slice of a batch of it."""
        local = self.batch_size // self.world_size
        first = batch * self.batch_size + self.rank * local
        return np.arange(first, first + local)

    def __getitem__(self, number: int) -> LoadedBatch:
        epoch, batch = self.place(number)
        self._read_ahead(epoch, batch)
        positions = self._positions(batch)
        rows = self.order.rows(epoch, positions)
        skips = Skips(seen=len(rows))
        loaded = []
        for position, row in zip(positions.tolist(), rows.tolist(), strict=True):
            loaded.append(self._good_pair(epoch, position, row, skips))
        captions = [pair.caption for pair in loaded]
        if "text" in self.made:
            text = torch.stack([pair.text for pair in loaded])
        else:
            text = self.tokenize(captions)
        pairs = Pairs(
            image=torch.stack([pair.image for pair in loaded]),
            text=text,
            # these include substitutes of bad pairs
            index=torch.from_numpy(self.catalog.index[[pair.row for pair in loaded]]),
            caption_hash=torch.tensor([caption_hash(caption) for caption in captions]),
        )
        return LoadedBatch(pairs, skips, torch.tensor([pair.image_hash for pair in loaded]))

    def _good_pair(self, epoch: int, position: int, row: int, skips: Skips) -> _LoadedPair:
        """The pair at `position` of the epoch, or its deterministic substitute if it is bad."""
        for step in range(1, MAX_SUBSTITUTES + 1):
            try:
                return self._load_pair(epoch, row)
            except BadImage as reason:
                skips.add(str(reason), partial(self.catalog.name, row))
            # the same slot of the next batch
            position = (position + self.batch_size) % (self.per_epoch * self.batch_size)
            row = int(self.order.rows(epoch, np.array([position]))[0])
            # after all batches of an epoch, the bad pair itself would follow
            if step >= self.per_epoch:
                break
        raise ShardError(
            f"no good pair found in place of a bad one after {skips}; "
            "run data_tools.check_shards --decode"
        )

    def _load_pair(self, epoch: int, row: int) -> _LoadedPair:
        """Raises BadImage."""
        # with cached image features, the image's bytes are read only for their hash
        needs_image = "image" not in self.made or self.hash_images
        data = self.catalog.read(row) if needs_image else self.catalog.read_text(row)
        if "image" in self.made:
            image = self.made["image"](row)
        else:
            image = self._augmented(data.image, epoch, row)
        captions = captions_of(data.text, fields_of(data.json))
        chosen = self._choice(len(captions), epoch, row)
        return _LoadedPair(
            row=row,
            image=image,
            caption=captions[chosen],
            text=self.made["text"](row, chosen) if "text" in self.made else torch.empty(0),
            image_hash=image_hash(data.image) if self.hash_images else 0,
        )

    def _choice(self, captions: int, epoch: int, row: int) -> int:
        """The caption of a pair in this epoch: each is used once before any is repeated."""
        if captions <= 1:
            return 0
        order = permutation(captions, self.order.seed, row)
        return int(order[epoch % captions])

    def _augmented(self, data: bytes, epoch: int, row: int) -> Tensor:
        """Pixels; random crops are seeded by (seed, epoch, row), hence the same in any worker."""
        if not self.image.random:
            return self.image(data)
        sequence = np.random.SeedSequence((self.order.seed, epoch, row))
        seed = sequence.generate_state(1, np.uint64)[0]
        # torchvision draws from the global generator, which training uses, too
        with torch.random.fork_rng(devices=[]):
            # torch takes 63 bits
            torch.default_generator.manual_seed(int(seed) >> 1)
            return self.image(data)

    def _read_ahead(self, epoch: int, batch: int) -> None:
        """On entering a window, ask the system to read the next one into memory, in disk order."""
        if self.order.window == 0 or not hasattr(os, "posix_fadvise"):
            return
        window = batch * self.batch_size // self.order.window
        if self._advised == (epoch, window):
            return
        # the first window has not been announced yet
        windows = [window, window + 1] if self._advised is None else [window + 1]
        self._advised = (epoch, window)
        for ahead in windows:
            for row, count in self.order.window_blocks(epoch, ahead):
                self._advise(row, count)

    def _advise(self, row: int, count: int) -> None:
        """Announce the bytes of `count` neighbouring rows of one shard."""
        descriptor = self.catalog.descriptor(int(self.catalog.shard[row]))
        last = self.catalog.spans[row + count - 1]
        begin = int(self.catalog.spans[row, 0, 0])
        # of the last of the pair's files
        end = int(last.sum(axis=1).max())
        for offset in range(begin, end, READAHEAD):
            os.posix_fadvise(descriptor, offset, READAHEAD, os.POSIX_FADV_WILLNEED)
