"""A comparison as one self-contained HTML page: verdict, tables, failures, plots, and models side
by side.
"""

from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

import pandas as pd

from clipsmall.compare.grid import Comparison
from clipsmall.compare.plots import Named
from clipsmall.compare.samples import TestedSample
from clipsmall.compare.study import TOLD, number, percent, records, spoken
from clipsmall.report_page import page

DASH = "\N{EN DASH}"
STATES = {
    "unfit": "does not fit the memory",
    "missing": "not run yet",
    "begun": "begun, not finished",
}


@dataclass
class Page:
    """Everything the page shows; what is empty leaves no heading behind."""

    title: str
    subtitle: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    tables: list[page.Table] = field(default_factory=list)
    # run, state, error
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    # of `plots.figures`
    figures: dict[str, Named] = field(default_factory=dict)
    samples: list[TestedSample] = field(default_factory=list)
    config: str = ""
    command: str = ""


def render(shown: Page) -> str:
    """The whole page; titles, captions, levels, errors and configs are untrusted and escaped."""
    with page.drawing():
        drawings = [
            (*_halves(text), page.svg(figure), figure.get_figwidth() > 6)
            for text, figure in shown.figures.values()
        ]
        matrices = [
            page.heat_map(each.matrix, [], (4.6, 3.8)) for each in shown.samples if each.labels
        ]
    models = [each for each in shown.samples if not each.error]
    return page.filled(
        "compare/compare.html.jinja",
        page=shown,
        drawings=drawings,
        matrices=matrices,
        models=models,
        queries=list(zip(*(each.gallery for each in models), strict=True)),
    )


def write(shown: Page, path: Path) -> None:
    """Render to `path`, whole or not at all."""
    page.save(render(shown), path)


def _halves(text: str) -> tuple[str, str]:
    head, _, note = text.partition(": ")
    return head, note


def facts(comparison: Comparison, runs: pd.DataFrame) -> list[tuple[str, str]]:
    """What stands in the boxes on top."""
    done = (runs["state"] == "done").sum()
    seconds = runs["seconds"].sum()
    return [
        *(
            (spoken(axis), f"{len(levels)}: {', '.join(levels)}")
            for axis, levels in comparison.axes.items()
        ),
        ("seeds", str(len(comparison.seeds))),
        ("runs done", f"{done} of {len(runs)}"),
        ("each run", comparison.spent),
        (
            "time in all",
            f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min",
        ),
    ]


def failures(comparison: Comparison, runs: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(run, state, error) of all that is not done, what failed first; seeds that came to the same
    share a line.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in sorted(
        records(runs[runs["state"] != "done"]), key=lambda row: row["state"] != "failed"
    ):
        setting = ", ".join(f"{spoken(axis)} {row[axis]}" for axis in comparison.axes)
        found.setdefault((setting, row["state"], row["error"]), []).append(str(row["seed"]))
    return [
        (
            f"{setting}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}",
            STATES.get(state, state),
            error,
        )
        for (setting, state, error), seeds in found.items()
    ]


def tables(
    comparison: Comparison, summary: pd.DataFrame, contrasts: pd.DataFrame
) -> list[page.Table]:
    """The main metric at a glance (first axis down, second across), and every setting in full.

    Args:
        summary: of `summarise`; contrasts: of `contrasts`, for the first metric against
            `comparison.against`.
    """
    return [*_glance(comparison, summary), _full(comparison, summary, contrasts)]


def _spread(row: dict[str, Any], metric: str, best: float) -> page.TableCell:
    """43.1 ± 0.5, in percent; or with a bootstrap interval 43.1 (42.6 to 43.5)."""
    if isnan(mean := row[metric]):
        return page.TableCell(DASH, "number")
    sd = row[f"{metric} sd"]
    low = row.get(f"{metric} low", nan)
    wide = f" ± {percent(sd)}" if isnan(low) and not isnan(sd) else ""
    wide = wide if isnan(low) else f" ({percent(low)} to {percent(row[f'{metric} high'])})"
    return page.TableCell(percent(mean) + wide, "number best" if mean == best else "number")


def _glance(comparison: Comparison, summary: pd.DataFrame) -> list[page.Table]:
    down, *others = comparison.axes
    if len(others) != 1 or summary[comparison.metric].isna().all():
        return []
    (across,), metric = others, comparison.metric
    best = summary.groupby(across)[metric].max()
    table = {(row[down], row[across]): row for row in records(summary)}
    there = [at for at in comparison.axes[across] if at in best]
    rows = [
        [level, *(_spread(table.get((level, at), {metric: nan}), metric, best[at]) for at in there)]
        for level in comparison.axes[down]
    ]
    note = f"Percent, mean over the seeds; across: {spoken(across)}. Bold: the best of a column."
    return [page.Table(f"{metric} at a glance", note, [spoken(down), *there], rows)]


def _full(comparison: Comparison, summary: pd.DataFrame, contrasts: pd.DataFrame) -> page.Table:
    axes = list(comparison.axes)
    seeds = len(comparison.seeds)
    against = {tuple(row[axis] for axis in axes): row for row in records(contrasts)}
    rival = f"{comparison.metric} against {', '.join(comparison.against.values())}"
    costs = {
        "memory": "memory, MiB",
        "seconds": "time, s",
        "pairs_per_second": "pairs/s",
        "logit_scale": "logit scale",
    }
    rows = []
    for row in records(summary):
        levels = tuple(row[axis] for axis in axes)
        cells: list[Any] = [
            page.TableCell(level, "" if isnan(number(level)) else "number") for level in levels
        ]
        cells.append(page.TableCell(f"{row['n']} of {seeds}", "number"))
        cells += [_spread(row, metric, summary[metric].max()) for metric in comparison.metrics]
        cells += _difference(against.get(levels))
        cells += [1024 * row[cost] if cost == "memory" else row[cost] for cost in costs]
        rows.append([_rounded(each) for each in cells])
    columns = [*map(spoken, axes), "runs", *comparison.metrics, rival, "p", *costs.values()]
    note = (
        "Percent, mean ± standard deviation over the seeds; click on a heading to sort. Against the baseline at the "
        f"same levels elsewhere: points seed for seed, p by Holm over its rivals, * below {TOLD}."
    )
    return page.Table("Every setting", note, columns, rows)


def _difference(test: dict[str, Any] | None) -> list[page.TableCell]:
    if test is None or isnan(test["difference"]):
        return [page.TableCell(DASH, "number")] * 2
    p = test["p Holm"]
    told = DASH if isnan(p) else f"{p:.2g}" + " *" * (p < TOLD)
    return [
        page.TableCell(percent(test["difference"], "+"), "number"),
        page.TableCell(told, "number"),
    ]


def _rounded(value: Any) -> Any:
    """A cost in three digits or more: `page.cell` gives as many as there are."""
    if not isinstance(value, float) or isnan(value):
        return value
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return page.TableCell(f"{value:,.{digits}f}", "number")
