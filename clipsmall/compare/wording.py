"""Words for the levels, numbers and differences of a comparison."""

from collections.abc import Collection
from math import isnan, nan
from typing import Any

import pandas as pd

# a row of a table: column -> value
Row = dict[str, Any]
# a difference with a smaller p counts as more than noise
SIGNIFICANCE_LEVEL = 0.05


def frame_rows(frame: pd.DataFrame) -> list[Row]:
    """The rows of a frame as dicts."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def level_number(level: str) -> float:
    """A level's name as a number; NaN if it is not one."""
    try:
        return float(level)
    except ValueError:
        return nan


def axis_words(axis: str) -> str:
    """data.batch_size -> batch size."""
    return axis.rpartition(".")[2].replace("_", " ")


def join_words(words: Collection[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def percent(fraction: float, sign: str = "") -> str:
    """0.4312 -> "43.1"; with sign="+" "+43.1". Never "-0.0"."""
    return f"{100 * fraction:{sign}z.1f}"


def p_value_words(p: float, is_largest: bool = False) -> str:
    """ "p = 0.012"; "p ≤ 0.012" for the largest of several."""
    if p < 0.001:
        return "p < 0.001"
    return f"p {'≤' if is_largest else '='} {p:.2g}"


def noise_words(test: Row, p_column: str = "p") -> str:
    """Whether a difference is more than noise between seeds, in words.

    Args:
        test: a row of `stats.contrasts_with_baseline`.
    """
    p = test[p_column]
    if isnan(p):
        return "not tested"

    verdict = "more than" if p < SIGNIFICANCE_LEVEL else "within"
    return f"{p_value_words(p)}, {verdict} noise"


def difference_words(test: Row) -> str:
    """A difference, paired by seed, with its interval.

    Args:
        test: a row of `stats.contrasts_with_baseline`.
    """
    if isnan(test["difference"]):
        return "no seed in common to compare them by"

    interval = ""
    if not isnan(test["low"]):
        interval = f"95 % interval {percent(test['low'])} to {percent(test['high'])}, "

    return f"a difference of {percent(test['difference'])} points ({interval}{noise_words(test)})"
