"""Builds the training data: indexed local shards in an exact order, or a stream without one."""

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

# numbers of global batches -> this rank's slices of them
ReadBatches = Callable[[range], Iterable[LoadedBatch]]
# a stream never ends: pairs of its data set, and batches of an epoch
ENDLESS = 10**9


class TrainingData(Protocol):
    """What a run trains on."""

    # identifies shards and plan: a resumed run must find the same
    fingerprint: str
    # one phrase for the opening lines
    description: str
    pairs: int
    # batches until a pair may come again
    per_epoch: int
    # (n,) ascending `index` of all pairs; None where they are not known beforehand
    ids: Tensor | None
    # `image` or `text` -> a frozen tower's features, read in place of pixels or tokens
    features: dict[str, Features]

    @property
    def catalog(self) -> Catalog | None:
        """None where pairs have no numbers of their own."""

    def captions(self) -> Iterator[str]:
        """Every training caption, for vocabularies. Raises ValueError where they cannot be had."""

    def reader(self, loaded: Loaded, pin: bool, hash_images: bool = False) -> ReadBatches:
        """A function that reads this rank's slices of global batches.

        Batches are numbered from the start of the run, over all epochs.

        Args:
            loaded: towers, whose image size and tokenizer the batches are made for.
            pin: put batches into page-locked memory, from which a GPU copies faster.
            hash_images: also hash each image, so that mining can tell copies.
        """


def training_data(data: DataSection, seed: int) -> TrainingData:
    """The training data of a run; its order depends on `seed`.

    Raises:
        ValueError: no shards, no index, fewer pairs than a batch, or a plan for other shards.
    """
    if data.streaming:
        return StreamedData(data, seed)
    return IndexedData(data, seed)


class IndexedData:
    """Local shards with an index: every pair has a number, and a run's order is exact."""

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
        # an epoch's last pairs that fill no batch are not lost: each epoch is shuffled differently
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
    """Shards that are only read from front to back, remote ones, too: no exact order or resume."""

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
            "data.streaming: our own towers learn their vocabulary from indexed shards; "
            "name another model"
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
            # a stream cannot skip to a batch: the number only seeds its random order
            dataset.start = numbers.start
            endless = batch_loader(dataset, None, self.data.workers, pin=pin)
            return islice(endless, len(numbers))

        return read


def image_transform(data: DataSection, spec: ImageSpec) -> ImageTransform:
    """Resizing and cropping for a tower's input, with the augmentation that the run asks for."""
    return ImageTransform(spec, data.crop_scale, data.max_pixels)
