"""The look that all plots share, and drawings as data: addresses for an HTML page."""

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
    # Captions with $ are no formulas; with a fixed salt the same report gives the same bytes.
    {"text.parse_math": False, "svg.hashsalt": "page"},
]
# Captions beside a heat map of more rows than this could not be read.
MOST_LABELS = 40


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw in the common style, without warnings.

    Captions become labels, and a script that the font lacks is worth an empty box, not a warning.
    """
    with style.context(PLOT_STYLE), warnings.catch_warnings(action="ignore"):
        yield


def figure_address(figure: Any) -> str:
    """A figure, drawn as SVG, as a data: address."""
    file = io.BytesIO()
    # no date, so that the same figure gives the same bytes
    figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
    return data_address(file.getvalue(), "image/svg+xml")


def heat_map_address(
    matrix: NDArray[Any], labels: list[str], size: tuple[float, float] = (8.5, 7.2)
) -> str:
    """The similarities of a batch as a heat map, which comes as a data: address.

    Args:
        matrix: (n, n), images down and texts across.
        labels: n captions, drawn where they can be read; or none.
        size: width and height in inches.
    """
    axes = Figure(figsize=size, layout="constrained").add_subplot(xlabel="texts", ylabel="images")
    # white is 0; NaN and infinity have no say in the range of colours
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
