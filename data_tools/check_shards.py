"""Check shards, make their missing indexes, and show what is in them.

    python -m data_tools.check_shards data/train             # make missing indexes, report
    python -m data_tools.check_shards data/train --decode    # find broken images, which are skipped
    python -m data_tools.check_shards 'laion/{00000..00099}.tar' --rebuild --workers 8

Reads any WebDataset: of make_shards, img2dataset, DataComp, CLIP_benchmark. The report goes to the
terminal and to check.json, a sheet of evenly picked pairs to check.png. Exit code: 0 all shards
usable, 1 some are not, 2 wrong use.
"""

import argparse
import os
import sys
from pathlib import Path

import pandas as pd

from clipsmall.cli import refuse
from clipsmall.data.checking.all_shards import check_shards, sample_cells
from clipsmall.data.checking.contact_sheet import draw_sheet
from clipsmall.data.checking.shard_check import find_shards
from clipsmall.data.checking.shard_report import ShardReport, as_text

# number of pairs on the contact sheet
CELLS = 48


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 all shards usable, 1 some are not; ends with 2 on wrong use."""
    args = _parser().parse_args(argv)
    try:
        shards, missing = find_shards(args.paths)
        report, frame = check_shards(shards, missing, args.rebuild, args.decode, args.workers)
        folder = Path(args.paths[0])
        if not folder.is_dir():
            named = shards or [problem.shard for problem in missing]
            folder = named[0].parent
        path = args.json or folder / "check.json"
        path.write_text(report.as_json())
        print(as_text(report))
        print(f"{'report':<14}{path}")
        sheet = args.sheet or folder / "check.png"
        if _draw(sheet, report, frame, f"{folder.resolve().name}: {report.title}"):
            print(f"{'sheet':<14}{sheet}")
    except (ValueError, OSError, RuntimeError) as error:
        refuse(error)
    except KeyboardInterrupt:
        print("stopped; indexes made so far stay", file=sys.stderr)
        return 130
    return 1 if report.unusable else 0


def _draw(path: Path, report: ShardReport, frame: pd.DataFrame, title: str) -> bool:
    """Draw the contact sheet; False where there is nothing to show."""
    cells = sample_cells(frame, CELLS)
    if not cells or not report.image_bytes:
        return False
    pictures = frame[frame["image_size"] > 0]
    histograms = {
        "characters in a caption": pictures["caption_chars"],
        "bytes in an image": pictures["image_size"],
    }
    draw_sheet(path, cells, histograms, "pairs", title)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "check_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="folders, .tar files, globs, {000..123} lists")
    add(
        "--rebuild",
        action="store_true",
        help="make every index again, e.g. when shards were replaced",
    )
    add(
        "--decode",
        action="store_true",
        help="decode every image and compare its sha256; the index notes the bad ones",
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
