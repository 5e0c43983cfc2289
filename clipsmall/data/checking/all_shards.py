"""Checks all shards of a data set: a report, a table of all pairs, and a sample to look at."""

import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from clipsmall.data.checking.contact_sheet import SheetCell
from clipsmall.data.checking.shard_check import Problem, check_shard, pair_captions, pair_image
from clipsmall.data.checking.shard_report import ShardReport, report_of
from clipsmall.data.index import read_index
from clipsmall.data.preprocess import BadImage, decode
from clipsmall.data.processes import in_processes


def check_shards(
    shards: list[Path],
    missing: list[Problem],
    rebuild: bool = False,
    decode: bool = False,
    workers: int = 1,
) -> tuple[ShardReport, pd.DataFrame]:
    """Check every shard; an unusable shard does not stop the check of the others.

    Args:
        missing: shards that should exist but do not, for the report.
        rebuild: make every index again, not only missing ones.
        decode: decode every image, and mark broken ones in the index.
        workers: number of processes, each checking one shard at a time.

    Returns:
        The report, and the indexes of all usable shards as one table with the column `shard`.
    """
    found: dict[Path, Problem | None] = {}
    check = partial(check_shard, rebuild=rebuild, decode_images=decode)
    with tqdm(total=len(shards), unit="shard", desc="check", disable=None) as bar:
        checked = in_processes(check, shards, workers)
        for shard, problem in checked:
            found[shard] = problem
            bar.update()
    # in the order of the shards, whichever finished first
    problems = list(missing)
    good = list[Path]()
    for shard in shards:
        problem = found[shard]
        if problem is None:
            good.append(shard)
        else:
            problems.append(problem)
    tables = []
    size = 0
    for shard in good:
        index = read_index(shard).to_pandas()
        tables.append(index.assign(shard=str(shard)))
        size += shard.stat().st_size

    # the report needs the column `status` even if no shard is usable
    frame = pd.DataFrame({"status": []})
    if tables:
        frame = pd.concat(tables, ignore_index=True)

    report = report_of(frame, problems, len(good), size, pair_captions, decoded=decode)
    return report, frame


def sample_cells(frame: pd.DataFrame, most: int) -> list[SheetCell]:
    """At most `most` evenly spaced usable pairs, or bad ones if no pair is usable.

    Args:
        frame: the table of all pairs that `check_shards` returns.
    """
    if frame.empty:
        return []
    pictures = frame[frame["image_size"] > 0]
    good = pictures[pictures["status"] == ""]
    if good.empty:
        good = pictures
    # evenly spaced, without repeats
    count = min(most, len(good))
    places = np.linspace(0, len(good) - 1, count)
    rows = np.unique(places.round().astype(int))

    cells = []
    for _, row in good.iloc[rows].iterrows():
        cells.append(_cell(row))
    return cells


def _cell(row: pd.Series) -> SheetCell:
    captions = pair_captions(row) or [f"({row['status']})"]
    caption = captions[0]
    if len(captions) > 1:
        caption += f" (+{len(captions) - 1})"
    picture: Image.Image | str
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            picture = decode(pair_image(row))
    except BadImage as reason:
        picture = str(reason)
    return SheetCell(picture, caption)
