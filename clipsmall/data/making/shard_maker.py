"""One shard from its pairs: each image is read, verified and perhaps encoded again."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from clipsmall.data import read_index
from clipsmall.data.index import MAX_TEXT_BYTES
from clipsmall.data.making.pairs import SourcePair
from clipsmall.data.making.shard_writer import PAIRS_PER_SHARD, ShardSample, write_shard
from clipsmall.data.making.stores import MISSING, UNREADABLE, ImageStore
from clipsmall.data.preprocess import BadImage, decode

NO_CAPTION = "empty caption"
# Pillow's name -> ours
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# quality of jpg and webp written here
QUALITY = 95
# number of names kept per reason
EXAMPLES = 3


@dataclass(frozen=True)
class ShardRecipe:
    """How pairs become shards: with the pairs, all that the tars' bytes depend on."""

    # pixels of the short side
    resize: int | None = None
    format: str = "keep"
    pairs_per_shard: int = PAIRS_PER_SHARD
    # seed; None = the order of the table
    shuffle: int | None = 0


class Job(NamedTuple):
    """One shard to make, as it travels to a worker."""

    number: int
    pairs: list[SourcePair]


@dataclass
class Tally:
    """What became of the pairs of one shard, or of all."""

    pairs: int = 0
    written: int = 0
    # number of pairs read by this run, not by an earlier one
    made: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def fail(self, reason: str, name: str) -> None:
        """Count a pair that cannot be used; the first few names are kept."""
        self.failures[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < EXAMPLES:
            names.append(name)

    def lines(self) -> list[str]:
        """One line per reason, most common first."""
        found = []
        for reason, count in self.failures.most_common():
            line = f"{count:,} {reason}"
            # shards of an earlier run have counts without names
            names = self.examples.get(reason)
            if names:
                line += f", e.g. {', '.join(names)}"
            found.append(line)
        return found

    def add(self, other: "Tally") -> None:
        """Add the counts of another shard."""
        self.pairs += other.pairs
        self.written += other.written
        self.made += other.made
        self.failures.update(other.failures)
        for reason, names in other.examples.items():
            both = self.examples.get(reason, []) + names
            self.examples[reason] = both[:EXAMPLES]


def stored(data: bytes, recipe: ShardRecipe) -> tuple[bytes, str, int, int]:
    """The bytes that the shard shall hold, their suffix, and the upright picture's width and height
    (pixels).

    Raises:
        BadImage: the picture cannot be decoded, or not be written in the format asked for.
    """
    picture = decode(data)
    with Image.open(BytesIO(data)) as header:
        suffix = SUFFIXES.get(header.format or "")
    size = picture.size
    if recipe.resize is not None and min(size) > recipe.resize:
        scale = recipe.resize / min(size)
        size = (
            max(round(size[0] * scale), recipe.resize),
            max(round(size[1] * scale), recipe.resize),
        )
    wanted = recipe.format if recipe.format != "keep" else suffix or "png"
    if size == picture.size and wanted == suffix:
        return data, suffix, *size
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    out = BytesIO()
    # a CMYK picture's colour profile does not fit its RGB copy
    picture.info = {}
    try:
        picture.save(out, "JPEG" if wanted == "jpg" else wanted, quality=QUALITY)
    except (OSError, ValueError):
        # too long for the format: 16,383 pixels of webp, 65,535 of jpg
        raise BadImage(f"cannot be written as {wanted}") from None
    return out.getvalue(), wanted, *size


def make_shard(job: Job, store: ImageStore, recipe: ShardRecipe, out: Path) -> Tally:
    """Read, verify and write the pairs of one shard; bad ones are left out and counted."""
    tally = Tally(pairs=len(job.pairs), made=len(job.pairs))

    def samples() -> Iterator[ShardSample]:
        for pair in job.pairs:
            try:
                if not pair.captions:
                    raise BadImage(NO_CAPTION)
                # in bytes, twice: in .txt and .json
                if sum(map(len, pair.captions)) > MAX_TEXT_BYTES // 8:
                    raise BadImage("captions too long")
                image, suffix, width, height = stored(store.read(pair.image), recipe)
            except BadImage as reason:
                tally.fail(str(reason), str(pair.image))
                continue
            yield ShardSample(pair.index, image, suffix, pair.captions, width, height, pair.fields)

    with warnings.catch_warnings():
        # odd EXIF and the like; the picture decodes or it does not
        warnings.filterwarnings("ignore", module="PIL")
        tally.written = write_shard(out, job.number, samples(), tally.failures)
    return tally


def finished(out: Path, job: Job, store: ImageStore) -> Tally | None:
    """What an earlier run counted for a shard that is whole.

    None when the shard has to be made, or when files that could not be read then can be read now.
    """
    try:
        stats = json.loads((out / f"{job.number:05d}_stats.json").read_text())
        index = read_index(out / f"{job.number:05d}.tar", ["index"])
        written = set(index["index"].to_pylist())
        if stats["count"] != len(job.pairs) or stats["successes"] != len(written):
            return None
        failures = Counter(stats["status_dict"])
        del failures["success"]
        # a missing image may have been added since
        unreadable_before = failures[MISSING] + failures[UNREADABLE]
        if unreadable_before:
            absent = [pair for pair in job.pairs if pair.index not in written and pair.captions]
            unreadable_now = sum(_unreadable(pair, store) for pair in absent)
            if unreadable_now < unreadable_before:
                return None
        return Tally(len(job.pairs), len(written), failures=failures)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _unreadable(pair: SourcePair, store: ImageStore) -> bool:
    try:
        store.read(pair.image)
    except BadImage as reason:
        return str(reason) in (MISSING, UNREADABLE)
    return False
