"""Renders the report of one run as an HTML page."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter, ScalarFormatter
from numpy.typing import NDArray

from clipsmall.pages.figures import figure_address, heat_map_address, plot_style
from clipsmall.pages.html_page import (
    Query,
    Table,
    fill_template,
    format_quantity,
    is_fraction,
    save_html,
)

# (values over samples seen, keyword arguments for matplotlib)
Line = tuple["pd.Series[float]", dict[str, Any]]
# (title, last value in words, drawing as a data: address)
Plot = tuple[str, str, str]
# Known columns of the log and the titles of their plots, in the page's order.
TITLES = {
    "loss": "Loss",
    "logit_scale": "Logit scale",
    "logit_bias": "Logit bias",
    "lr": "Learning rate",
    "pairs_per_second": "Pairs per second",
    "data_wait": "Fraction of time waiting for data",
}
# Columns without a plot of their own.
NOT_PLOTTED = {"step", "pairs", "chance"}
# Curves are thinned to this many points: more would only make the SVG larger.
MOST_POINTS = 1000


@dataclass
class RunReport:
    """Everything the page shows; empty parts have no heading."""

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


def render_run_report(report: RunReport) -> str:
    """The page as HTML; captions, labels and config are escaped."""
    with plot_style():
        curves = {
            "Training": list(training_plots(report.metrics)),
            "Evaluation": list(evaluation_plots(report.metrics)),
        }
        matrix = ""
        if report.matrix is not None:
            matrix = heat_map_address(report.matrix, report.matrix_labels)

    template = "report_page/run_report.html.jinja"
    return fill_template(template, report=report, curves=curves, matrix=matrix)


def write_run_report(report: RunReport, path: Path) -> None:
    """Render the page to `path`, whole or not at all. Raises OSError."""
    save_html(render_run_report(report), path)


def training_plots(frame: pd.DataFrame) -> Iterator[Plot]:
    """One curve for each column of the training log that is not all zero, known ones first."""
    for name in dict.fromkeys([*TITLES, *frame.columns]):
        # a name with a slash is a metric of an evaluation
        if name in NOT_PLOTTED or "/" in name:
            continue

        curve = finite_series(frame, name)
        if not curve.any():
            continue

        fraction = is_fraction(name)
        note = format_quantity(curve.iloc[-1], fraction)
        lines = _curve_and_median(name, curve)
        chance = finite_series(frame, "chance")
        if name == "loss" and not chance.empty:
            # the chance loss is ln of the number of columns; exp must not overflow
            last = chance.iloc[-1]
            columns = math.exp(min(last, 50))
            note += f" · dashed: chance, ln {columns:,.0f} = {format_quantity(last)}"
            lines.append((chance, {"color": "#333333", "linestyle": "--"}))

        title = TITLES.get(name, name.replace("_", " ").capitalize())
        yield title, note, draw_curves(lines, fraction)


def _curve_and_median(name: str, curve: "pd.Series[float]") -> list[Line]:
    """A noisy curve, faint, below its running median."""
    # the window is a fortieth of the run; learning rates and logit scales need no smoothing
    is_smooth = name.startswith(("lr", "logit"))
    window = 1
    if not is_smooth:
        window += len(curve) // 40
    windows = curve.rolling(window, center=True, min_periods=1)
    median = windows.median()

    # mark the points if there are few: a plain line would hide that
    marker = "o" if len(curve) < 20 else ""
    look = {"color": "C0", "marker": marker, "markersize": 3}
    faint = look | {"alpha": 0.35, "linewidth": 0.8}
    return [(curve, faint), (median, look)]


def evaluation_plots(frame: pd.DataFrame) -> Iterator[Plot]:
    """One plot for each metric of columns [task/]set/metric, with one line for each data set.

    A metric that was measured only once has no curve. Known chance levels are dashed.
    """
    for (task, metric), names in _columns_by_metric(frame).items():
        fraction = is_fraction(metric)
        # acc5 or recall@10, but not acc1: the logged chance level is for top-1
        of_several_guesses = re.search(r"(?<!\d)(?!1$)\d+$", metric)
        lines: list[Line] = []
        for number, name in enumerate(names):
            curve = finite_series(frame, name)
            # [task/]set
            parent = name.rpartition("/")[0]
            data_set = parent.partition("/")[2] or parent
            last = format_quantity(curve.iloc[-1], fraction)
            colour = f"C{number}"
            look = {
                "color": colour,
                "marker": "o",
                "markersize": 3,
                "label": f"{data_set[:44]}: {last}",
            }
            lines.append((curve, look))

            set_chance = ""
            if fraction and not of_several_guesses:
                set_chance = f"{parent}/chance"

            # a missing column gives no values and draws nothing
            dashed = {"color": colour, "linestyle": "--", "linewidth": 1}
            for chance in (f"{name}/chance", set_chance):
                lines.append((finite_series(frame, chance), dashed))

        title = " · ".join(filter(None, (task, metric))).replace("_", " ")
        yield title, "", draw_curves(lines, fraction)


def _columns_by_metric(frame: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """(task, metric) -> the columns of its data sets that were measured at least twice."""
    columns: dict[tuple[str, str], list[str]] = {}
    for name in frame.columns:
        if "/" not in name or name.endswith("/chance"):
            continue
        if len(finite_series(frame, name)) < 2:
            continue

        # [task/]set/metric
        task = ""
        if name.count("/") > 1:
            task = name.split("/")[0]

        metric = name.rpartition("/")[2]
        columns.setdefault((task, metric), []).append(name)

    return columns


def finite_series(frame: pd.DataFrame, name: str) -> "pd.Series[float]":
    """The finite values of a column over samples seen; empty if there is no such column.

    If steps were repeated after a resume, their last values count.
    """
    part = frame.reindex(columns=["pairs", name])
    # drop text, None and infinity
    part = part.apply(pd.to_numeric, errors="coerce")
    part = part.astype(float)
    is_finite = np.isfinite(part).all(axis=1)
    part = part[is_finite]

    part = part.drop_duplicates("pairs", keep="last")
    values = part[name].to_numpy()
    series = pd.Series(values, index=part["pairs"])
    return series.sort_index()


def draw_curves(lines: list[Line], fraction: bool) -> str:
    """Draw lines over samples seen, as a data: address; fractions are shown in percent."""
    labels = sum("label" in look for _, look in lines)
    # one more line of text below for each label
    figure = Figure(figsize=(4.6, 2.8 + 0.22 * labels), layout="constrained")
    axes = figure.add_subplot(xlabel="pairs seen")

    for curve, look in lines:
        # thinned from the end, so that the last point stays
        step = 1 + len(curve) // MOST_POINTS
        curve = curve.iloc[::-step]
        axes.plot(curve.index.to_numpy(), curve.to_numpy(), **look)

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    if fraction:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    else:
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))

    # the legend is below, as long names would cover the lines
    if labels:
        figure.legend(loc="outside lower left", frameon=False)

    return figure_address(figure)
