"""Endless batches streamed from remote or un-indexed shards, drawn with replacement: no index, no
exact resume.
"""

import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from clipsmall.batch import Pairs
from clipsmall.data.captions import caption_hash, captions_of, fields_of
from clipsmall.data.index import IMAGE_SUFFIXES, ShardError, image_hash
from clipsmall.data.preprocess import BadImage, ImageTransform
from clipsmall.data.reader import LoadedBatch, Skips, Tokenize
from clipsmall.data.remote import Sample, members, open_shard, shard_urls, shown

# different ones, one after the other, with not a pair in them: the data set is not there
MAX_FAILED_SHARDS = 100
# one after the other, before the stream gives up
MAX_BAD_PAIRS = 10_000


class StreamedPair(NamedTuple):
    """One decoded pair: (3, H, W) uint8, its caption, the caption's hash and the encoded
    image's.
    """

    image: Tensor
    caption: str
    hash: int
    image_hash: int


class StreamedBatches(IterableDataset[LoadedBatch]):
    """Endless local batches of B/W pairs from shards anywhere: resampled order, **no exact
    resume**.

    Every rank and worker draws whole shards with replacement and mixes their pairs in a buffer; the
    draws differ between ranks and workers and are a function of (seed, `start`, rank, worker,
    number of workers) as long as every shard can be read. So no epoch shows each pair exactly once,
    the order depends on the number of ranks
    and workers, and a run that continues gets new draws, not the place where it stopped: set
    `start` to its step before iterating. For the exact order, copy the shards to a disk, index
    them, and use `GlobalBatches`.

    `pairs.index` is no number of the data set but the pair's place in this run's stream, unique
    over ranks and
    workers: shards drawn with replacement may bring one pair twice into a batch, and objectives
    find the positive by its index. `caption_hash` is that of the shown caption, so such repeats are
    masked like equal captions (not those of a pair with several captions, whose repeats show
    different ones).

    Bad pairs, cut shards (no end mark, or an error inside; pairs that ended before it are used) and
    unreachable ones are left out and counted in the next batch's `Skips`.

    Args:
        urls: brace lists of URLs (http(s)://, s3://, hf:// ..., through fsspec), local folders or
            globs.
        batch_size: B, pairs of one step over all ranks.
        rank, world_size: whose batches these are; every rank must have the same number of workers.
        shuffle: pairs in the buffer of every worker, encoded: 2,000 of 50 KB take 100 MB.
        hash_images: for mining, see `GlobalBatches`.

    Raises:
        ValueError: B does not divide by the ranks.
        ShardError: `shard_urls`' reasons; while iterating: every shard failed (or 100 different
            ones) without a pair between them, or 10,000 bad pairs came in a row.
    """

    def __init__(
        self,
        urls: str | list[str],
        image: ImageTransform,
        tokenize: Tokenize,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: int = 2_000,
        hash_images: bool = False,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"data.batch_size={batch_size} is not divisible by {world_size} ranks")
        self.urls = shard_urls(urls)
        self.image = image
        self.tokenize = tokenize
        self.local = batch_size // world_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.hash_images = hash_images
        # steps the run has made before
        self.start = 0
        if rank == 0:
            warnings.warn(
                "streaming: shards are drawn with replacement; a resumed run continues with new draws, not exactly "
                "where it stopped (local indexed shards do)",
                stacklevel=2,
            )

    def __iter__(self) -> Iterator[LoadedBatch]:
        worker = get_worker_info()
        workers, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        streams = workers * self.world_size
        stream = mine * self.world_size + self.rank
        words = np.random.SeedSequence((self.seed, self.start, streams, stream)).generate_state(
            4, np.uint32
        )
        rng = random.Random(words.tobytes())
        skips = Skips()
        samples = self._samples(rng, skips)
        if self.shuffle > 1:
            samples = webdataset.shuffle(self.shuffle, initial=min(self.shuffle, 1_000), rng=rng)(
                samples
            )
        place = self.start * self.local * streams
        while True:
            good = [self._good(samples, rng, skips) for _ in range(self.local)]
            images, captions, hashes, of_images = zip(*good, strict=True)
            pairs = Pairs(
                image=torch.stack(images),
                text=self.tokenize(list(captions)),
                index=place + stream + streams * torch.arange(self.local),
                caption_hash=torch.tensor(hashes),
            )
            place += self.local * streams
            yield LoadedBatch(pairs, replace(skips, seen=self.local), torch.tensor(of_images))
            skips.reasons = Counter()
            skips.examples = {}

    def _samples(self, rng: random.Random, skips: Skips) -> Iterator[Sample]:
        """Raw samples of randomly drawn shards, for ever."""
        failed = set[str]()

        def double(error: Exception) -> bool:
            skips.add("member comes twice", partial(str, error.args[0]))
            # go on without it
            return True

        while True:
            url = rng.choice(self.urls)
            useful = False
            reason = "unreachable shard"
            cause = ""
            try:
                with open_shard(url) as file:
                    reason = "cut shard"
                    for sample in group_by_keys(members(file, url), handler=double):
                        failed.clear()
                        useful = True
                        yield sample
                if useful:
                    continue
                reason = "empty shard"
            except Exception as error:
                # sockets, servers and fsspec's stores raise nearly anything
                cause = f" ({error})"
            skips.add(reason, partial(shown, url))
            if useful:
                continue
            failed.add(url)
            if len(failed) >= min(len(self.urls), MAX_FAILED_SHARDS):
                raise ShardError(
                    f"no pair in {len(failed)} shards, one after the other; the last: {shown(url)}: {reason}{cause}; "
                    "check data.train"
                )
            if "://" in url:
                # a server that is down may come back
                time.sleep(min(0.1 * 2 ** len(failed), 10.0))

    def _good(self, samples: Iterator[Sample], rng: random.Random, skips: Skips) -> StreamedPair:
        """The next pair that can be used."""
        for _ in range(MAX_BAD_PAIRS):
            sample = next(samples)
            try:
                return self._pair(sample, rng)
            except BadImage as reason:
                skips.add(
                    str(reason),
                    partial("{}:{}".format, shown(sample["__url__"]), sample["__key__"]),
                )
        raise ShardError(f"{MAX_BAD_PAIRS} bad pairs in a row: {skips}; check data.train")

    def _pair(self, sample: Sample, rng: random.Random) -> StreamedPair:
        """Raises BadImage, with the words of the index for what is wrong."""
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        if suffix is None or sample[suffix] == b"":
            raise BadImage("no image")
        if sample[suffix] is None:
            raise BadImage("image over 256 MiB")
        if None in (sample.get("txt", b""), sample.get("json", b"")):
            raise BadImage("caption or json over 1 MiB")
        try:
            captions = captions_of(sample.get("txt", b""), fields_of(sample.get("json") or b""))
            caption = rng.choice(captions) if captions else ""
            number = caption_hash(caption)
        except UnicodeError:
            # also lone surrogates, which json can spell
            raise BadImage("caption is not UTF-8") from None
        except (ValueError, RecursionError):
            # ValueError: also an integer of over 4,300 digits
            raise BadImage("broken json") from None
        if not caption:
            raise BadImage("empty caption" if "txt" in sample else "no caption")
        data = sample[suffix]
        of_image = image_hash(data) if self.hash_images else 0
        if not self.image.random:
            return StreamedPair(self.image(data), caption, number, of_image)
        # the global generator is the training's
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.getrandbits(63))
            return StreamedPair(self.image(data), caption, number, of_image)
