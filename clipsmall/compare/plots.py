"""The plots of a comparison: metrics against batch size, memory, time and pairs seen."""

import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    ScalarFormatter,
)
from numpy.typing import NDArray

from clipsmall.compare.grid import Comparison
from clipsmall.compare.stats import pareto_front
from clipsmall.compare.wording import axis_words, level_number
from clipsmall.pages.figures import plot_style

# caption, drawing
NamedFigure = tuple[str, Figure]
# Okabe and Ito's colour-blind-safe palette without yellow; with the markers 8 x 9 combinations.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C8C8C"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", "*"]
GREY = "#777777"
# A learning curve is thinned to about this many points.
CURVE_POINTS = 300
CURVE_MARKS = 6
# Points (1/72 inch) between two names on a Pareto front.
NAME_DISTANCE = 18


class Frames(NamedTuple):
    """A comparison with the frames of `run_tables.tables_of_runs`."""

    comparison: Comparison
    runs: pd.DataFrame
    curves: pd.DataFrame

    @property
    def axes(self) -> dict[str, list[str]]:
        """Axis -> its levels, in the grid's order."""
        return {axis: list(levels) for axis, levels in self.comparison.axes.items()}

    @property
    def coloured(self) -> str:
        """The axis whose levels have colours: the first."""
        return next(iter(self.axes))

    @property
    def numeric(self) -> list[str]:
        """The axes that can be an x axis: they have at least two levels, all numbers."""
        return [
            axis
            for axis, levels in self.axes.items()
            if len(levels) > 1 and all(math.isfinite(level_number(level)) for level in levels)
        ]

    @property
    def done(self) -> pd.DataFrame:
        """The runs that are done."""
        return self.runs[self.runs["state"] == "done"]

    def others(self, *axes: str) -> list[str]:
        """All axes but these."""
        return [axis for axis in self.axes if axis not in axes]

    def parts(
        self, frame: pd.DataFrame, axes: Collection[str]
    ) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
        """The rows of each combination of levels, in the grid's order, where there are any."""
        for chosen in itertools.product(*(self.axes[axis] for axis in axes)):
            levels = dict(zip(axes, chosen, strict=True))
            here = frame
            if levels:
                here = frame[(frame[list(levels)] == list(chosen)).all(axis=1)]

            if len(here):
                yield levels, here

    def look(self, levels: dict[str, str]) -> dict[str, str]:
        """Colour and marker of a level of the first axis, the same in all plots."""
        number = 0
        if self.coloured in levels:
            number = self.axes[self.coloured].index(levels[self.coloured])

        return {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
        }


def comparison_figures(
    comparison: Comparison, runs: pd.DataFrame, curves: pd.DataFrame
) -> dict[str, NamedFigure]:
    """File stem -> (caption, figure), in the page's order; what has no data is left out.

    Args:
        runs, curves: of `run_tables.tables_of_runs`; any run may be missing, failed or NaN.
    """
    # most objectives have no bias and log 0, which is not drawn
    frames = Frames(comparison, _without_zero_bias(runs), _without_zero_bias(curves))
    metric = comparison.metric

    found: list[tuple[str, Figure | None]] = []
    with plot_style():
        for each in comparison.metrics:
            found += _plots_by_setting(frames, each, clean_label(each))

        for cost, words in (("memory", "memory of a training step"), ("seconds", "training time")):
            caption = (
                f"{metric} against {words}: "
                "one point per setting; no other is better for less than those on the grey line"
            )
            found.append((caption, plot_pareto_front(frames, metric, cost)))

        found.append((f"{metric} while training", plot_learning_curves(frames, metric)))
        logit_columns = ("logit_scale", "logit_bias")
        for column in logit_columns:
            found += _plots_by_setting(frames, column, f"{axis_words(column)} at the end")

        for column in logit_columns:
            caption = f"{axis_words(column)} while training"
            found.append((caption, plot_learning_curves(frames, column)))

    return _named_figures(found)


