"""A run that makes all shards of a data set: over processes, and going on where a former one
stopped.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipsmall.data.catalog import RECORD
from clipsmall.data.making.pairs import SourcePair, pairs_hash
from clipsmall.data.making.shard_maker import Job, ShardRecipe, Tally, finished, make_shard
from clipsmall.data.making.stores import ImageStore
from clipsmall.data.order import permutation
from clipsmall.data.processes import in_processes
from clipsmall.storage import atomic, locks


class TooManyErrors(ValueError):
    """More pairs could not be used than `--max_error_rate` allows."""


def make_shards(
    pairs: list[SourcePair],
    store: ImageStore,
    recipe: ShardRecipe,
    out: Path,
    arguments: dict[str, Any],
    workers: int = 1,
    overwrite: bool = False,
    max_error_rate: float = 0.05,
) -> Tally:
    """Write all pairs into `out`, but for shards that a run with the same input and recipe has
    finished.

    Args:
        arguments: written into make_shards.json, and compared to say what has changed.
        max_error_rate: share of all pairs that may be unusable.

    Raises:
        ValueError: `out` holds other shards, or another command makes shards there.
        TooManyErrors: finished shards stay.
    """
    content = hashlib.sha256(
        json.dumps([asdict(recipe), pairs_hash(pairs), store.fingerprint()]).encode()
    ).hexdigest()
    order = (
        list(range(len(pairs)))
        if recipe.shuffle is None
        else permutation(len(pairs), recipe.shuffle).tolist()
    )
    size = recipe.pairs_per_shard
    jobs = [
        Job(number, [pairs[row] for row in order[number * size : (number + 1) * size]])
        for number in range(math.ceil(len(pairs) / size))
    ]
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locks.alone(out, "another command makes shards there; wait, or choose another folder"):
        _prepare(
            out, {"arguments": arguments, "pairs": len(pairs), "fingerprint": content}, overwrite
        )
        total = Tally()
        left = list[Job]()
        for job in jobs:
            if tally := finished(out, job, store):
                total.add(tally)
            else:
                left.append(job)
        _check(total, len(pairs), max_error_rate)
        with tqdm(
            total=len(pairs), initial=total.pairs, unit="pair", desc="shards", disable=None
        ) as bar:
            for tally in in_processes(
                partial(make_shard, store=store, recipe=recipe, out=out), left, workers
            ):
                total.add(tally)
                bar.update(tally.pairs)
                _check(total, len(pairs), max_error_rate)
    return total


def _check(total: Tally, pairs: int, max_error_rate: float) -> None:
    if (bad := total.failures.total()) > max_error_rate * pairs:
        raise TooManyErrors(
            f"{bad} of {total.pairs} pairs read so far cannot be used, more than --max_error_rate "
            f"{max_error_rate} of all {pairs}: {'; '.join(total.lines())}; once repaired, the same command goes on"
        )


def _prepare(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ready: refuse other shards, sweep what a killed run left, note what is made
    here.
    """
    # tuples become lists, as in the file
    record = json.loads(json.dumps(record))
    path = out / RECORD
    if overwrite:
        # stats first: without them no shard counts as finished, wherever this is interrupted
        for pattern in ("_stats.json", ".index.parquet", ".tar"):
            for old in out.glob(f"*{pattern}"):
                if re.fullmatch(r"\d{5,}", old.name.removesuffix(pattern)):
                    old.unlink()
        path.unlink(missing_ok=True)
    elif path.exists():
        _compare(path, record)
    elif any(out.glob("*.tar")):
        raise ValueError(
            f"{out}: holds shards that make_shards did not make; choose another folder, or --overwrite"
        )
    # the lock says that no other command is writing here
    atomic.sweep(out)
    atomic.write_text(path, json.dumps(record, indent=2, ensure_ascii=False))


def _compare(path: Path, record: dict[str, Any]) -> None:
    try:
        old = json.loads(path.read_text())
        same = old["fingerprint"] == record["fingerprint"]
        before = dict(old["arguments"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: unreadable; choose another folder, or --overwrite") from None
    if not same:
        now = record["arguments"]
        changed = [
            f"{name} {before.get(name)!r} -> {value!r}"
            for name, value in now.items()
            if before.get(name) != value
        ]
        reason = (
            f"made with other arguments: {', '.join(changed)}"
            if changed
            else "its input has changed since"
        )
        raise ValueError(
            f"{path.parent}: {reason}; choose another folder, or --overwrite to make it anew"
        )
