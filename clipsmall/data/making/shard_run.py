"""A run that makes all shards of a data set, and continues where an earlier one stopped."""

import hashlib
import json
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
    """Write all pairs into `out`, except for shards that a run with the same input and recipe has
    finished.

    Args:
        arguments: written into make_shards.json, and compared to say what has changed.
        max_error_rate: fraction of all pairs that may be unusable.

    Raises:
        ValueError: `out` holds other shards, or another command makes shards there.
        TooManyErrors: finished shards stay.
    """
    content = json.dumps([asdict(recipe), pairs_hash(pairs), store.fingerprint()])
    record = {
        "arguments": arguments,
        "pairs": len(pairs),
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
    }
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locks.exclusive(out, "another command makes shards there; wait, or choose another folder"):
        _prepare(out, record, overwrite)
        total = Tally()
        to_make = list[Job]()
        for job in _jobs(pairs, recipe):
            tally = finished(out, job, store)
            if tally is None:
                to_make.append(job)
            else:
                total.add(tally)
        _refuse_many_errors(total, len(pairs), max_error_rate)
        make = partial(make_shard, store=store, recipe=recipe, out=out)
        with tqdm(
            total=len(pairs), initial=total.pairs, unit="pair", desc="shards", disable=None
        ) as bar:
            for tally in in_processes(make, to_make, workers):
                total.add(tally)
                bar.update(tally.pairs)
                _refuse_many_errors(total, len(pairs), max_error_rate)
    return total


def _jobs(pairs: list[SourcePair], recipe: ShardRecipe) -> list[Job]:
    """Which pairs each shard gets."""
    order = list(range(len(pairs)))
    if recipe.shuffle is not None:
        order = permutation(len(pairs), recipe.shuffle).tolist()
    jobs = list[Job]()
    for number, first in enumerate(range(0, len(pairs), recipe.pairs_per_shard)):
        rows = order[first : first + recipe.pairs_per_shard]
        jobs.append(Job(number, [pairs[row] for row in rows]))
    return jobs


def _refuse_many_errors(total: Tally, pairs: int, max_error_rate: float) -> None:
    bad = total.failures.total()
    if bad > max_error_rate * pairs:
        reasons = "; ".join(total.lines())
        raise TooManyErrors(
            f"{bad} of {total.pairs} pairs read so far cannot be used, more than --max_error_rate "
            f"{max_error_rate} of all {pairs}: {reasons}; fix this, then run the command again"
        )


def _prepare(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder of other shards, delete what a killed run left, and write the record."""
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
            f"{out}: holds shards that make_shards did not make; choose another folder, "
            "or --overwrite"
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
        changed = []
        for name, value in record["arguments"].items():
            if before.get(name) != value:
                changed.append(f"{name} {before.get(name)!r} -> {value!r}")
        reason = "its input has changed since"
        if changed:
            reason = f"made with other arguments: {', '.join(changed)}"
        raise ValueError(
            f"{path.parent}: {reason}; choose another folder, or --overwrite to make it again"
        )
