"""Tables of images and captions (CSV, TSV, JSON lines, Parquet) and their usual columns."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_NAMES = (
    "image",
    "img",
    "picture",
    "file_name",
    "filename",
    "image_path",
    "filepath",
    "path",
    "file",
    "jpg",
    "png",
    "webp",
)
CAPTION_NAMES = (
    "caption",
    "captions",
    "text",
    "texts",
    "sentence",
    "sentences",
    "description",
    "name",
    "title",
)


def pick(columns: Sequence[str], names: Sequence[str], asked: str | None, option: str) -> str:
    """The column asked for, else the first that bears a usual name (whatever its case).

    Raises:
        ValueError: no such column, or none that looks right.
    """
    if asked is not None:
        if asked in columns:
            return asked
        raise ValueError(f"{option} {asked}: no such column; there are: {', '.join(columns)}")
    lower = {str(column).lower(): column for column in reversed(columns)}
    for name in names:
        if name in lower:
            return lower[name]
    raise ValueError(
        f"which column? say {option} NAME; there are: {', '.join(map(str, columns)) or 'none'}"
    )


def columns_of(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns]


def read_table(name: str, data: Any, texts: Iterable[str] = ()) -> pd.DataFrame:
    """A table from an open file, by the ending of its name.

    Image and caption columns, and those named in `texts`, stay text ("007" and "null" are captions
    too); only an empty cell is missing.

    Raises:
        ValueError: not UTF-8, broken, or empty.
    """
    suffix = PurePosixPath(name).suffix.lower()
    try:
        if suffix == ".parquet":
            frame = pd.read_parquet(data)
        elif suffix in (".jsonl", ".ndjson"):
            # pandas guesses dates
            frame = pd.DataFrame([json.loads(line) for line in data if line.strip()])
        else:
            sep = "\t" if suffix == ".tsv" else ","
            header = columns_of(pd.read_csv(data, sep=sep, nrows=0, encoding="utf-8-sig"))
            data.seek(0)
            texts = {*IMAGE_NAMES, *CAPTION_NAMES, *texts}
            frame = pd.read_csv(
                data,
                sep=sep,
                encoding="utf-8-sig",
                keep_default_na=False,
                na_values=[""],
                low_memory=False,
                dtype={
                    column: str for column in header if column in texts or column.lower() in texts
                },
            )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 at byte {error.start}; convert it first (iconv -t utf-8)"
        ) from None
    except (ValueError, pa.ArrowException) as error:
        # pandas' own parser errors are ValueErrors
        raise ValueError(f"{name}: cannot be read: {str(error).splitlines()[0]}") from None
    if frame.empty:
        raise ValueError(f"{name}: has no rows")
    # rows that are lists have numbers
    frame.columns = columns_of(frame)
    return frame.reset_index(drop=True)


def parquet_schema(table: Path) -> pa.Schema:
    """Names and types of a Parquet file. Raises ValueError when it is broken."""
    try:
        return pq.read_schema(table)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table}: not a whole Parquet file ({error})") from None
