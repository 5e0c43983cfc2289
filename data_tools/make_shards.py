"""Make WebDataset shards of your own images and captions.

    python -m data_tools.make_shards photos.csv data/photos
    python -m data_tools.make_shards emoji.csv data/emoji --images emoji.zip --where 'size > 9'
    python -m data_tools.make_shards folder_of_class_folders data/classes --resize 256 --format webp
    python -m data_tools.make_shards hf:lambdalabs/naruto-blip-captions data/naruto --split train

It may be interrupted at any time: the same command continues where it stopped.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from clipsmall.cli import refuse
from clipsmall.data.making.pairs import pairs_of
from clipsmall.data.making.shard_maker import ShardRecipe, Tally
from clipsmall.data.making.shard_run import TooManyErrors, make_shards
from clipsmall.data.making.shard_writer import PAIRS_PER_SHARD
from clipsmall.data.making.sources import SourceRequest, open_source


def _parser() -> argparse.ArgumentParser:
    """The command line, whose help is the manual."""
    made = argparse.ArgumentParser(
        "make_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "input",
        help=".csv .tsv .jsonl .parquet; a folder or zip of images (with metadata.csv, class "
        "folders, or a .txt beside each image, one caption per line); hf:NAME or hf:FOLDER",
    )
    made.add_argument("out", type=Path, help="folder for the shards")
    _add_columns(
        made.add_argument_group(
            "where things are (found by their usual names if not given)"
        ).add_argument
    )
    _add_output(made.add_argument_group("what is written, and how").add_argument)
    return made


def _add_columns(add: Callable[..., object]) -> None:
    add("--table", metavar="FILE", help="the table of a folder or zip of images")
    add(
        "--images",
        metavar="DIR|ZIP",
        help="what the table's paths are relative to (default: the table's folder)",
    )
    add("--split", help="of a hf: data set")
    add("--subset", help="configuration name of a hf: data set")
    add("--image", metavar="COLUMN", help="paths, or images themselves (Parquet, hf:)")
    names = {"metavar": "COLUMN[,COLUMN]", "action": "append", "default": []}
    add("--caption", **names, help="repeatable; a cell may hold a list")
    add("--caption_split", metavar="TEXT", help="cut each caption cell at this text, e.g. '|'")
    add("--label", metavar="COLUMN", help="class, kept as `label` in the json")
    add("--keep", **names, help="further columns for the json")
    add(
        "--group",
        metavar="COLUMN",
        help="rows with the same value here are one image with several captions (default: rows "
        "that name the same file)",
    )
    add(
        "--where",
        metavar="QUERY",
        help="""pandas query that selects rows, e.g. 'vendor != "twemoji"'""",
    )


def _add_output(add: Callable[..., object]) -> None:
    add(
        "--resize",
        type=_positive,
        metavar="PIXELS",
        help="shrink to this short side (bicubic); never enlarges",
    )
    add(
        "--format",
        choices=("keep", "jpg", "png", "webp"),
        default="keep",
        help="keep: jpg, png and webp stay as they are, byte for byte; anything else becomes png",
    )
    add(
        "--pairs_per_shard",
        type=_positive,
        default=PAIRS_PER_SHARD,
        metavar="N",
        help="at most and by default 10000",
    )
    add(
        "--shuffle",
        type=_seed,
        default=0,
        metavar="SEED|none",
        help="mix rows over shards (default: seed 0)",
    )
    workers = min(os.cpu_count() or 1, 8)
    add("--workers", type=_positive, default=workers, metavar="N", help="processes, one shard each")
    add(
        "--max_error_rate",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="stop above this fraction of unusable pairs",
    )
    add("--overwrite", action="store_true", help="delete the shards in OUT first")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 130 interrupted; ends with 1 for too many unusable pairs, 2 on
    wrong use.
    """
    args = _parser().parse_args(argv)
    start = time.time()
    try:
        request = _request(args)
        recipe = _recipe(args)
        if not 0 <= args.max_error_rate <= 1:
            raise ValueError(f"--max_error_rate {args.max_error_rate}: must lie between 0 and 1")
        source = open_source(request)
        pairs = pairs_of(source, request)
        arguments = {**asdict(request), **asdict(recipe)}
        tally = make_shards(
            pairs,
            source.store,
            recipe,
            args.out,
            arguments,
            args.workers,
            args.overwrite,
            args.max_error_rate,
        )
    except TooManyErrors as error:
        refuse(error, code=1)
    except (ValueError, OSError, RuntimeError) as error:
        refuse(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    captions = sum(len(pair.captions) for pair in pairs)
    print(_summary(args.out, tally, captions, time.time() - start))
    return 0


def _summary(out: Path, tally: Tally, captions: int, seconds: float) -> str:
    """A few lines for the terminal."""
    shards = sorted(out.glob("[!.]*.tar"))
    megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
    per_image = captions / max(tally.pairs, 1)
    # pairs of an earlier run took no time of this one
    speed = tally.made / seconds
    lines = [
        ("shards", f"{len(shards)} in {out}, {megabytes:,.1f} MB"),
        ("pairs", f"{tally.written:,} written of {tally.pairs:,}"),
        ("captions", f"{captions:,}, {per_image:.2f} an image"),
        ("time", f"{seconds:.1f} s, {speed:,.0f} pairs/s"),
    ]
    lines += [("left out", line) for line in tally.lines()]
    lines.append(("look", f"python -m data_tools.check_shards {out}"))
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def _request(args: argparse.Namespace) -> SourceRequest:
    values: dict[str, Any] = {each.name: getattr(args, each.name) for each in fields(SourceRequest)}
    for name in ("caption", "keep"):
        # options that may be repeated, each with several columns
        columns = [part.strip() for value in values[name] for part in value.split(",")]
        values[name] = tuple(column for column in columns if column)
    return SourceRequest(**values)


def _recipe(args: argparse.Namespace) -> ShardRecipe:
    if args.pairs_per_shard > PAIRS_PER_SHARD:
        raise ValueError(
            f"--pairs_per_shard {args.pairs_per_shard}: at most {PAIRS_PER_SHARD} "
            "(keys have four digits)"
        )
    values = {each.name: getattr(args, each.name) for each in fields(ShardRecipe)}
    return ShardRecipe(**values)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _seed(text: str) -> int | None:
    if text.lower() == "none":
        return None
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


if __name__ == "__main__":
    sys.exit(main())
