"""One tar shard in img2dataset's layout, with an index and a `_stats.json` beside it."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import webdataset

from clipsmall.data import build_index, write_index
from clipsmall.storage import atomic

# img2dataset's keys have four digits for a pair within its shard
PAIRS_PER_SHARD = 10_000


@dataclass
class ShardSample:
    """An encoded image with its captions, on its way into a shard."""

    # the pair's stable number in the data set
    index: int
    image: bytes
    # jpg, png or webp, without a dot
    suffix: str
    captions: list[str]
    # pixels
    width: int
    height: int
    # further json fields: label, vendor, ...
    fields: dict[str, Any] = field(default_factory=dict)


def sample_members(key: str, sample: ShardSample) -> dict[str, Any]:
    """A sample as img2dataset lays it out: key.jpg, key.txt, key.json."""
    record = {
        **sample.fields,
        "key": key,
        "index": sample.index,
        "caption": sample.captions[0],
        **({"captions": sample.captions} if len(sample.captions) > 1 else {}),
        "status": "success",
        "error_message": None,
        "width": sample.width,
        "height": sample.height,
        "sha256": hashlib.sha256(sample.image).hexdigest(),
    }
    return {
        "__key__": key,
        sample.suffix: sample.image,
        "txt": "\n".join(sample.captions).encode(),
        "json": json.dumps(record, ensure_ascii=False, allow_nan=False).encode(),
    }


def write_shard(
    folder: Path, number: int, samples: Iterable[ShardSample], failures: Counter[str] | None = None
) -> int:
    """Write `NNNNN.tar`, its index and, last, `NNNNN_stats.json` (the mark that the shard is
    complete).

    `samples` may be a generator that counts what it could not use into `failures` while it runs.
    The bytes of the tar depend on the samples only, not on when or where it was written. Returns
    the number of pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    shard = folder / f"{number:05d}.tar"
    written = 0
    with (
        atomic.new_file(shard) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0) as tar,
    ):
        for written, sample in enumerate(samples, start=1):
            tar.write(sample_members(f"{number:05d}{written - 1:04d}", sample))
    stats_path = folder / f"{number:05d}_stats.json"
    stats_path.unlink(missing_ok=True)
    write_index(shard, build_index(shard))
    failed = sum((failures or Counter()).values())
    stats = {
        "count": written + failed,
        "successes": written,
        "failed_to_download": 0,
        "failed_to_resize": failed,
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": {"success": written, **(failures or {})},
    }
    atomic.write_text(stats_path, json.dumps(stats, indent=2))
    return written
