"""The pictures of a comparison: metrics against batch size, memory and time; learning curves; logit
scales.
"""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from clipsmall.compare.canvas import Frames, clean, legend, positions, sheet, spread, tidy, title
from clipsmall.compare.grid import Comparison
from clipsmall.compare.study import spoken
from clipsmall.compare.summary import pareto
from clipsmall.report_page import page

# caption, drawing
Named = tuple[str, Figure]


def figures(comparison: Comparison, runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Named]:
    """File stem -> (caption, figure), in the page's order; what has no data is left out.

    Args:
        runs, curves: of `outcomes.outcomes`; any of their runs may be missing, failed or NaN.
    """
    # most objectives have none
    bias = {"logit_bias": lambda frame: frame["logit_bias"].replace(0, math.nan)}
    frames = Frames(comparison, runs.assign(**bias), curves.assign(**bias))
    main = comparison.metric
    found: list[tuple[str, Figure | None]] = []
    with page.drawing():
        for metric in comparison.metrics:
            found += by_setting(frames, metric, clean(metric))
        for cost, words in (("memory", "memory of a training step"), ("seconds", "training time")):
            text = f"{main} against {words}: a point a setting; no other is better for less than those on the grey line"
            found.append((text, front(frames, main, cost)))
        found.append((f"{main} while training", learning(frames, main)))
        columns = ("logit_scale", "logit_bias")
        for column in columns:
            found += by_setting(frames, column, f"{spoken(column)} at the end")
        found += [
            (f"{spoken(column)} while training", learning(frames, column)) for column in columns
        ]
    named: dict[str, Named] = {}
    for text, figure in found:
        stem = re.sub(r"\W+", "-", text.partition(":")[0].lower()).strip("-")
        if figure is not None:
            named[stem if stem not in named else f"{stem}-{len(named)}"] = text, figure
    return named


def by_setting(frames: Frames, column: str, name: str) -> list[tuple[str, Figure | None]]:
    """A column against each numeric axis, or setting by setting if there is none."""
    if frames.done[column].dropna().empty:
        return []
    note = (
        "means over the seeds (dots) ± 1 standard deviation"
        if frames.runs["seed"].nunique() > 1
        else "one run each"
    )
    if not frames.numeric:
        return [(f"{name}: {note}", dots(frames, column, name))]
    return [
        (f"{name} against {spoken(axis)}: {note}", against(frames, column, name, axis))
        for axis in frames.numeric
    ]


def save(named: dict[str, Named], folder: Path) -> None:
    """Each as `folder`/stem.png."""
    with page.drawing():
        for stem, (_, figure) in named.items():
            figure.savefig(folder / f"{stem}.png", dpi=160)


def against(frames: Frames, column: str, name: str, axis: str) -> Figure:
    """A column over a numeric axis, a line a level of the first; a panel for each combination of
    further axes.
    """
    parts = list(
        frames.parts(frames.done.dropna(subset=column), frames.others(axis, frames.coloured))
    )
    share = column in frames.comparison.metrics
    figure, panels = sheet([title(levels) for levels, _ in parts], spoken(axis), name, share)
    at = positions(frames.axes[axis])
    gap = float(np.diff(sorted(at.values())).min())
    lines = len(frames.axes[frames.coloured]) if axis != frames.coloured else 1
    for panel, (_, part) in zip(panels, parts, strict=True):
        for levels, line in frames.parts(
            part, [frames.coloured] if axis != frames.coloured else []
        ):
            place = frames.axes[frames.coloured].index(levels[frames.coloured]) if levels else 0
            # bars stand side by side
            aside = gap * min(0.06, 0.5 / lines) * (place - (lines - 1) / 2)
            spread(panel, line[axis].map(at) + aside, line[column], frames.look(levels))
        panel.set_xticks(list(at.values()), [clean(level) for level in at])
        panel.set_xlim(min(at.values()) - gap / 2, max(at.values()) + gap / 2)
    if axis != frames.coloured:
        legend(frames, figure, frames.done.dropna(subset=column)[frames.coloured])
    return figure


