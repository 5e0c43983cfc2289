"""Config -> the training data: indexed local shards in an exact order, or a stream without one."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from clipsmall import world
from clipsmall.config import Config
from clipsmall.preprocess import ImageTransform
from clipsmall.shards import (
    GlobalBatches,
    LoadedBatch,
    Order,
    StreamedBatches,
    batch_loader,
    captions_of,
    fields_of,
    open_catalog,
)
from clipsmall.tower_sources import Loaded

Read = Callable[[range], Iterable[LoadedBatch]]  # numbers of global batches -> my slices of them


class TrainingData(Protocol):
    fingerprint: str  # what a resumed run must find again
    words: str  # for the opening line
    pairs: int
    ids: Tensor | None  # ascending `index` of all pairs; None where they are not known beforehand

    def captions(self) -> Iterator[str]:
        """Every training caption, for vocabularies. Raises ValueError where they cannot be had."""

    per_epoch: int  # batches until a pair may come again

    def reader(self, loaded: Loaded, pin: bool) -> Read:
        """What reads my slices of global batches, which are counted from the start of the run."""


def order(config: Config, sizes: list[int]) -> Order:
    return Order(sizes, config.seed, config.data.shuffle_window)


def transform(config: Config, loaded: Loaded) -> ImageTransform:
    return ImageTransform(loaded.spec, config.data.crop_scale, config.data.max_pixels)


class IndexedData:
    def __init__(self, config: Config) -> None:
        self.config, self.catalog = config, open_catalog(config.data.train)
        self.fingerprint, self.pairs = self.catalog.fingerprint, len(self.catalog)
        self.ids: Tensor | None = torch.from_numpy(self.catalog.index).sort().values
        left, size = self.catalog.left_out, config.data.batch_size
        self.per_epoch = self.pairs // size
        self.words = (
            f"{self.pairs:,} pairs in {len(self.catalog.shards)} shards"
            + (f" ({sum(left.values())} known to be bad are left out: {left})" if left else "")
            + f"; an epoch is {self.per_epoch} batches"
            + (f" and {self.pairs % size} pairs that wait for another epoch" if self.pairs % size else "")
        )

    def captions(self) -> Iterator[str]:
        for row in range(self.pairs):
            members = self.catalog.read_text(row)
            yield from captions_of(members.text, fields_of(members.json))

    def reader(self, loaded: Loaded, pin: bool) -> Read:
        config = self.config
        dataset = GlobalBatches(
            self.catalog,
            order(config, self.catalog.sizes),
            transform(config, loaded),
            loaded.tokenize,
            config.data.batch_size,
            world.rank(),
            world.size(),
        )
        return lambda numbers: batch_loader(dataset, numbers, config.data.workers, pin=pin)


class StreamedData:
    fingerprint = "streaming"
    pairs = per_epoch = 10**9  # endless
    ids: Tensor | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.words = f"streaming {', '.join(config.data.train)}: resampled order, no exact resume"

    def captions(self) -> Iterator[str]:
        raise ValueError(
            "data.streaming: our own towers learn their vocabulary from indexed shards; name another model"
        )

    def reader(self, loaded: Loaded, pin: bool) -> Read:
        config = self.config
        dataset = StreamedBatches(
            list(config.data.train),
            transform(config, loaded),
            loaded.tokenize,
            config.data.batch_size,
            world.rank(),
            world.size(),
            config.seed,
        )

        def read(numbers: range) -> Iterable[LoadedBatch]:
            dataset.start = numbers.start
            return islice(batch_loader(dataset, None, config.data.workers, pin=pin), len(numbers))

        return read


def training_data(config: Config) -> TrainingData:
    return StreamedData(config) if config.data.streaming else IndexedData(config)
