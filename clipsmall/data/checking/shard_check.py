"""The check of one shard: whole, indexed and, on request, every image decoded and its checksum
compared.
"""

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
    """Folders (of shards, or of split folders of shards), files, globs, brace lists -> shards,
    missing ones.

    Missing are shards named here, or that a `_stats.json`, an index or CLIP_benchmark's nshards.txt
    promises.

    Raises:
        ValueError: a path that names nothing, or something else than tars.
    """
    found = dict[Path, None]()
    missing = dict[Path, str]()
    for path in paths:
        names = list(braceexpand.braceexpand(path))
        for name in names:
            if Path(name).is_dir():
                shards, absent = _in_folder(Path(name))
                missing |= absent
            else:
                shards = [Path(p) for p in sorted(glob(name))] or (
                    [Path(name)] if Path(name).is_file() else []
                )
            if odd := [shard for shard in shards if shard.suffix != ".tar"]:
                raise ValueError(
                    f"{odd[0]}: not a .tar; compressed shards cannot be read at random, unpack them first"
                )
            if not shards and len(names) == 1 and not missing:
                raise ValueError(f"{name}: no shards there (*.tar)")
            if not shards and name.endswith(".tar"):
                missing[Path(name)] = "no such file"
            found |= dict.fromkeys(shards)
    if not found and not missing:
        raise ValueError(f"{' '.join(paths)}: no shards there (*.tar)")
    return list(found), [Problem(shard, f"{shard}: {reason}") for shard, reason in missing.items()]


def _in_folder(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    shards = sorted(folder.glob("[!.]*.tar"))
    missing = {}
    for suffix in ("_stats.json", ".index.parquet"):
        for side in sorted(folder.glob(f"[!.]*{suffix}")):
            shard = folder / f"{side.name.removesuffix(suffix)}.tar"
            if not shard.exists():
                missing[shard] = f"missing, but {side.name} is there"
    if lacking := unfinished(folder):
        missing[folder / RECORD] = lacking
    count = folder / "nshards.txt"
    if count.exists() and re.fullmatch(r"\d{1,6}", promised := count.read_text().strip()):
        for number in range(int(promised)):
            if not (shard := folder / f"{number}.tar").exists():
                missing[shard] = f"missing, but nshards.txt says {promised}"
    if not shards and not missing:
        for inner in sorted(
            inner for inner in folder.iterdir() if inner.is_dir() and any(inner.glob("[!.]*.tar"))
        ):
            more, absent = _in_folder(inner)
            shards += more
            missing |= absent
    return shards, missing


def check_shard(shard: Path, rebuild: bool, decode_images: bool) -> tuple[Path, Problem | None]:
    """Make the index that is missing (or every one), decode if asked; say why a shard cannot be
    used.
    """
    try:
        if rebuild or decode_images or not index_path(shard).exists():
            table = build_index(shard)
            if decode_images:
                table = table.set_column(
                    table.column_names.index("status"), "status", pa.array(_decoded(shard, table))
                )
            write_index(shard, table)
        else:
            check_stats(shard, len(read_index(shard, ["key"])))
    except (ValueError, AttributeError, OSError, OverflowError) as error:
        reason = str(error) if str(shard) in str(error) else f"{shard}: {error}"
        return shard, Problem(shard, reason)
    return shard, None


def _decoded(shard: Path, table: pa.Table) -> list[str]:
    """The status of every pair, after its image was decoded and compared with the json's `sha256`.

    img2dataset's `sha256` is of the picture as downloaded, before it was resized. So a checksum
    counts only in a shard where most of them are right.
    """
    status = []
    differs = []
    agree = 0
    with shard.open("rb") as file, warnings.catch_warnings():
        # odd EXIF; the picture decodes or it does not
        warnings.filterwarnings("ignore", module="PIL")
        for number, row in enumerate(table.to_pylist()):
            status.append(row["status"])
            if row["image_size"] <= 0:
                continue
            if (promised := _promised_sha256(file.fileno(), row)) is not None:
                agree += promised == row["sha256"]
                differs += [number] if promised != row["sha256"] else []
            try:
                decode(os.pread(file.fileno(), row["image_size"], row["image_offset"]))
            except BadImage as reason:
                status[-1] = status[-1] or str(reason)
    for number in differs if agree >= len(differs) else []:
        status[number] = status[number] or SHA_DIFFERS
    return status


def _promised_sha256(descriptor: int, row: dict[str, Any]) -> str | None:
    if row["json_size"] <= 0 or row["status"] in ("broken json", "caption or json over 1 MiB"):
        return None
    try:
        fields = json.loads(os.pread(descriptor, row["json_size"], row["json_offset"]))
    except (ValueError, RecursionError):
        return None
    value = fields.get("sha256") if isinstance(fields, dict) else None
    return value.lower() if isinstance(value, str) and value else None


def pair_image(row: "pd.Series[Any]") -> bytes:
    """The image's bytes of a row of the index, with its `shard`."""
    return _bytes(row, "image")


def pair_captions(row: "pd.Series[Any]") -> list[str]:
    """The captions of a row of the index, with its `shard`; [] when they cannot be read."""
    try:
        fields = json.loads(_bytes(row, "json") or b"{}")
        return captions_of(_bytes(row, "text"), fields if isinstance(fields, dict) else {})
    except (ValueError, RecursionError):
        return []


def _bytes(row: "pd.Series[Any]", member: str) -> bytes:
    if row[f"{member}_size"] <= 0:
        return b""
    with open(row["shard"], "rb") as file:
        return os.pread(file.fileno(), int(row[f"{member}_size"]), int(row[f"{member}_offset"]))
