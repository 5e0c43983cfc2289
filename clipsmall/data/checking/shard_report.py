"""The report on a data set, made from the indexes of its shards."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from clipsmall.data.checking.shard_check import Problem

EXAMPLES = 3
# number of largest groups of duplicates in the report
LARGEST = 10


@dataclass(frozen=True)
class Spread:
    """The distribution of a quantity over pairs."""

    least: int
    median: float
    mean: float
    p95: float
    most: int


@dataclass(frozen=True)
class Group:
    """Pairs that have the same caption or the same image."""

    pairs: int
    caption: str
    examples: list[str]


@dataclass(frozen=True)
class Duplicates:
    """Groups of two or more usable pairs with the same caption or image."""

    groups: int
    # number of pairs in all groups together
    pairs: int
    largest: list[Group]


@dataclass(frozen=True)
class Reason:
    """A reason why pairs are left out of training, with a count and examples."""

    pairs: int
    examples: list[str]


@dataclass(frozen=True)
class ShardReport:
    """The content of check.json."""

    # number of usable shards
    shards: int
    # reason by shard
    unusable: dict[str, str]
    # size of the usable shards
    bytes: int
    pairs: int
    good: int
    # whether this check decoded all images
    decoded: bool
    left_out: dict[str, Reason]
    # number of pairs with a .cls file
    labelled: int
    image_bytes: Spread | None
    caption_chars: Spread | None
    same_caption: Duplicates
    same_image: Duplicates
    # number of samples whose key occurs again in the shard; their files may not be adjacent
    same_key: int

    @property
    def title(self) -> str:
        plural = "" if self.shards == 1 else "s"
        return f"{self.good:,} good of {self.pairs:,} pairs in {self.shards:,} shard{plural}"

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def report_of(
    frame: pd.DataFrame,
    problems: list[Problem],
    shards: int,
    size: int,
    captions: Callable[["pd.Series[Any]"], list[str]],
    decoded: bool = False,
) -> ShardReport:
    """Compute the report.

    Args:
        frame: the indexes of all usable shards in one table, with the column `shard`.
        problems: the unusable shards.
        shards, size: number and bytes of the usable shards.
        captions: a function that reads the captions of a row, for the largest groups.
        decoded: whether all images were decoded.
    """
    good = frame[frame["status"] == ""]
    bad = frame[frame["status"] != ""]
    pictures = frame
    labelled = 0
    same_key = 0
    # without usable shards the table lacks these columns
    if len(frame):
        pictures = frame[frame["image_size"] > 0]
        has_label = frame["label_size"] > 0
        labelled = int(has_label.sum())
        is_repeated = frame.duplicated(["shard", "key"], keep=False)
        same_key = int(is_repeated.sum())

    # the most frequent reason first
    reasons = sorted(bad.groupby("status"), key=lambda each: -len(each[1]))
    left_out = {}
    for reason, rows in reasons:
        left_out[str(reason)] = Reason(len(rows), _names(rows))

    unusable = {}
    for problem in problems:
        unusable[str(problem.shard)] = problem.reason

    return ShardReport(
        shards=shards,
        unusable=unusable,
        bytes=size,
        pairs=len(frame),
        good=len(good),
        decoded=decoded,
        left_out=left_out,
        labelled=labelled,
        image_bytes=_spread(pictures["image_size"]) if len(pictures) else None,
        caption_chars=_spread(good["caption_chars"]) if len(good) else None,
        same_caption=_duplicates(good, "caption_hash", captions),
        same_image=_duplicates(good, "sha256", captions),
        same_key=same_key,
    )


def _spread(values: "pd.Series[int]") -> Spread:
    return Spread(
        least=int(values.min()),
        median=float(values.median()),
        mean=round(float(values.mean()), 1),
        p95=float(values.quantile(0.95)),
        most=int(values.max()),
    )


def _names(rows: pd.DataFrame) -> list[str]:
    first = rows[["shard", "key"]].head(EXAMPLES)
    return [f"{shard}:{key}" for shard, key in first.itertuples(index=False)]


def _duplicates(
    rows: pd.DataFrame, column: str, captions: Callable[["pd.Series[Any]"], list[str]]
) -> Duplicates:
    if rows.empty:
        return Duplicates(0, 0, [])
    # number of pairs by value, most frequent first
    counts = rows[column].value_counts()
    counts = counts[counts > 1]

    largest = []
    for value, count in counts.head(LARGEST).items():
        has_value = rows[column] == value
        same = rows[has_value]
        texts = captions(same.iloc[0])
        caption = texts[0] if texts else ""
        examples = _names(same)
        largest.append(Group(int(count), caption, examples))

    pairs = int(counts.sum())
    return Duplicates(len(counts), pairs, largest)


def as_text(report: ShardReport) -> str:
    """The report as text for a terminal."""
    pairs = f"{report.pairs:,}, {report.good:,} good"
    if not report.decoded:
        pairs += " (images not decoded)"
    megabytes = report.bytes / 1e6
    lines = [
        ("shards", f"{report.shards:,} usable, {megabytes:,.1f} MB"),
        ("pairs", pairs),
    ]

    for reason in report.unusable.values():
        lines.append(("UNUSABLE", reason))
    for name, why in report.left_out.items():
        examples = ", ".join(_short(example) for example in why.examples)
        lines.append(("left out", f"{why.pairs:,} {name}, e.g. {examples}"))
    if report.labelled:
        lines.append(("labels", f"{report.labelled:,} pairs have a class (.cls)"))
    for name, spread in (("image bytes", report.image_bytes), ("caption", report.caption_chars)):
        if spread:
            unit = " characters" if name == "caption" else ""
            middle = (
                f"{spread.least:,} least, {spread.median:,.0f} median, {spread.mean:,.0f} mean, "
            )
            lines.append((name, f"{middle}{spread.p95:,.0f} at 95 %, {spread.most:,} most{unit}"))

    for name, same in (("captions", report.same_caption), ("images", report.same_image)):
        if same.groups:
            lines += _duplicate_lines(name, same)

    if report.same_key:
        lines.append(
            ("same key", f"{report.same_key:,} samples; their members may not lie side by side")
        )
    return "\n".join(f"{name:<14}{text}" for name, text in lines)


def _duplicate_lines(name: str, same: Duplicates) -> list[tuple[str, str]]:
    """A heading line about duplicates, then one line for each of the five largest groups."""
    heading = f"{same.pairs:,} pairs in {same.groups:,} groups; the largest:"
    lines = [(f"same {name}", heading)]
    for group in same.largest[:5]:
        lines.append(("", f"{group.pairs:>7,} times {group.caption[:70]}"))
    return lines


def _short(name: str) -> str:
    return Path(name).name
