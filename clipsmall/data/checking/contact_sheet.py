"""A contact sheet of a data set: a grid of pairs above two histograms."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 8
# side of a thumbnail in pixels
THUMBNAIL = 200
# characters per line of a caption
CAPTION_WIDTH = 24
CAPTION_LINES = 3
INK = "#1f2328"
QUIET = "#6e7781"
HAIRLINE = "#d8dee4"
BAR = "#4f7cac"


class SheetCell(NamedTuple):
    """An image, or the reason why there is none, and its caption."""

    picture: Image.Image | str
    caption: str


def draw_sheet(
    path: Path,
    cells: Sequence[SheetCell],
    histograms: Mapping[str, ArrayLike],
    what: str,
    title: str,
) -> None:
    """Write the sheet as a PNG.

    Args:
        cells: pairs to show, row by row.
        histograms: the values of the two histograms, by axis label.
        what: what the histograms count.
        title: the line at the top.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = max(-(-len(cells) // COLUMNS), 1)
    # height of the figure in inches
    height = rows * 1.75 + 2.9
    figure = Figure(figsize=(COLUMNS * 1.45, height), dpi=120, facecolor="white")
    figure.text(
        0.03,
        1 - 0.18 / height,
        title,
        va="top",
        fontsize=12,
        color=INK,
        weight="bold",
        parse_math=False,
    )
    top = 1 - 0.55 / height
    bottom = 2.3 / height
    grid = figure.add_gridspec(
        rows,
        COLUMNS,
        left=0.03,
        right=0.97,
        top=top,
        bottom=bottom + 0.55 / height,
        hspace=0.52,
        wspace=0.14,
    )
    for number, cell in enumerate(cells):
        axes = figure.add_subplot(grid[divmod(number, COLUMNS)])
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        if isinstance(cell.picture, str):
            axes.text(
                0.5,
                0.5,
                textwrap.fill(cell.picture, 14),
                ha="center",
                va="center",
                color="firebrick",
                fontsize=8,
            )
        else:
            small = ImageOps.contain(cell.picture, (THUMBNAIL, THUMBNAIL))
            wide = small.width / max(small.size)
            high = small.height / max(small.size)
            # on the caption
            box = (0.5 - wide / 2, 0.5 + wide / 2, 0.0, high)
            axes.imshow(np.asarray(small), extent=box, interpolation="lanczos")
            axes.set(xlim=(0, 1), ylim=(0, 1))
            frame = Rectangle(
                (box[0], 0),
                wide,
                high,
                fill=False,
                edgecolor=HAIRLINE,
                linewidth=0.8,
                clip_on=False,
            )
            # a frame makes white images visible
            axes.add_patch(frame)
        lines = textwrap.wrap(
            cell.caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder=" …"
        )
        # "$" in a caption must not start matplotlib's math mode
        axes.text(
            0.5,
            -0.05,
            "\n".join(lines),
            ha="center",
            va="top",
            fontsize=7,
            color=INK,
            parse_math=False,
        )
    plots = figure.add_gridspec(
        1, 2, left=0.06, right=0.97, top=1.95 / height, bottom=0.5 / height, wspace=0.16
    )
    for place, (name, values) in enumerate(histograms.items()):
        _histogram(figure.add_subplot(plots[0, place]), np.asarray(values), name, what)
    with warnings.catch_warnings():
        # characters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, format="png")


def _histogram(axes: "Axes", values: NDArray[np.number], name: str, what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low = float(values.min())
    high = float(values.max())
    is_wide = low > 0 and high > 50 * low
    is_float = values.dtype.kind == "f"
    if is_wide:
        bins = np.geomspace(low, high, 41)
        axes.set_xscale("log")
    elif is_float:
        # if all values are equal, the bin still needs some width
        upper = max(high, low + 1e-6)
        bins = np.linspace(low, upper, 41)
    else:
        # integers: at most 40 bins of equal width, with edges between integers
        count = high - low + 1
        step = max(-(-count // 40), 1)
        bins = np.arange(low - 0.5, high + step + 0.5, step)

    axes.hist(values, bins=bins.tolist(), color=BAR)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, colors=QUIET)
    axes.set_ylabel(what, fontsize=8, color=QUIET)
    median = np.median(values)
    middle = f"{median:,.2f}" if is_float else f"{median:,.0f}"
    axes.set_xlabel(f"{name} (median {middle})", fontsize=8, color=INK)
