"""Self-contained HTML pages: templates filled with tables, retrieval queries and pictures."""

import base64
import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageOps

from clipsmall.storage import atomic

# Matches names of columns and metrics that are fractions, which are shown in percent.
FRACTION_NAME = re.compile(
    r"(?<![a-z])acc(?!um)|recall|chance|precision|share|wait|r@\d|top[- _]?\d|\bmap\b",
    re.IGNORECASE,
)
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?(\s?%)?", re.IGNORECASE)
DASH = "\N{EN DASH}"
# Pixels: larger pictures are shrunk to this, twice their size on the page.
LARGEST_PICTURE = 256
TINY_PICTURE = 96
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class TableCell(NamedTuple):
    """A table cell: its text and its CSS classes.

    A cell of class `number` is right-aligned and sorted by its number.
    """

    text: str
    look: str = ""


@dataclass
class Table:
    """A table of results; columns that hold fractions (see `is_fraction`) are shown in percent."""

    title: str
    note: str
    columns: list[str]
    # text, numbers or TableCells; None and NaN become a dash
    rows: list[list[Any]]


@dataclass
class Query:
    """One query of a gallery with what was retrieved for it, best first."""

    # the query's image, or the true image of a text query
    image: bytes
    # the true caption of an image query, or the query's text
    text: str
    direction: Literal["image_to_text", "text_to_image"]
    # label of the query's group, such as "never-seen captions"
    seen: str = ""
    # (image, caption, cosine, correct)
    images: list[tuple[bytes, str, float, bool]] = field(default_factory=list)
    # (text, cosine, correct)
    texts: list[tuple[str, float, bool]] = field(default_factory=list)


def fill_template(template: str, **values: Any) -> str:
    """Fill a template of this package with `values`, which are escaped.

    Args:
        template: path in the package, such as "report_page/run_report.html.jinja".
    """
    functions = {"cell": value_cell, "picture": picture_address}
    return TEMPLATES.get_template(template).render(values, **functions)


def save_html(html: str, path: Path) -> None:
    """Write a page to `path`, whole or not at all. Raises OSError."""
    # a caption may hold a lone surrogate
    atomic.write_bytes(path, html.encode(errors="replace"))


def is_fraction(name: str) -> bool:
    """Whether numbers under this name, such as recall@1, are fractions, shown in percent."""
    return FRACTION_NAME.search(name) is not None


def format_quantity(value: float, fraction: bool = False) -> str:
    """1234567 -> '1,234,567', 0.12345 -> '0.1235'; as a fraction 0.593 -> '59.3 %'.

    A small fraction keeps two digits: 0.00014 -> '0.014 %'.
    """
    if fraction:
        percent = 100 * value
        return f"{percent:.1f} %" if value == 0 or value >= 0.01 else f"{percent:.2g} %"

    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"

    return f"{value:.4g}"


def value_cell(column: str, value: Any) -> TableCell:
    """The table cell for a value under the heading `column`."""
    if isinstance(value, TableCell):
        return value

    if isinstance(value, int | float | np.number) and math.isfinite(value):
        fraction = is_fraction(column) and 0 <= float(value) <= 1
        return TableCell(format_quantity(float(value), fraction), "number")

    # None or NaN
    if pd.isna(value):
        return TableCell(DASH, "number")

    text = str(value)
    return TableCell(text, "number" if NUMBER.fullmatch(text) else "")


def picture_address(data: bytes) -> tuple[str, bool]:
    """An encoded image as a data: address, shrunk if large; and whether it is tiny."""
    try:
        image = Image.open(io.BytesIO(data))
        longest = max(image.size)
        if longest <= LARGEST_PICTURE:
            kind = image.get_format_mimetype() or "image/png"
            return data_address(data, kind), longest <= TINY_PICTURE

        small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
        file = io.BytesIO()
        small.save(file, "webp", quality=85)
    except Exception:
        # Pillow raises many kinds of errors; the browser will mark the image as broken
        return data_address(data, "image/png"), False

    return data_address(file.getvalue(), "image/webp"), False


def data_address(data: bytes, kind: str) -> str:
    """Bytes as a data: address, so that the page needs no other file. `kind`: its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
