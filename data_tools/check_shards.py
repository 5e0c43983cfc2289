"""Check shards, make their missing indexes, and show what is in them.

    python -m data_tools.check_shards data/train              # index what has no index, report
    python -m data_tools.check_shards data/train --decode     # find broken images too: training skips them
    python -m data_tools.check_shards 'laion/{00000..00099}.tar' --rebuild --workers 8

Reads any WebDataset: make_shards', img2dataset's, DataComp's, CLIP_benchmark's. The report goes to
the terminal and to check.json, a sheet of evenly picked pairs to check.png. Exit code: 0 all shards
usable, 1 not all, 2 wrong use.
"""

import argparse
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from clipsmall.data import read_index
from clipsmall.data.preprocess import BadImage, decode
from data_tools.contact_sheet import SheetCell, draw_sheet
from data_tools.pool import in_processes
from data_tools.shard_check import Problem, check_shard, find_shards, pair_captions, pair_image
from data_tools.shard_report import ShardReport, as_text, report_of

# pairs on the contact sheet
CELLS = 48


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 all shards usable, 1 some are not, 2 wrong use."""
    args = parser().parse_args(argv)
    try:
        shards, missing = find_shards(args.paths)
        report, frame = check(shards, missing, args.rebuild, args.decode, args.workers)
        first = Path(args.paths[0])
        folder = (
            first
            if first.is_dir()
            else (shards or [problem.shard for problem in missing])[0].parent
        )
        sheet = args.sheet or folder / "check.png"
        path = args.json or folder / "check.json"
        path.write_text(report.as_json())
        print(as_text(report))
        print(f"{'report':<14}{path}")
        if (cells := cells_of(frame)) and report.image_bytes:
            pictures = frame[frame["image_size"] > 0]
            title = f"{folder.resolve().name}: {report.title}"
            spread = {
                "characters in a caption": pictures["caption_chars"],
                "bytes in an image": pictures["image_size"],
            }
            draw_sheet(sheet, cells, spread, "pairs", title)
            print(f"{'sheet':<14}{sheet}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; indexes made so far stay", file=sys.stderr)
        return 130
    return 1 if report.unusable else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "check_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("paths", nargs="+", metavar="PATH", help="folders, .tar files, globs, {000..123} lists")
    add(
        "--rebuild",
        action="store_true",
        help="make every index anew, e.g. when shards were replaced",
    )
    add(
        "--decode",
        action="store_true",
        help="decode every image, compare its sha256; the index notes the bad ones",
    )
    add(
        "--json",
        type=Path,
        metavar="OUT.json",
        help="report (default: check.json beside the shards)",
    )
    add(
        "--sheet",
        type=Path,
        metavar="OUT.png",
        help="contact sheet (default: check.png beside the shards)",
    )
    add(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        metavar="N",
        help="processes, one shard each",
    )
    return made


def check(
    shards: list[Path],
    missing: list[Problem],
    rebuild: bool = False,
    decode: bool = False,
    workers: int = 1,
) -> tuple[ShardReport, pd.DataFrame]:
    """Check all shards; one that cannot be used stops nothing.

    Returns the report and the index of all usable shards as one table, with the column `shard`.
    """
    found: dict[Path, Problem | None] = {}
    work = partial(check_shard, rebuild=rebuild, decode_images=decode)
    with tqdm(total=len(shards), unit="shard", desc="check", disable=None) as bar:
        for shard, problem in in_processes(work, shards, workers):
            found[shard] = problem
            bar.update()
    problems = missing + [problem for shard in shards if (problem := found[shard])]
    good = [shard for shard in shards if found[shard] is None]
    tables = [read_index(shard).to_pandas().assign(shard=str(shard)) for shard in good]
    frame = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"status": []})
    size = sum(shard.stat().st_size for shard in good)
    return report_of(frame, problems, len(good), size, pair_captions, decoded=decode), frame


def cells_of(frame: pd.DataFrame) -> list[SheetCell]:
    """Evenly picked good pairs, or bad ones when there are no others."""
    if frame.empty:
        return []
    good = frame[(frame["status"] == "") & (frame["image_size"] > 0)]
    good = good if len(good) else frame[frame["image_size"] > 0]
    rows = np.unique(np.linspace(0, len(good) - 1, min(CELLS, len(good))).round().astype(int))
    cells = []
    for _, row in good.iloc[rows].iterrows():
        captions = pair_captions(row) or [f"({row['status']})"]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="PIL")
                picture: Image.Image | str = decode(pair_image(row))
        except BadImage as reason:
            picture = str(reason)
        more = f" (+{len(captions) - 1})" if len(captions) > 1 else ""
        cells.append(SheetCell(picture, captions[0] + more))
    return cells


if __name__ == "__main__":
    sys.exit(main())
