"""Endless batches streamed from shards anywhere, drawn with replacement: no exact resume."""

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
from clipsmall.data.remote import Sample, open_shard, printable_url, shard_urls, stream_members

# failed shards in a row, all different, after which the stream gives up
MAX_FAILED_SHARDS = 100
# bad pairs in a row before the stream gives up
MAX_BAD_PAIRS = 10_000
# longest time in seconds between attempts to reach a server that is down
LONGEST_WAIT = 10.0


class StreamedPair(NamedTuple):
    """One decoded pair."""

    # (3, H, W) uint8
    image: Tensor
    caption: str
    caption_hash: int
    # hash of the encoded image; 0 if not computed
    image_hash: int


class StreamedBatches(IterableDataset[LoadedBatch]):
    """Endless local batches of B/W pairs from shards anywhere: resampled order, **no exact
    resume**.

    Every rank and worker draws whole shards with replacement and mixes their pairs in a buffer. The
    draws differ between ranks and workers and are a function of (seed, `start`, rank, worker,
    number of workers) as long as every shard can be read. So no epoch shows each pair exactly once,
    the order depends on the number of ranks and workers, and a run that continues gets new draws
    instead of those that would have followed: set `start` to its step before iterating. For the
    exact order, copy the shards to a disk, index them, and use `GlobalBatches`.

    `pairs.index` is not a number of the data set but the pair's position in this run's stream,
    unique over ranks and workers: shards drawn with replacement may bring one pair twice into a
    batch, and objectives find the positive by its index. `caption_hash` is that of the chosen
    caption, so such repeats are masked like equal captions (except those of a pair with several
    captions, of which each repeat shows another).

    Bad pairs, cut shards (no end mark, or an error inside; pairs that ended before it are used) and
    unreachable ones are left out and counted in the next batch's `Skips`.

    Args:
        urls: brace lists of URLs (http(s)://, s3://, hf:// ..., through fsspec), local folders or
            globs.
        batch_size: B, pairs of one step over all ranks.
        rank, world_size: which slice of each batch is mine; every rank must have the same number of
            workers.
        shuffle: pairs in the buffer of every worker, encoded: 2,000 of 50 KB take 100 MB.
        hash_images: hash every encoded image, which only mining needs.

    Raises:
        ValueError: B does not divide by the ranks.
        ShardError: as `shard_urls` does; while iterating: every shard failed (or 100 different
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
        # number of steps made before this start
        self.start = 0
        if rank == 0:
            warnings.warn(
                "streaming: shards are drawn with replacement; a resumed run continues with new "
                "draws, not exactly where it stopped (local indexed shards do)",
                stacklevel=2,
            )

    def __iter__(self) -> Iterator[LoadedBatch]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        worker_id = worker.id if worker else 0
        # one stream of pairs per rank and worker
        streams = workers * self.world_size
        stream = worker_id * self.world_size + self.rank
        sequence = np.random.SeedSequence((self.seed, self.start, streams, stream))
        words = sequence.generate_state(4, np.uint32)
        rng = random.Random(words.tobytes())
        skips = Skips()
        samples = self._samples(rng, skips)
        if self.shuffle > 1:
            first_fill = min(self.shuffle, 1_000)
            samples = webdataset.shuffle(self.shuffle, initial=first_fill, rng=rng)(samples)
        # streams take turns in the numbering: pair i of stream s is i · streams + s
        position = self.start * self.local * streams
        while True:
            good = [self._good_pair(samples, rng, skips) for _ in range(self.local)]
            pairs = Pairs(
                image=torch.stack([pair.image for pair in good]),
                text=self.tokenize([pair.caption for pair in good]),
                index=position + stream + streams * torch.arange(self.local),
                caption_hash=torch.tensor([pair.caption_hash for pair in good]),
            )
            image_hashes = torch.tensor([pair.image_hash for pair in good])
            position += self.local * streams
            yield LoadedBatch(pairs, replace(skips, seen=self.local), image_hashes)
            # start counting again for the next batch
            skips.reasons = Counter()
            skips.examples = {}

    def _samples(self, rng: random.Random, skips: Skips) -> Iterator[Sample]:
        """Raw samples of randomly drawn shards, endlessly."""
        # different shards that failed since the last pair
        failed = set[str]()

        def count_double(error: Exception) -> bool:
            skips.add("member comes twice", partial(str, error.args[0]))
            # True: webdataset goes on without it
            return True

        while True:
            url = rng.choice(self.urls)
            useful = False
            reason = "unreachable shard"
            cause = ""
            try:
                with open_shard(url) as file:
                    reason = "cut shard"
                    for sample in group_by_keys(stream_members(file, url), handler=count_double):
                        failed.clear()
                        useful = True
                        yield sample
                if useful:
                    continue
                reason = "empty shard"
            except Exception as error:
                # sockets, servers and fsspec's stores raise nearly anything
                cause = f" ({error})"
            skips.add(reason, partial(printable_url, url))
            if useful:
                continue
            failed.add(url)
            if len(failed) >= min(len(self.urls), MAX_FAILED_SHARDS):
                raise ShardError(
                    f"no pair in {len(failed)} shards, one after the other; the last: "
                    f"{printable_url(url)}: {reason}{cause}; check data.train"
                )
            if "://" in url:
                # a server that is down may come back
                time.sleep(min(0.1 * 2 ** len(failed), LONGEST_WAIT))

    def _good_pair(
        self, samples: Iterator[Sample], rng: random.Random, skips: Skips
    ) -> StreamedPair:
        """The next pair that can be used."""
        for _ in range(MAX_BAD_PAIRS):
            sample = next(samples)
            try:
                return self._decode(sample, rng)
            except BadImage as reason:
                url = printable_url(sample["__url__"])
                skips.add(str(reason), partial("{}:{}".format, url, sample["__key__"]))
        raise ShardError(f"{MAX_BAD_PAIRS} bad pairs in a row: {skips}; check data.train")

    def _decode(self, sample: Sample, rng: random.Random) -> StreamedPair:
        """Raises BadImage, with the words of the index for what is wrong."""
        data = _image_bytes(sample)
        caption, number = _chosen_caption(sample, rng)
        of_image = image_hash(data) if self.hash_images else 0
        if not self.image.random:
            return StreamedPair(self.image(data), caption, number, of_image)
        # torchvision draws from the global generator, which is the training's
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.getrandbits(63))
            return StreamedPair(self.image(data), caption, number, of_image)


def _image_bytes(sample: Sample) -> bytes:
    """The first image of a sample. Raises BadImage where there is none, or a file is too large."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None or sample[suffix] == b"":
        raise BadImage("no image")
    # None stands for a file over its limit
    if sample[suffix] is None:
        raise BadImage("image over 256 MiB")
    if None in (sample.get("txt", b""), sample.get("json", b"")):
        raise BadImage("caption or json over 1 MiB")
    data: bytes = sample[suffix]
    return data


def _chosen_caption(sample: Sample, rng: random.Random) -> tuple[str, int]:
    """One of a sample's captions, and its hash. Raises BadImage where there is none."""
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
    return caption, number
