"""The common plot style, and plots as data: addresses for an HTML page."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clipsmall.pages.html_page import data_address

PLOT_STYLE: list[Any] = [
    "seaborn-v0_8-colorblind",
    # $ in captions does not start a formula; a fixed salt makes reports reproducible
    {"text.parse_math": False, "svg.hashsalt": "page"},
]
# A heat map with more rows than this has no captions, as they would be unreadable.
MOST_LABELS = 40


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw in the common style, without warnings.

    Captions become labels; characters that the font lacks become empty boxes, without a warning.
    """
    with style.context(PLOT_STYLE), warnings.catch_warnings(action="ignore"):
        yield


def figure_address(figure: Any) -> str:
    """A figure as an SVG in a data: address."""
    file = io.BytesIO()
    # no date, so that the same figure gives the same bytes
    figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
    return data_address(file.getvalue(), "image/svg+xml")


def heat_map_address(
    matrix: NDArray[Any], labels: list[str], size: tuple[float, float] = (8.5, 7.2)
) -> str:
    """A heat map of a batch's similarities, as a data: address.

    Args:
        matrix: (n, n), images down and texts across.
        labels: n captions, drawn if they are readable; or none.
        size: width and height in inches.
    """
    axes = Figure(figsize=size, layout="constrained").add_subplot(xlabel="texts", ylabel="images")
    # white is 0; NaN and infinity do not affect the range of colours
    finite = matrix[np.isfinite(matrix)]
    largest = np.abs(finite).max(initial=1e-6)
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes.figure.colorbar(image, shrink=0.8)

    if len(labels) == len(matrix) <= MOST_LABELS:
        # A control character would break the SVG: matplotlib repeats each label in a comment there.
        short = []
        for label in labels:
            printable = "".join(filter(str.isprintable, label))
            short.append(printable[:36])
        ticks = range(len(short))
        font_size = min(10, 260 / len(short))
        axes.set_xticks(ticks, short, rotation=90, fontsize=font_size)
        axes.set_yticks(ticks, short, fontsize=font_size)

    return figure_address(axes.figure)
