"""A run's report as one self-contained HTML page: pure rendering, from numbers and images to a
string.
"""

import base64
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter, ScalarFormatter
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clipsmall.storage import atomic

# values over the pairs seen, and matplotlib's style
Line = tuple["pd.Series[float]", dict[str, Any]]
# title, last value in words, the drawing as a data: address
Plot = tuple[str, str, str]
SHARE = re.compile(
    r"(?<![a-z])acc(?!um)|recall|chance|precision|share|wait|r@\d|top[- _]?\d|\bmap\b",
    re.IGNORECASE,
)
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?(\s?%)?", re.IGNORECASE)
# With a fixed salt the same report gives the same bytes; captions with $ are no formulas.
STYLE: list[Any] = ["seaborn-v0_8-colorblind", {"text.parse_math": False, "svg.hashsalt": "page"}]
ROOM = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
KNOWN = {
    "loss": "Loss",
    "logit_scale": "Logit scale",
    "logit_bias": "Logit bias",
    "lr": "Learning rate",
}
KNOWN |= {"pairs_per_second": "Pairs per second", "data_wait": "Share of time waiting for data"}


class TableCell(NamedTuple):
    """How a cell of a table reads: its text, and its CSS classes; a `number` stands right and is
    sorted as one.
    """

    text: str
    look: str = ""


@dataclass
class Table:
    """A table of results; under a name like accuracy or chance, numbers from 0 to 1 are shown in
    percent.
    """

    title: str
    note: str
    columns: list[str]
    # text, numbers or Cells; None and NaN become a dash
    rows: list[list[Any]]


@dataclass
class Query:
    """One query of the gallery with what was retrieved for it, best first: (what, cosine,
    correct).
    """

    # the query's image, or the true image of a text query
    image: bytes
    # the true caption of an image query, or the query's text
    text: str
    direction: Literal["image_to_text", "text_to_image"]
    # the group's label, such as "never-seen captions"
    seen: str = ""
    images: list[tuple[bytes, str, float, bool]] = field(default_factory=list)
    texts: list[tuple[str, float, bool]] = field(default_factory=list)


@dataclass
class RunReport:
    """Everything the page shows; what is empty leaves no heading behind."""

    title: str
    subtitle: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    tables: list[Table] = field(default_factory=list)
    gallery: list[Query] = field(default_factory=list)
    # (B, B): images down, texts across
    matrix: NDArray[Any] | None = None
    matrix_labels: list[str] = field(default_factory=list)
    config: str = ""
    command: str = ""


def render(report: RunReport) -> str:
    """The whole page; captions, labels and config are untrusted and escaped."""
    with drawing():
        curves = {
            "Training": list(training(report.metrics)),
            "Evaluation": list(evaluation(report.metrics)),
        }
        matrix = heat_map(report.matrix, report.matrix_labels) if report.matrix is not None else ""
    return filled("report_page/page.html.jinja", report=report, curves=curves, matrix=matrix)


def filled(template: str, **values: Any) -> str:
    """A template of this package with `values`, which it escapes."""
    return ROOM.get_template(template).render(values, cell=cell, picture=picture)


@contextmanager
def drawing() -> Iterator[None]:
    """The look of all plots. Captions become labels; a script that the font lacks is worth a box,
    not a warning.
    """
    with style.context(STYLE), warnings.catch_warnings(action="ignore"):
        yield


def write(report: RunReport, path: Path) -> None:
    """Render to `path`, whole or not at all."""
    save(render(report), path)


def save(html: str, path: Path) -> None:
    """Write to `path`, whole or not at all."""
    # a caption may hold a lone surrogate
    atomic.write_bytes(path, html.encode(errors="replace"))


def quantity(value: float, share: bool = False) -> str:
    """1234567 -> '1,234,567', 0.12345 -> '0.1235'; as a share 0.593 -> '59.3 %', 0.00014 -> '0.014
    %'.
    """
    if share:
        return f"{100 * value:.1f} %" if value == 0 or value >= 0.01 else f"{100 * value:.2g} %"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


def cell(column: str, value: Any) -> TableCell:
    """How a value under the heading `column` reads."""
    if isinstance(value, TableCell):
        return value
    if isinstance(value, int | float | np.number) and math.isfinite(value):
        share = SHARE.search(column) is not None and 0 <= float(value) <= 1
        return TableCell(quantity(float(value), share), "number")
    # None or NaN
    if pd.isna(value):
        return TableCell("\N{EN DASH}", "number")
    return TableCell(str(value), "number" if NUMBER.fullmatch(str(value)) else "")