def _without_zero_bias(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(logit_bias=frame["logit_bias"].replace(0, math.nan))


def _named_figures(found: list[tuple[str, Figure | None]]) -> dict[str, NamedFigure]:
    """Name files after captions; a number is appended to a repeated name."""
    named: dict[str, NamedFigure] = {}
    for caption, figure in found:
        if figure is None:
            continue

        subject = caption.partition(":")[0].lower()
        stem = re.sub(r"\W+", "-", subject).strip("-")
        if stem in named:
            stem = f"{stem}-{len(named)}"

        named[stem] = caption, figure

    return named


def save_figures(named: dict[str, NamedFigure], folder: Path) -> None:
    """Write each to `folder`/stem.png."""
    with plot_style():
        for stem, (_, figure) in named.items():
            figure.savefig(folder / f"{stem}.png", dpi=160)


def _plots_by_setting(frames: Frames, column: str, name: str) -> list[tuple[str, Figure | None]]:
    """A column against each numeric axis, or setting by setting if there is none."""
    if frames.done[column].dropna().empty:
        return []

    several_seeds = frames.runs["seed"].nunique() > 1
    note = "means over the seeds (dots) ± 1 standard deviation" if several_seeds else "one run each"
    if not frames.numeric:
        return [(f"{name}: {note}", plot_each_setting(frames, column, name))]

    plots: list[tuple[str, Figure | None]] = []
    for axis in frames.numeric:
        caption = f"{name} against {axis_words(axis)}: {note}"
        plots.append((caption, plot_against_axis(frames, column, name, axis)))

    return plots


def plot_against_axis(frames: Frames, column: str, name: str, axis: str) -> Figure:
    """A column over a numeric axis, with one line per level of the first axis.

    There is a panel for each combination of further axes.
    """
    done = frames.done.dropna(subset=column)
    parts = list(frames.parts(done, frames.others(axis, frames.coloured)))
    titles = [_panel_title(levels) for levels, _ in parts]
    fraction = column in frames.comparison.metrics
    figure, panels = _panel_grid(titles, axis_words(axis), name, fraction)

    # positions of the levels, and the smallest gap between two of them
    positions = _axis_positions(frames.axes[axis])
    gap = float(np.diff(sorted(positions.values())).min())
    # if the first axis is the x axis, there is one line of one colour
    line_axes = [frames.coloured] if axis != frames.coloured else []
    lines = len(frames.axes[frames.coloured]) if line_axes else 1
    # shift the error bars of several lines so that they do not overlap
    step = gap * min(0.06, 0.5 / lines)

    for panel, (_, part) in zip(panels, parts, strict=True):
        for levels, line in frames.parts(part, line_axes):
            number = 0
            if levels:
                number = frames.axes[frames.coloured].index(levels[frames.coloured])

            from_the_middle = number - (lines - 1) / 2
            x = line[axis].map(positions) + step * from_the_middle
            _draw_means(panel, x, line[column], frames.look(levels))

        ticks = list(positions.values())
        panel.set_xticks(ticks, [clean_label(level) for level in positions])
        panel.set_xlim(min(ticks) - gap / 2, max(ticks) + gap / 2)

    if line_axes:
        _add_legend(frames, figure, done[frames.coloured])

    return figure


def plot_each_setting(frames: Frames, column: str, name: str) -> Figure:
    """A row for each setting, done or not: its mean, standard deviation and seeds."""
    rows = list(frames.parts(frames.runs, list(frames.axes)))
    figure = Figure(figsize=(5.4, 1 + 0.34 * len(rows)), layout="constrained")
    panel = figure.add_subplot(xlabel=name)

    for height, (levels, part) in enumerate(rows):
        done = part[part["state"] == "done"]
        values = done[column].dropna()
        look = frames.look(levels)
        panel.plot(
            values,
            [height] * len(values),
            linestyle="",
            marker=".",
            alpha=0.4,
            color=look["color"],
        )
        if values.empty:
            continue

        # one value has no standard deviation
        sd = values.std() if len(values) > 1 else 0.0
        panel.errorbar(values.mean(), height, xerr=sd, capsize=2, markersize=6, **look)  # type: ignore[arg-type]

    names = [clean_label(", ".join(levels.values())) for levels, _ in rows]
    panel.set_yticks(range(len(rows)), names)
    # the first setting on top
    panel.set_ylim(len(rows) - 0.5, -0.5)
    _style_panel(panel, "x", column in frames.comparison.metrics)
    return figure


def plot_pareto_front(frames: Frames, metric: str, cost: str) -> Figure | None:
    """A metric over a cost, with one point per setting and the Pareto front as steps.

    The front's points are named by their further levels. None if there is no point.
    """
    axes = list(frames.axes)
    means = frames.done.groupby(axes)[[metric, cost]].mean().dropna().reset_index()
    if means.empty:
        return None

    words, unit = _cost_unit(cost, float(means[cost].max()))
    means[cost] /= unit
    figure, (panel,) = _panel_grid([""], words, metric, fraction=True)

    least = means[cost].min()
    if least > 0 and means[cost].max() >= 4 * least:
        _use_log_scale(panel)

    for levels, part in frames.parts(means, axes):
        panel.plot(part[cost], part[metric], linestyle="", markersize=5, **frames.look(levels))  # type: ignore[arg-type]

    _join_batch_sizes(frames, panel, means, metric, cost)

    # behind everything else
    on_front = pareto_front(means[cost], means[metric])
    best = means[on_front].sort_values([cost, metric])
    panel.plot(
        best[cost],
        best[metric],
        drawstyle="steps-post",
        color=GREY,
        linewidth=4,
        alpha=0.3,
        zorder=0,
    )

    # the colour shows the first level; levels that all points share are left out
    further = [axis for axis in frames.others(frames.coloured) if means[axis].nunique() > 1]
    names = []
    for further_levels in best[further].to_numpy():
        names.append(clean_label(", ".join(further_levels)))

    _name_points(panel, best[[cost, metric]].to_numpy(), names)
    _add_legend(frames, figure, means[frames.coloured])
    return figure


def _join_batch_sizes(
    frames: Frames, panel: Axes, means: pd.DataFrame, metric: str, cost: str
) -> None:
    """A thin line through settings that differ only on the last numeric axis, the batch size."""
    joined = frames.numeric[-1:]
    if not joined:
        return

    for levels, part in frames.parts(means, frames.others(*joined)):
        # "16", "128" and "32" by their numbers
        line = part.sort_values(joined, key=pd.to_numeric)
        colour = GREY
        if frames.coloured in levels:
            colour = frames.look(levels)["color"]

        panel.plot(line[cost], line[metric], linewidth=0.6, color=colour, zorder=1)


def _use_log_scale(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.xaxis.set_minor_formatter(NullFormatter())


def _cost_unit(cost: str, most: float) -> tuple[str, float]:
    """The axis label for a cost of up to `most` GiB or seconds, and the size of its unit."""
    if cost == "memory":
        return ("memory of a step, GiB", 1) if most >= 1 else ("memory of a step, MiB", 1 / 1024)

    for name, seconds in (("hours", 3600), ("minutes", 60)):
        # at least three units, for a readable axis
        if most >= 3 * seconds:
            return f"training time, {name}", seconds

    return "training time, seconds", 1


def _name_points(panel: Axes, points: NDArray[np.float64], names: list[str]) -> None:
    """Write names above and to the left of the front's points, where no other point can be.

    Args:
        points: (n, 2), from left to right. A point too close to a named one gets no name.
    """
    # room for the leftmost name
    panel.margins(0.05 + 0.015 * max(map(len, names)), 0.12)
    panel.autoscale_view()

    named: list[NDArray[np.float64]] = []
    for point, name in zip(points, names, strict=True):
        position = panel.transData.transform(point)
        if any(np.hypot(*(position - other)) <= NAME_DISTANCE for other in named):
            continue

        named.append(position)
        panel.annotate(
            name,
            tuple(point),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )


def plot_learning_curves(frames: Frames, column: str) -> Figure | None:
    """A column over the pairs seen, with a panel for each combination of the other axes.

    Each level of the first axis has thin lines for its seeds, and a bold line for their mean where
    all seeds have a value. None if no run has two points.
    """
    known = frames.curves.dropna(subset=["pairs", column])
    points = known.groupby([*frames.axes, "seed"])["pairs"].nunique()
    if points.empty or points.max() < 2:
        return None

    parts = list(frames.parts(known, frames.others(frames.coloured)))
    titles = [_panel_title(levels) for levels, _ in parts]
    fraction = column in frames.comparison.metrics
    name = column if fraction else axis_words(column)

    figure, panels = _panel_grid(titles, "pairs seen", name, fraction)
    for panel, (_, part) in zip(panels, parts, strict=True):
        for levels, lines in frames.parts(part, [frames.coloured]):
            seeds = lines.pivot_table(index="pairs", columns="seed", values=column, aggfunc="last")
            _draw_curves_of_seeds(panel, seeds, frames.look(levels))

        panel.set_xlim(0, 1.03 * known["pairs"].max())
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))

    _add_legend(frames, figure, known[frames.coloured])
    return figure


