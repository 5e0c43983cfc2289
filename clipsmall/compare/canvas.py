"""What the pictures of a comparison share: which runs, which colours, and sheets of panels with one
legend.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from clipsmall.compare.grid import Comparison
from clipsmall.compare.study import number, spoken

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow; 8 x 9 pairs
# before one repeats.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C8C8C"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", "*"]


class Frames(NamedTuple):
    """A comparison with the frames of `outcomes.outcomes`."""

    comparison: Comparison
    runs: pd.DataFrame
    curves: pd.DataFrame

    @property
    def axes(self) -> dict[str, list[str]]:
        return {axis: list(levels) for axis, levels in self.comparison.axes.items()}

    @property
    def coloured(self) -> str:
        """The axis whose levels have colours: the first."""
        return next(iter(self.axes))

    @property
    def numeric(self) -> list[str]:
        """The axes that can lie across: two numbers at least."""
        return [
            axis
            for axis, levels in self.axes.items()
            if len(levels) > 1 and all(map(_finite, levels))
        ]

    @property
    def done(self) -> pd.DataFrame:
        return self.runs[self.runs["state"] == "done"]

    def others(self, *axes: str) -> list[str]:
        return [axis for axis in self.axes if axis not in axes]

    def parts(
        self, frame: pd.DataFrame, axes: Collection[str]
    ) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
        """The rows of each combination of levels, in the grid's order, where there are any."""
        for chosen in itertools.product(*(self.axes[axis] for axis in axes)):
            levels = dict(zip(axes, chosen, strict=True))
            here = frame[(frame[list(levels)] == list(chosen)).all(axis=1)] if levels else frame
            if len(here):
                yield levels, here

    def look(self, levels: dict[str, str]) -> dict[str, str]:
        """Colour and marker of a level of the first axis, the same in all plots."""
        at = self.axes[self.coloured].index(levels[self.coloured]) if self.coloured in levels else 0
        return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}


def _finite(level: str) -> bool:
    return math.isfinite(number(level))


def positions(levels: Collection[str]) -> dict[str, float]:
    """Where numeric levels lie across: by their logarithm if all are positive."""
    values = {level: float(level) for level in levels}
    return (
        {level: math.log2(value) for level, value in values.items()}
        if min(values.values()) > 0
        else values
    )


def clean(text: str) -> str:
    """A label: a control character would break the SVG, and a legend leaves out what begins with an
    underscore.
    """
    short = "".join(filter(str.isprintable, text))
    short = short if len(short) <= 36 else f"{short[:35]}…"
    return f" {short}" if short.startswith("_") else short


def title(levels: dict[str, str]) -> str:
    return ", ".join(clean(f"{spoken(axis)} {level}") for axis, level in levels.items())


def sheet(titles: Sequence[str], across: str, up: str, share: bool) -> tuple[Figure, list[Axes]]:
    """A figure with a panel a title, three in a row, of one scale."""
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    size = (5.4, 3.9) if len(titles) == 1 else (1.2 + 3.2 * columns, 0.8 + 2.7 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for spare in panels[len(titles) :]:
        spare.remove()
    for at, (panel, text) in enumerate(zip(panels, titles, strict=False)):
        panel.set_title(text, fontsize=10)
        panel.set_xlabel(clean(across))
        panel.set_ylabel(clean(up) if at % columns == 0 else "")
        tidy(panel, "y", share)
    return figure, panels[: len(titles)]


def tidy(panel: Axes, measured: str, share: bool) -> None:
    """The look of the run's report; `measured` is the axis with the values, shares in percent."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="both" if measured == "x" else "y", color="#e8e8e8")
    panel.set_axisbelow(True)
    axis = panel.xaxis if measured == "x" else panel.yaxis
    axis.set_major_formatter(
        (lambda value, _: f"{100 * value:.4g} %") if share else ScalarFormatter(useOffset=False)
    )
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def legend(frames: Frames, figure: Figure, shown: "pd.Series[str]") -> None:
    """Below: the levels of the first axis that are shown."""
    levels = [level for level in frames.axes[frames.coloured] if level in set(shown)]
    handles = [Line2D([], [], **frames.look({frames.coloured: level})) for level in levels]  # type: ignore[arg-type]
    names = [clean(level) for level in levels]
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.085 * max(map(len, names)))))
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(len(names), columns),
        frameon=False,
        fontsize=9,
    )


def spread(panel: Axes, x: "pd.Series[float]", y: "pd.Series[float]", look: dict[str, str]) -> None:
    """Means over the seeds at each x, joined, with a bar of ± 1 standard deviation, and the seeds
    as dots.
    """
    panel.plot(x, y, linestyle="", marker=".", markersize=4, alpha=0.4, color=look["color"])
    mean = y.groupby(x).mean()
    sd = y.groupby(x).std().fillna(0)
    looks = {"linewidth": 1.4, "markersize": 5, "capsize": 2, "elinewidth": 1, **look}
    panel.errorbar(mean.index.to_numpy(), mean.to_numpy(), yerr=np.asarray(sd), **looks)  # type: ignore[arg-type]