def training(frame: pd.DataFrame) -> Iterator[Plot]:
    """A curve for each plain column that is not all zero: the known ones first, then whatever was
    reported.
    """
    for name in dict.fromkeys([*KNOWN, *frame.columns]):
        if name in {"step", "pairs", "chance"} or "/" in name or not series(frame, name).any():
            continue
        curve = series(frame, name)
        level = series(frame, "chance")
        share = bool(SHARE.search(name))
        # these are smooth
        window = 1 if name.startswith(("lr", "logit")) else 1 + len(curve) // 40
        middle = curve.rolling(window, center=True, min_periods=1).median()
        look = {"color": "C0", "marker": "o" if len(curve) < 20 else "", "markersize": 3}
        lines: list[Line] = [(curve, look | {"alpha": 0.35, "linewidth": 0.8}), (middle, look)]
        note = quantity(curve.iloc[-1], share)
        if name == "loss" and not level.empty:
            note += f" · dashed: chance, ln {math.exp(min(level.iloc[-1], 50)):,.0f} = {quantity(level.iloc[-1])}"
            lines.append((level, {"color": "#333333", "linestyle": "--"}))
        yield KNOWN.get(name, name.replace("_", " ").capitalize()), note, draw(lines, share)


def evaluation(frame: pd.DataFrame) -> Iterator[Plot]:
    """A drawing for each metric of columns [task/]set/metric measured twice: a line a set, chance
    dashed.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in frame.columns:
        if "/" in name and not name.endswith("/chance") and len(series(frame, name)) > 1:
            task = name.split("/")[0] if name.count("/") > 1 else ""
            metric = name.rpartition("/")[2]
            groups.setdefault((task, metric), []).append(name)
    for (task, metric), names in groups.items():
        lines: list[Line] = []
        share = bool(SHARE.search(metric))
        later = re.search(r"(?<!\d)(?!1$)\d+$", metric)
        for at, name in enumerate(names):
            curve = series(frame, name)
            parent = name.rpartition("/")[0]
            colour = f"C{at}"
            label = (
                f"{(parent.partition('/')[2] or parent)[:44]}: {quantity(curve.iloc[-1], share)}"
            )
            lines.append((curve, {"color": colour, "marker": "o", "markersize": 3, "label": label}))
            # A set's chance is that of the first guess: it says nothing of acc5 or recall@10.
            for level in [f"{name}/chance", f"{parent}/chance" if share and not later else ""]:
                lines.append(
                    (series(frame, level), {"color": colour, "linestyle": "--", "linewidth": 1})
                )
        yield " · ".join(filter(None, (task, metric))).replace("_", " "), "", draw(lines, share)


def series(frame: pd.DataFrame, name: str) -> "pd.Series[float]":
    """The finite values of a column over the pairs seen; a stretch repeated after a resume counts
    once.
    """
    part = (
        frame.reindex(columns=["pairs", name]).apply(pd.to_numeric, errors="coerce").astype(float)
    )
    part = part[np.isfinite(part).all(axis=1)].drop_duplicates("pairs", keep="last")
    return pd.Series(part[name].to_numpy(), index=part["pairs"]).sort_index()


def draw(lines: list[Line], share: bool) -> str:
    """Lines over the pairs seen; shares in percent."""
    labels = sum("label" in look for _, look in lines)
    axes = Figure(figsize=(4.6, 2.8 + 0.22 * labels), layout="constrained").add_subplot(
        xlabel="pairs seen"
    )
    for curve, look in lines:
        # thinned from the end, which must stay
        curve = curve.iloc[:: -1 - len(curve) // 1000]
        axes.plot(curve.index.to_numpy(), curve.to_numpy(), **look)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(
        PercentFormatter(1, symbol=" %") if share else ScalarFormatter(useOffset=False)
    )
    # below: a few long names would cover the lines
    if labels:
        axes.figure.legend(loc="outside lower left", frameon=False)
    return svg(axes.figure)


def heat_map(
    matrix: NDArray[Any], labels: list[str], size: tuple[float, float] = (8.5, 7.2)
) -> str:
    """The similarities of a batch, images down and texts across; captions only where they can be
    read.
    """
    axes = Figure(figsize=size, layout="constrained").add_subplot(xlabel="texts", ylabel="images")
    reach = np.abs(matrix[np.isfinite(matrix)]).max(initial=1e-6)
    axes.figure.colorbar(axes.imshow(matrix, cmap="RdBu_r", vmin=-reach, vmax=reach), shrink=0.8)
    if len(labels) == len(matrix) <= 40:
        # A control character would break the SVG: matplotlib repeats each label in a comment there.
        short = ["".join(filter(str.isprintable, label))[:36] for label in labels]
        axes.set_xticks(range(len(short)), short, rotation=90, fontsize=min(10, 260 / len(short)))
        axes.set_yticks(range(len(short)), short, fontsize=min(10, 260 / len(short)))
    return svg(axes.figure)


def svg(figure: Any) -> str:
    """A figure as a data: address."""
    figure.savefig(file := io.BytesIO(), format="svg", dpi=200, metadata={"Date": None})
    return address(file.getvalue(), "image/svg+xml")


def picture(data: bytes) -> tuple[str, bool]:
    """An image as a data: address and whether it is tiny; a large one is shrunk to what the page
    shows.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if max(image.size) <= 256:
            return address(data, image.get_format_mimetype() or "image/png"), max(image.size) <= 96
        small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((256, 256))
        small.save(file := io.BytesIO(), "webp", quality=85)
    except Exception:
        # Pillow raises of many kinds; a broken image is the browser's to mark
        return address(data, "image/png"), False
    return address(file.getvalue(), "image/webp"), False


def address(data: bytes, kind: str) -> str:
    """Bytes as a data: address, so that the page needs nothing beside it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
