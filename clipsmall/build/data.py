"""Builds the training data: indexed local shards in an exact order, or a stream."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from clipsmall.config.schema import DataSection
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
from clipsmall.data.preprocess import ImageSpec, ImageTransform
from clipsmall.distributed import world
from clipsmall.model.towers import Loaded

# maps numbers of global batches to this rank's slices of them
ReadBatches = Callable[[range], Iterable[LoadedBatch]]
# stands for the number of pairs, and of batches per epoch, of an endless stream
ENDLESS = 10**9


class TrainingData(Protocol):
    """The training data of a run."""

    # identifies shards and plan; it must be the same when a run is resumed
    fingerprint: str
    # one phrase for the opening lines
    description: str
    pairs: int
    # batches per epoch; only after an epoch may a pair come again
    per_epoch: int
    # (n,) `index` of all pairs, ascending; None if they are not known beforehand
    ids: Tensor | None
    # by tower, `image` or `text`: cached features, read in place of pixels or tokens
    features: dict[str, Features]

    @property
    def catalog(self) -> Catalog | None:
        """The catalog of all pairs; None if pairs have no stable numbers."""

    def captions(self) -> Iterator[str]:
        """Every training caption, to learn a vocabulary. Raises ValueError for streamed data."""

    def reader(self, loaded: Loaded, pin: bool, hash_images: bool = False) -> ReadBatches:
        """A function that reads this rank's slices of global batches.

        Batches are numbered from the start of the run, over all epochs.

        Args:
            loaded: the towers; batches get their image size and tokenizer.
            pin: put batches into pinned memory, from which a GPU copies faster.
            hash_images: also hash each image, so that mining can recognise copies.
        """


def training_data(data: DataSection, seed: int) -> TrainingData:
    """The training data of a run; its order depends on `seed`.

    Raises:
        ValueError: no shards, no index, fewer pairs than a batch, or a plan made for other shards.
    """
    if data.streaming:
        return StreamedData(data, seed)
    return IndexedData(data, seed)


class IndexedData:
    """Local shards with an index: every pair has a number, and the order is reproducible."""

    def __init__(self, data: DataSection, seed: int) -> None:
        self.data = data
        self.catalog = open_catalog(data.train)
        self.fingerprint = self.catalog.fingerprint
        self.pairs = len(self.catalog)
        self.order: Order | PlannedOrder = Order(self.catalog.sizes, seed, data.shuffle_window)
        planned = ""
        if data.plan:
            plan = read_plan(Path(data.plan), self.catalog, data.batch_size)
            self.order = PlannedOrder(plan.rows, seed)
            self.fingerprint += f" {plan.digest}"
            planned = f"; {self.order.length:,} of them in the plan {data.plan}"
        self.ids: Tensor | None = torch.from_numpy(self.catalog.index).sort().values
        self.features: dict[str, Features] = {}
        self.per_epoch, rest = divmod(self.order.length, data.batch_size)

        bad = self.catalog.left_out
        known_bad = f" ({sum(bad.values())} known to be bad are left out: {bad})" if bad else ""
        # the last pairs of an epoch that do not fill a batch are not lost: every epoch has another
        # order
        waiting = f" and {rest} pairs that wait for another epoch" if rest else ""
        self.description = (
            f"{self.pairs:,} pairs in {len(self.catalog.shards)} shards{known_bad}{planned}"
            f"; an epoch is {self.per_epoch} batches{waiting}"
        )

    def captions(self) -> Iterator[str]:
        for row in range(self.pairs):
            members = self.catalog.read_text(row)
            yield from captions_of(members.text, fields_of(members.json))

    def reader(self, loaded: Loaded, pin: bool, hash_images: bool = False) -> ReadBatches:
        dataset = GlobalBatches(
            self.catalog,
            self.order,
            image_transform(self.data, loaded.spec),
            loaded.tokenize,
            self.data.batch_size,
            world.rank(),
            world.size(),
            hash_images,
            self.features,
        )
        workers = self.data.workers
        return lambda numbers: batch_loader(dataset, numbers, workers, pin=pin)


class StreamedData:
    """Local or remote shards read from front to back: no reproducible order, no exact resume."""

    catalog = None
    fingerprint = "streaming"
    pairs = ENDLESS
    per_epoch = ENDLESS
    ids: Tensor | None = None

    def __init__(self, data: DataSection, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.features: dict[str, Features] = {}
        shards = ", ".join(data.train)
        self.description = f"streaming {shards}: resampled order, no exact resume"

    def captions(self) -> Iterator[str]:
        raise ValueError(
            "data.streaming: clipsmall's small towers learn their vocabulary from indexed shards; "
            "choose another model"
        )

    def reader(self, loaded: Loaded, pin: bool, hash_images: bool = False) -> ReadBatches:
        dataset = StreamedBatches(
            list(self.data.train),
            image_transform(self.data, loaded.spec),
            loaded.tokenize,
            self.data.batch_size,
            world.rank(),
            world.size(),
            self.seed,
            hash_images=hash_images,
        )

        def read(numbers: range) -> Iterable[LoadedBatch]:
            # a stream cannot skip to a batch; the number only seeds its random order
            dataset.start = numbers.start
            endless = batch_loader(dataset, None, self.data.workers, pin=pin)
            return islice(endless, len(numbers))

        return read


def image_transform(data: DataSection, spec: ImageSpec) -> ImageTransform:
    """Resizing and cropping for an image tower, with the run's augmentation."""
    return ImageTransform(spec, data.crop_scale, data.max_pixels)
