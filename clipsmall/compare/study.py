"""The tables of a comparison by setting, and how settings and numbers are spoken of."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import pandas as pd

from clipsmall.compare.grid import Comparison
from clipsmall.compare.summary import Levels, contrasts, elsewhere

Row = dict[str, Any]
# p below which two settings are told apart
TOLD = 0.05


@dataclass(frozen=True)
class Study:
    """`runs` and the rows of `summarise` and `contrasts` (first metric, against the baseline)."""

    comparison: Comparison
    runs: pd.DataFrame
    table: dict[Levels, Row]
    tests: list[Row]

    def ranked(self, metric: str) -> list[Levels]:
        """The settings that have this metric, the best first."""
        known = [levels for levels, row in self.table.items() if not isnan(row[metric])]
        return sorted(known, key=lambda levels: -self.table[levels][metric])

    def levels(self, row: Row) -> Levels:
        return tuple(row[axis] for axis in self.comparison.axes)

    def place(self, levels: Levels) -> Levels:
        """The levels on the axes that the baseline leaves open: where it is compared."""
        return elsewhere(levels, self.comparison.axes, self.comparison.against)

    def duel(self, metric: str, one: Levels, other: Levels) -> Row:
        """`one` minus `other` as in `contrasts`, its noise that of the settings at the places of
        the two.

        The plain p serves for the best and the runner-up: having picked them favours no difference,
        as the runner-up is the nearest to the best (Gutmann & Maymin 1987, Is the selected
        population the best?, Annals of Statistics).
        """
        axes = self.comparison.axes
        around = {self.place(one), self.place(other)}
        near = [
            self.place(levels) in around
            for levels in self.runs[list(axes)].itertuples(index=False, name=None)
        ]
        found = contrasts(self.runs[near], axes, metric, dict(zip(axes, other, strict=True)))
        return next(row for row in records(found) if self.levels(row) == one)

    def name(self, levels: Levels | Mapping[str, str]) -> str:
        """("dcl", "32") -> "dcl at batch size 32"."""
        at = (
            levels
            if isinstance(levels, Mapping)
            else dict(zip(self.comparison.axes, levels, strict=True))
        )
        first = next(iter(self.comparison.axes))
        bare = {axis for axis, level in at.items() if axis == first and isnan(number(level))}
        head, *rest = [
            level if axis in bare else f"{spoken(axis)} {level}" for axis, level in at.items()
        ]
        return f"{head} at {', '.join(rest)}" if rest else head

    def rival(self, levels: Levels) -> str:
        """What it is compared as: its levels on the baseline's axes."""
        at = zip(self.comparison.axes, levels, strict=True)
        return self.name({axis: level for axis, level in at if axis in self.comparison.against})

    @property
    def baseline(self) -> str:
        return self.name(self.comparison.against)

    def at(self, places: Iterable[Levels]) -> str:
        """[("16",), ("32",)] -> " at batch sizes 16 and 32"; all of the grid's -> " at every batch
        size".
        """
        chosen = list(dict.fromkeys(places))
        every = {self.place(levels) for levels in self.table}
        axes = [
            spoken(axis) for axis in self.comparison.axes if axis not in self.comparison.against
        ]
        if not axes:
            return ""
        if len(chosen) == len(every) > 1:
            return f" at every {' and '.join(axes)}"
        if len(axes) == 1:
            several = "s" if len(chosen) > 1 and not isnan(number(chosen[0][0])) else ""
            return f" at {axes[0]}{several} {listed([place[0] for place in chosen])}"
        if len(chosen) > 3:
            return f" in {len(chosen)} of {len(every)} combinations of {listed(axes)}"
        each = [
            ", ".join(f"{axis} {level}" for axis, level in zip(axes, place, strict=True))
            for place in chosen
        ]
        return f" at {listed(each)}"

    def grouped(self, chosen: Iterable[Levels]) -> str:
        """Settings by rival: "dcl at batch sizes 16 and 32; gcl at batch size 64"."""
        groups: dict[str, list[Levels]] = {}
        for levels in chosen:
            groups.setdefault(self.rival(levels), []).append(self.place(levels))
        return "; ".join(who + self.at(places) for who, places in groups.items())

    def value(self, levels: Levels, metric: str) -> str:
        """Mean and what is known of it: "43.1 ± 0.5 %", or "43.1 % (42.6 to 43.5)" with bootstrap
        intervals.
        """
        row = self.table[levels]
        seeds = len(self.comparison.seeds)
        if isnan(row[metric]):
            return "no result"
        sd = row[f"{metric} sd"]
        low = row.get(f"{metric} low", nan)
        if not isnan(low):
            text = f"{percent(row[metric])} % ({percent(low)} to {percent(row[f'{metric} high'])})"
        else:
            text = (
                f"{percent(row[metric])} %"
                if isnan(sd)
                else f"{percent(row[metric])} ± {percent(sd)} %"
            )
        return text if row["n"] == seeds else f"{text} ({row['n']} of {seeds} seeds)"


def records(frame: pd.DataFrame) -> list[Row]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def number(level: str) -> float:
    """NaN if it is none."""
    try:
        return float(level)
    except ValueError:
        return nan


def spoken(axis: str) -> str:
    """data.batch_size -> batch size."""
    return axis.rpartition(".")[2].replace("_", " ")


def listed(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}z.1f}"


def chance(p: float, most: bool = False) -> str:
    return "p < 0.001" if p < 0.001 else f"p {'≤' if most else '='} {p:.2g}"


def noise(test: Row, p: str = "p") -> str:
    """Whether a difference is more than the seeds make."""
    return (
        "not tested"
        if isnan(test[p])
        else f"{chance(test[p])}, {'more than' if test[p] < TOLD else 'within'} noise"
    )


def gap(test: Row) -> str:
    """A difference, seed for seed, with its interval."""
    if isnan(test["difference"]):
        return "no seed in common to compare them by"
    interval = (
        ""
        if isnan(test["low"])
        else f"95 % interval {percent(test['low'])} to {percent(test['high'])}, "
    )
    return f"a difference of {percent(test['difference'])} points ({interval}{noise(test)})"