def _draw_curves_of_seeds(panel: Axes, seeds: pd.DataFrame, look: dict[str, str]) -> None:
    """Args: seeds: one column per seed, over pairs; NaN where a seed has no point."""
    # thinned from the end, so that the last point stays
    step = 1 + len(seeds) // CURVE_POINTS

    seeds = seeds.iloc[::-step][::-1]
    for seed in seeds.columns:
        panel.plot(seeds[seed].dropna(), linewidth=0.7, alpha=0.5, color=look["color"])

    # the mean would jump where a seed starts or ends
    all_are_there = seeds.notna().all(axis=1)
    mean = seeds.mean(axis=1)[all_are_there]
    panel.plot(
        mean.index.to_numpy(),
        mean.to_numpy(),
        linewidth=1.4,
        markevery=max(1, len(mean) // CURVE_MARKS),
        markersize=4,
        **look,  # type: ignore[arg-type]
    )


def _axis_positions(levels: Collection[str]) -> dict[str, float]:
    """x positions of numeric levels: log2 if all are positive."""
    values = {level: float(level) for level in levels}
    if min(values.values()) <= 0:
        return values

    # batch sizes and ranks double from level to level
    return {level: math.log2(value) for level, value in values.items()}


def clean_label(text: str) -> str:
    """A short label that matplotlib draws as it is.

    A control character would break the SVG, and a legend leaves out what begins with an underscore.
    """
    short = "".join(filter(str.isprintable, text))
    if len(short) > 36:
        short = f"{short[:35]}…"

    return f" {short}" if short.startswith("_") else short


def _panel_title(levels: dict[str, str]) -> str:
    return ", ".join(clean_label(f"{axis_words(axis)} {level}") for axis, level in levels.items())


def _panel_grid(
    titles: Sequence[str], across: str, up: str, fraction: bool
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per title, three in a row, all of one scale."""
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    # inches
    size = (5.4, 3.9) if len(titles) == 1 else (1.2 + 3.2 * columns, 0.8 + 2.7 * rows)
    figure = Figure(figsize=size, layout="constrained")

    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for spare in panels[len(titles) :]:
        spare.remove()

    panels = panels[: len(titles)]
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(clean_label(across))
        is_leftmost = number % columns == 0
        panel.set_ylabel(clean_label(up) if is_leftmost else "")
        _style_panel(panel, "y", fraction)

    return figure, panels


def _style_panel(panel: Axes, measured: str, fraction: bool) -> None:
    """The look of the run's report.

    Args:
        measured: x or y, the axis with the values.
        fraction: whether they are shown in percent.
    """
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="both" if measured == "x" else "y", color="#e8e8e8")
    panel.set_axisbelow(True)
    axis = panel.xaxis if measured == "x" else panel.yaxis

    if fraction:
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    else:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _add_legend(frames: Frames, figure: Figure, shown: "pd.Series[str]") -> None:
    """A legend below, with the levels of the first axis that are shown."""
    present = set(shown)
    levels = [level for level in frames.axes[frames.coloured] if level in present]
    handles = [Line2D([], [], **frames.look({frames.coloured: level})) for level in levels]  # type: ignore[arg-type]
    names = [clean_label(level) for level in levels]

    # inches: a marker, and each letter
    width = 0.55 + 0.085 * max(map(len, names))
    fitting = max(1, int(figure.get_figwidth() / width))
    columns = min(len(names), fitting)

    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def _draw_means(
    panel: Axes, x: "pd.Series[float]", y: "pd.Series[float]", look: dict[str, str]
) -> None:
    """Means over the seeds at each x, joined, with a bar of ± 1 standard deviation.

    The seeds are faint dots.
    """
    panel.plot(x, y, linestyle="", marker=".", markersize=4, alpha=0.4, color=look["color"])

    seeds = y.groupby(x)
    mean = seeds.mean()
    # one seed has no standard deviation
    sd = seeds.std().fillna(0)
    panel.errorbar(
        mean.index.to_numpy(),
        mean.to_numpy(),
        yerr=np.asarray(sd),
        linewidth=1.4,
        markersize=5,
        capsize=2,
        elinewidth=1,
        **look,  # type: ignore[arg-type]
    )
