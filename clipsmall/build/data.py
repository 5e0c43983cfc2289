"""Config -> the training data: indexed local shards in an exact order, or a stream without one."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from clipsmall.config import Config
from clipsmall.data import (
    Catalog,
    GlobalBatches,
    LoadedBatch,
    Order,
    PlannedOrder,
    StreamedBatches,
    batch_loader,
    captions_of,
    fields_of,
    open_catalog,
    read_plan,
)
from clipsmall.data.features import Features
from clipsmall.data.preprocess import ImageTransform
from clipsmall.distributed import world
from clipsmall.model.towers import Loaded

# numbers of global batches -> my slices of them
Read = Callable[[range], Iterable[LoadedBatch]]


class TrainingData(Protocol):
    # what a resumed run must find again
    fingerprint: str
    # for the opening line
    words: str
    pairs: int
    # batches until a pair may come again
    per_epoch: int
    # ascending `index` of all pairs; None where they are not known beforehand
    ids: Tensor | None
    # by frozen towers, in place of the image or the text
    made: dict[str, Features]

    @property
    def catalog(self) -> Catalog | None:
        """None where pairs have no numbers of their own."""

    def captions(self) -> Iterator[str]:
        """Every training caption, for vocabularies. Raises ValueError where they cannot be had."""

    def reader(self, loaded: Loaded, pin: bool, hash_images: bool = False) -> Read:
        """What reads my slices of global batches, which are counted from the start of the run."""


def transform(config: Config, loaded: Loaded) -> ImageTransform:
    return ImageTransform(loaded.spec, config.data.crop_scale, config.data.max_pixels)


class IndexedData:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.catalog = open_catalog(config.data.train)
        self.fingerprint, self.pairs = self.catalog.fingerprint, len(self.catalog)
        self.order: Order | PlannedOrder = Order(
            self.catalog.sizes, config.seed, config.data.shuffle_window
        )
        planned = ""
        if config.data.plan:
            plan = read_plan(Path(config.data.plan), self.catalog, config.data.batch_size)
            self.order = PlannedOrder(plan.rows, config.seed)
            self.fingerprint += f" {plan.digest}"
            planned = f"; {self.order.length:,} of them in the plan {config.data.plan}"
        self.ids: Tensor | None = torch.from_numpy(self.catalog.index).sort().values
        # by frozen towers, in place of images or captions
        self.made: dict[str, Features] = {}
        left = self.catalog.left_out
        size = config.data.batch_size
        self.per_epoch, rest = divmod(self.order.length, size)
        self.words = (
            f"{self.pairs:,} pairs in {len(self.catalog.shards)} shards"
            + (f" ({sum(left.values())} known to be bad are left out: {left})" if left else "")
            + planned
            + f"; an epoch is {self.per_epoch} batches"
            + (f" and {rest} pairs that wait for another epoch" if rest else "")
        )

    def captions(self) -> Iterator[str]:
        for row in range(self.pairs):
            members = self.catalog.read_text(row)
            yield from captions_of(members.text, fields_of(members.json))

    def reader(self, loaded: Loaded, pin: bool, hash_images: bool = False) -> Read:
        config = self.config
        dataset = GlobalBatches(
            self.catalog,
            self.order,
            transform(config, loaded),
            loaded.tokenize,
            config.data.batch_size,
            world.rank(),
            world.size(),
            hash_images,
            self.made,
        )
        return lambda numbers: batch_loader(dataset, numbers, config.data.workers, pin=pin)


class StreamedData:
    catalog = None
    fingerprint = "streaming"
    # endless
    pairs = per_epoch = 10**9
    ids: Tensor | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.made: dict[str, Features] = {}
        self.words = f"streaming {', '.join(config.data.train)}: resampled order, no exact resume"

    def captions(self) -> Iterator[str]:
        raise ValueError(
            "data.streaming: our own towers learn their vocabulary from indexed shards; name another model"
        )

    def reader(self, loaded: Loaded, pin: bool, hash_images: bool = False) -> Read:
        config = self.config
        dataset = StreamedBatches(
            list(config.data.train),
            transform(config, loaded),
            loaded.tokenize,
            config.data.batch_size,
            world.rank(),
            world.size(),
            config.seed,
            hash_images=hash_images,
        )

        def read(numbers: range) -> Iterable[LoadedBatch]:
            dataset.start = numbers.start
            return islice(batch_loader(dataset, None, config.data.workers, pin=pin), len(numbers))

        return read


def training_data(config: Config) -> TrainingData:
    return StreamedData(config) if config.data.streaming else IndexedData(config)
