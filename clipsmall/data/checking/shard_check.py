"""Checks one shard: it is complete and indexed and, on request, its images decode."""

import json
import os
import re
import warnings
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import pandas as pd
import pyarrow as pa

from clipsmall.data import (
    build_index,
    captions_of,
    check_stats,
    index_path,
    read_index,
    write_index,
)
from clipsmall.data.catalog import RECORD, unfinished
from clipsmall.data.preprocess import BadImage, decode

SHA_DIFFERS = "sha256 differs"


class Problem(NamedTuple):
    """Why a shard cannot be used."""

    shard: Path
    reason: str


def find_shards(paths: list[str]) -> tuple[list[Path], list[Problem]]:
    """All shards that the paths name, and those that should exist but do not.

    Args:
        paths: folders (of shards, or of splits with shards), files, globs and brace lists.

    Returns:
        The shards, and the missing ones: those that are named here, or for which there is a
        `_stats.json`, an index, or an entry in CLIP_benchmark's nshards.txt.

    Raises:
        ValueError: a path that names nothing, or something other than tars.
    """
    # a dict used as an ordered set: list a shard named by two paths only once
    found = dict[Path, None]()
    missing = dict[Path, str]()
    for path in paths:
        names = list(braceexpand.braceexpand(path))
        for name in names:
            shards, absent = _shards_named(name)
            missing |= absent
            # some shards of a brace list may be missing
            if not shards and len(names) == 1 and not missing:
                raise ValueError(f"{name}: no shards there (*.tar)")
            if not shards and name.endswith(".tar"):
                missing[Path(name)] = "no such file"
            found |= dict.fromkeys(shards)
    if not found and not missing:
        raise ValueError(f"{' '.join(paths)}: no shards there (*.tar)")
    problems = []
    for shard, reason in missing.items():
        problems.append(Problem(shard, f"{shard}: {reason}"))
    return list(found), problems


def _shards_named(name: str) -> tuple[list[Path], dict[Path, str]]:
    """The shards that a folder, file or glob names, and the missing ones by reason."""
    path = Path(name)
    missing = dict[Path, str]()
    if path.is_dir():
        shards, missing = _in_folder(path)
    else:
        shards = [Path(match) for match in sorted(glob(name))]
        # the name of a file may look like a glob
        if not shards and path.is_file():
            shards = [path]
    for shard in shards:
        if shard.suffix != ".tar":
            raise ValueError(
                f"{shard}: not a .tar; compressed shards cannot be read at random, "
                "unpack them first"
            )
    return shards, missing


def _in_folder(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The shards of a folder, or else those of its subfolders, and the missing ones by reason."""
    # a leading dot marks temporary files of killed processes
    shards = sorted(folder.glob("[!.]*.tar"))
    missing = _missing_in(folder)
    if shards or missing:
        return shards, missing
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and any(inner.glob("[!.]*.tar")):
            more, absent = _in_folder(inner)
            shards += more
            missing |= absent
    return shards, missing


def _missing_in(folder: Path) -> dict[Path, str]:
    """Missing shards that other files of the folder refer to, with the reason for each."""
    missing = dict[Path, str]()
    for suffix in ("_stats.json", ".index.parquet"):
        for side in sorted(folder.glob(f"[!.]*{suffix}")):
            stem = side.name.removesuffix(suffix)
            shard = folder / f"{stem}.tar"
            if not shard.exists():
                missing[shard] = f"missing, but {side.name} is there"
    # make_shards was interrupted
    lacking = unfinished(folder)
    if lacking:
        missing[folder / RECORD] = lacking

    # CLIP_benchmark's layout
    count = folder / "nshards.txt"
    promised = ""
    if count.exists():
        promised = count.read_text().strip()
    if re.fullmatch(r"\d{1,6}", promised):
        for number in range(int(promised)):
            shard = folder / f"{number}.tar"
            if not shard.exists():
                missing[shard] = f"missing, but nshards.txt says {promised}"
    return missing


def check_shard(shard: Path, rebuild: bool, decode_images: bool) -> tuple[Path, Problem | None]:
    """Check one shard; make its index if it is missing or `rebuild` is set.

    Args:
        rebuild: make the index again even if there is one.
        decode_images: decode every image, and mark broken ones in the index.

    Returns:
        The shard, and why it is unusable (None = it is usable).
    """
    try:
        if rebuild or decode_images or not index_path(shard).exists():
            table = build_index(shard)
            if decode_images:
                # replace the column in its position
                status = pa.array(_decoded(shard, table))
                column = table.column_names.index("status")
                table = table.set_column(column, "status", status)
            write_index(shard, table)
        else:
            pairs = len(read_index(shard, ["key"]))
            check_stats(shard, pairs)
    except (ValueError, AttributeError, OSError, OverflowError) as error:
        reason = str(error)
        if str(shard) not in reason:
            reason = f"{shard}: {reason}"
        return shard, Problem(shard, reason)
    return shard, None


def _decoded(shard: Path, table: pa.Table) -> list[str]:
    """The status of every pair after decoding its image and checking the json's `sha256`.

    img2dataset stores the `sha256` of the image as downloaded, before resizing. So checksums are
    used only in a shard where most of them match.
    """
    status = []
    differs = []
    agree = 0
    with shard.open("rb") as file, warnings.catch_warnings():
        # ignore Pillow's warnings, such as those about odd EXIF; only decoding counts
        warnings.filterwarnings("ignore", module="PIL")
        for number, row in enumerate(table.to_pylist()):
            status.append(row["status"])
            if row["image_size"] <= 0:
                continue
            promised = _promised_sha256(file.fileno(), row)
            if promised == row["sha256"]:
                agree += 1
            elif promised is not None:
                differs.append(number)
            try:
                decode(os.pread(file.fileno(), row["image_size"], row["image_offset"]))
            except BadImage as reason:
                status[-1] = status[-1] or str(reason)
    if agree >= len(differs):
        for number in differs:
            status[number] = status[number] or SHA_DIFFERS
    return status


def _promised_sha256(descriptor: int, row: dict[str, Any]) -> str | None:
    is_unreadable = row["status"] in ("broken json", "caption or json over 1 MiB")
    if row["json_size"] <= 0 or is_unreadable:
        return None

    try:
        text = os.pread(descriptor, row["json_size"], row["json_offset"])
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None

    # json of other programs may hold anything
    if not isinstance(fields, dict):
        return None
    value = fields.get("sha256")
    if not isinstance(value, str) or not value:
        return None
    return value.lower()


def pair_image(row: "pd.Series[Any]") -> bytes:
    """The bytes of the image in a row of the index, which must have the column `shard`."""
    return _bytes(row, "image")


def pair_captions(row: "pd.Series[Any]") -> list[str]:
    """The captions of a row of the index (with column `shard`); [] if they cannot be read."""
    try:
        fields = json.loads(_bytes(row, "json") or b"{}")
        # json of other programs may hold anything
        if not isinstance(fields, dict):
            fields = {}
        text = _bytes(row, "text")
        return captions_of(text, fields)
    except (ValueError, RecursionError):
        return []


def _bytes(row: "pd.Series[Any]", member: str) -> bytes:
    size = int(row[f"{member}_size"])
    offset = int(row[f"{member}_offset"])
    # the pair has no such file
    if size <= 0:
        return b""

    shard = row["shard"]
    with open(shard, "rb") as file:
        descriptor = file.fileno()
        return os.pread(descriptor, size, offset)
