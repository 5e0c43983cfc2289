"""Rows of a table, selected and merged into numbered image-text pairs."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from clipsmall.data.making.sources import Source, SourceRequest
from clipsmall.data.making.stores import Place
from clipsmall.data.making.tables import CAPTION_NAMES, columns_of, pick

RESERVED = (
    "key",
    "index",
    "caption",
    "captions",
    "status",
    "error_message",
    "width",
    "height",
    "sha256",
    "label",
)


@dataclass(frozen=True, slots=True)
class SourcePair:
    """One image and its captions, before any image is read."""

    # the stable number
    index: int
    image: Place
    # clean; [] = the pair cannot be used
    captions: list[str]
    # for the json
    fields: dict[str, Any]


def pairs_of(source: Source, request: SourceRequest) -> list[SourcePair]:
    """The rows that `--where` selects, those of one image merged, numbered in the order of the
    table.

    Rows are merged by `--group`, else by the image's path: captions are put together, everything
    else is the first row's. Images inside the table (bytes) are merged by `--group` only.

    Raises:
        ValueError: a column that is not there, a bad query, nothing selected.
    """
    frame = _selected(source.frame, request.where)
    captions = list(request.caption)
    if not captions:
        captions = [pick(columns_of(frame), CAPTION_NAMES, None, "--caption")]
    label = request.label or source.label
    _refuse_unknown_columns(frame, request, captions, label)
    places = _places(frame, source.image)
    keys = _group_keys(frame, request.group, places)
    fields = _field_columns(frame, request.keep, label)
    texts = [frame[name].tolist() for name in captions]
    found: dict[Any, SourcePair] = {}
    for row, (key, place) in enumerate(zip(keys, places, strict=True)):
        if key not in found:
            values = {name: _plain(column[row]) for name, column in fields.items()}
            found[key] = SourcePair(len(found), place, [], values)
        mine = found[key].captions
        for column in texts:
            # only against other cells: a list may repeat itself
            mine += [
                text
                for text in clean_captions(column[row], request.caption_split)
                if text not in mine
            ]
    return list(found.values())


def _refuse_unknown_columns(
    frame: pd.DataFrame, request: SourceRequest, captions: list[str], label: str | None
) -> None:
    columns = columns_of(frame)
    asked: dict[str, Iterable[str | None]] = {
        "--caption": captions,
        "--label": [label],
        "--keep": request.keep,
        "--group": [request.group],
    }
    for option, names in asked.items():
        for name in names:
            if name is not None:
                pick(columns, (), name, option)


def _places(frame: pd.DataFrame, image: str | None) -> list[Place]:
    """Where the store has the image of each row; "" for a row without one."""
    if image is None:
        places: list[Place] = frame.index.tolist()
        return places
    return [_path(cell) for cell in frame[image]]


def _path(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    return "" if pd.isna(cell) else str(cell)


def _group_keys(frame: pd.DataFrame, group: str | None, places: list[Place]) -> list[Any]:
    """What rows of one image have in common; rows without it are not merged."""
    if group is not None:
        column = frame[group]
    else:
        # without a name there is no common image
        named = [None if place == "" else place for place in places]
        column = pd.Series(named, dtype=object)
    keys = []
    for row, value in enumerate(column.tolist()):
        keys.append(("no key", row) if pd.isna(value) else value)
    return keys


def _field_columns(
    frame: pd.DataFrame, keep: Iterable[str], label: str | None
) -> dict[str, list[Any]]:
    """Columns for the json, by the name that they have there."""
    found = {}
    for name in keep:
        field = f"input_{name}" if name in RESERVED else name
        found[field] = _values(frame[name])
    if label is not None:
        found["label"] = _values(frame[label])
    return found


def clean_captions(value: Any, split: str | None = None) -> list[str]:
    """The captions in one cell: a string (cut at `split`), or a list of them, else none.

    Runs of white space become one space. NUL and lone surrogates, which no tokenizer or UTF-8 file
    takes, are replaced.
    """
    if isinstance(value, str):
        found = []
        for part in value.split(split) if split else [value]:
            whole = part.replace("\0", " ").encode("utf-8", "replace").decode()
            text = " ".join(whole.split())
            if text:
                found.append(text)
        return found
    if isinstance(value, (list, tuple, np.ndarray)):
        return [text for each in value for text in clean_captions(each, split)]
    return []


def pairs_hash(pairs: Iterable[SourcePair]) -> str:
    """SHA-256 over places, captions and fields of all pairs."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.image, pair.captions, pair.fields]).encode())
    return digest.hexdigest()


def _selected(frame: pd.DataFrame, where: str | None) -> pd.DataFrame:
    if where is None:
        return frame
    try:
        chosen = frame.query(where, engine="python")
    except Exception as error:
        # a user's expression can raise anything
        raise ValueError(
            f"--where {where!r}: {error}; columns: {', '.join(map(str, frame))}"
        ) from None
    if chosen.empty:
        raise ValueError(f"--where {where!r}: selects none of {len(frame)} rows")
    return chosen


def _values(column: pd.Series) -> list[Any]:
    """The cells of a column; whole numbers that pandas made floats, beside empty cells, are whole.

    Raises:
        ValueError: numbers that a float cannot tell from the next.
    """
    if (
        not pd.api.types.is_float_dtype(column)
        or not column.isna().any()
        or (column.dropna() % 1).any()
    ):
        return column.tolist()
    if (column.abs() >= 2**53).any():
        raise ValueError(
            f"column {column.name}: long numbers beside empty cells lose their last digits; "
            "fill the cells"
        )
    return [None if pd.isna(value) else int(value) for value in column]


def _plain(value: Any) -> Any:
    """A value that JSON can hold; missing ones become None."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if (
        value is None
        or value is pd.NA
        or value is pd.NaT
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        return None
    return value if isinstance(value, bool | int | float) else str(value)