def dots(frames: Frames, column: str, name: str) -> Figure:
    """A row for each setting, done or not: its mean, standard deviation and seeds."""
    rows = list(frames.parts(frames.runs, list(frames.axes)))
    figure = Figure(figsize=(5.4, 1 + 0.34 * len(rows)), layout="constrained")
    panel = figure.add_subplot(xlabel=name)
    for at, (levels, part) in enumerate(rows):
        values = part[part["state"] == "done"][column].dropna()
        look = frames.look(levels)
        panel.plot(
            values, [at] * len(values), linestyle="", marker=".", alpha=0.4, color=look["color"]
        )
        if len(values):
            sd = values.std() if len(values) > 1 else 0.0
            panel.errorbar(values.mean(), at, xerr=sd, capsize=2, markersize=6, **look)  # type: ignore[arg-type]
    panel.set_yticks(range(len(rows)), [clean(", ".join(levels.values())) for levels, _ in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    tidy(panel, "x", column in frames.comparison.metrics)
    return figure


def front(frames: Frames, metric: str, cost: str) -> Figure | None:
    """A point a setting, its cost across; the Pareto front as steps, its points named by their
    further levels.
    """
    axes = list(frames.axes)
    means = frames.done.groupby(axes)[[metric, cost]].mean().dropna().reset_index()
    if means.empty:
        return None
    words, size = unit(cost, float(means[cost].max()))
    means[cost] /= size
    figure, (panel,) = sheet([""], words, metric, share=True)
    if means[cost].min() > 0 and means[cost].max() >= 4 * means[cost].min():
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    for levels, part in frames.parts(means, axes):
        panel.plot(part[cost], part[metric], linestyle="", markersize=5, **frames.look(levels))  # type: ignore[arg-type]
    # a thin line follows the batch size
    joined = frames.numeric[-1:]
    for levels, part in frames.parts(means, frames.others(*joined)) if joined else ():
        line = part.sort_values(joined, key=pd.to_numeric)
        colour = frames.look(levels)["color"] if frames.coloured in levels else "#777777"
        panel.plot(line[cost], line[metric], linewidth=0.6, color=colour, zorder=1)
    best = means[pareto(means[cost], means[metric])].sort_values([cost, metric])
    panel.plot(
        best[cost],
        best[metric],
        drawstyle="steps-post",
        color="#777777",
        linewidth=4,
        alpha=0.3,
        zorder=0,
    )
    further = [axis for axis in frames.others(frames.coloured) if means[axis].nunique() > 1]
    names = [clean(", ".join(levels)) for levels in best[further].to_numpy()]
    label(panel, best[[cost, metric]].to_numpy(), names)
    legend(frames, figure, means[frames.coloured])
    return figure


def unit(cost: str, most: float) -> tuple[str, float]:
    """How a cost of up to `most` reads, and how much of it makes one."""
    if cost == "memory":
        return ("memory of a step, GiB", 1) if most >= 1 else ("memory of a step, MiB", 1 / 1024)
    units = [("hours", 3600), ("minutes", 60), ("seconds", 1)]
    return next(
        (f"training time, {name}", size) for name, size in units if most >= 3 * size or size == 1
    )


def label(panel: Axes, points: NDArray[np.float64], names: list[str]) -> None:
    """Names stand left above a point of the front, where nobody is; one too near to another name
    has none.
    """
    # room for the leftmost name
    panel.margins(0.05 + 0.015 * max(map(len, names)), 0.12)
    panel.autoscale_view()
    taken: list[NDArray[np.float64]] = []
    for point, name in zip(points, names, strict=True):
        place = panel.transData.transform(point)
        if all(np.hypot(*(place - other)) > 18 for other in taken):
            taken.append(place)
            panel.annotate(
                name, tuple(point), (-4, 4), textcoords="offset points", ha="right", fontsize=8
            )


def learning(frames: Frames, column: str) -> Figure | None:
    """A column over the pairs seen: a bold line a level of the first axis, the mean where all its
    seeds are, and thin ones for the seeds; a panel for each combination of the other axes. None if
    no run has two points."""
    known = frames.curves.dropna(subset=["pairs", column])
    points = known.groupby([*frames.axes, "seed"])["pairs"].nunique()
    if points.max() < 2 or points.empty:
        return None
    parts = list(frames.parts(known, frames.others(frames.coloured)))
    share = column in frames.comparison.metrics
    figure, panels = sheet(
        [title(levels) for levels, _ in parts],
        "pairs seen",
        column if share else spoken(column),
        share,
    )
    for panel, (_, part) in zip(panels, parts, strict=True):
        for levels, lines in frames.parts(part, [frames.coloured]):
            colour = frames.look(levels)["color"]
            seeds = lines.pivot_table(index="pairs", columns="seed", values=column, aggfunc="last")
            # thinned from the end, which must stay
            seeds = seeds.iloc[:: -1 - len(seeds) // 300][::-1]
            for seed in seeds.columns:
                panel.plot(seeds[seed].dropna(), linewidth=0.7, alpha=0.5, color=colour)
            mean = seeds.mean(axis=1)[seeds.notna().all(axis=1)]
            marks = {"markevery": max(1, len(mean) // 6), "markersize": 4, **frames.look(levels)}
            panel.plot(mean.index.to_numpy(), mean.to_numpy(), linewidth=1.4, **marks)  # type: ignore[arg-type]
        panel.set_xlim(0, 1.03 * known["pairs"].max())
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(frames, figure, known[frames.coloured])
    return figure
