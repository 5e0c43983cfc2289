"""A comparison as one HTML page: verdict, tables, failures, plots, and models side by side."""

from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

import pandas as pd

from clipsmall.compare.grid import Comparison
from clipsmall.compare.model_samples import TestedSample
from clipsmall.compare.plots import NamedFigure
from clipsmall.compare.wording import (
    SIGNIFICANCE_LEVEL,
    axis_words,
    frame_rows,
    level_number,
    percent,
)
from clipsmall.pages.figures import figure_address, heat_map_address, plot_style
from clipsmall.pages.html_page import DASH, Table, TableCell, fill_template, save_html

# Words for states of unfinished runs; other states are shown as they are.
STATE_WORDS = {
    "unfit": "does not fit the memory",
    "missing": "not run yet",
    "begun": "begun, not finished",
}
# Column of the summary -> heading in the table of every setting.
COST_HEADINGS = {
    "memory": "memory, MiB",
    "seconds": "time, s",
    "pairs_per_second": "pairs/s",
    "logit_scale": "logit scale",
}
NO_VALUE = TableCell(DASH, "number")


@dataclass
class ComparisonPage:
    """Everything the page shows; empty parts have no heading."""

    title: str
    subtitle: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    # run, state, error
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    # from `plots.comparison_figures`
    figures: dict[str, NamedFigure] = field(default_factory=dict)
    samples: list[TestedSample] = field(default_factory=list)
    config: str = ""
    command: str = ""


def render_comparison_page(page: ComparisonPage) -> str:
    """The page as HTML; titles, captions, levels, errors and configs are escaped."""
    with plot_style():
        drawings = [_drawing(caption, figure) for caption, figure in page.figures.values()]
        matrices = [
            heat_map_address(sample.matrix, [], (4.6, 3.8))
            for sample in page.samples
            if sample.labels
        ]

    models = [sample for sample in page.samples if not sample.error]
    # one tuple per query, with the answers of each model
    queries = list(zip(*(model.gallery for model in models), strict=True))
    return fill_template(
        "compare/compare_page.html.jinja",
        page=page,
        drawings=drawings,
        matrices=matrices,
        models=models,
        queries=queries,
    )


def _drawing(caption: str, figure: Any) -> tuple[str, str, str, bool]:
    """Title, note, data: address, and whether it needs the page's full width."""
    title, _, note = caption.partition(": ")
    return title, note, figure_address(figure), figure.get_figwidth() > 6


def write_comparison_page(page: ComparisonPage, path: Path) -> None:
    """Render the page to `path`, whole or not at all. Raises OSError."""
    save_html(render_comparison_page(page), path)


def comparison_facts(comparison: Comparison, runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The facts in the boxes at the top."""
    facts = []
    for axis, levels in comparison.axes.items():
        facts.append((axis_words(axis), f"{len(levels)}: {', '.join(levels)}"))

    done = (runs["state"] == "done").sum()
    seconds = runs["seconds"].sum()
    time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return [
        *facts,
        ("seeds", str(len(comparison.seeds))),
        ("runs done", f"{done} of {len(runs)}"),
        ("each run", comparison.budget_words),
        ("time in all", time),
    ]


def unfinished_runs(comparison: Comparison, runs: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(run, state, error) of all unfinished runs, failed ones first.

    Seeds with the same state and error are one row.
    """
    rows = frame_rows(runs[runs["state"] != "done"])
    rows.sort(key=lambda row: row["state"] != "failed")

    seeds_of: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        setting = ", ".join(f"{axis_words(axis)} {row[axis]}" for axis in comparison.axes)
        outcome = (setting, row["state"], row["error"])
        seeds = seeds_of.setdefault(outcome, [])
        seeds.append(str(row["seed"]))

    unfinished = []
    for (setting, state, error), seeds in seeds_of.items():
        plural = "s" if len(seeds) > 1 else ""
        run = f"{setting}, seed{plural} {', '.join(seeds)}"
        unfinished.append((run, STATE_WORDS.get(state, state), error))

    return unfinished


def comparison_tables(
    comparison: Comparison, summary: pd.DataFrame, contrasts: pd.DataFrame
) -> list[Table]:
    """The main metric at a glance (first axis down, second across), and every setting in full.

    Args:
        summary: of `summarise_runs`.
        contrasts: of `contrasts_with_baseline`, of the first metric against the baseline.
    """
    tables = [_table_of_settings(comparison, summary, contrasts)]
    # a two-way table needs exactly two axes
    if len(comparison.axes) == 2 and not summary[comparison.metric].isna().all():
        tables.insert(0, _table_at_a_glance(comparison, summary))

    return tables


def _table_at_a_glance(comparison: Comparison, summary: pd.DataFrame) -> Table:
    down, across = comparison.axes
    metric = comparison.metric
    best = summary.groupby(across)[metric].max()
    row_of = {(row[down], row[across]): row for row in frame_rows(summary)}
    # a memory limit may leave out batch sizes
    shown = [level for level in comparison.axes[across] if level in best]
    empty = {metric: nan}

    rows = []
    for level in comparison.axes[down]:
        cells: list[Any] = [level]
        for other in shown:
            row = row_of.get((level, other), empty)
            cells.append(_mean_cell(row, metric, best[other]))

        rows.append(cells)

    across_words = axis_words(across)
    note = f"Percent, mean over the seeds; across: {across_words}. Bold: the best of a column."
    return Table(f"{metric} at a glance", note, [axis_words(down), *shown], rows)


def _mean_cell(row: dict[str, Any], metric: str, best: float) -> TableCell:
    """43.1 ± 0.5, in percent; or with a bootstrap interval 43.1 (42.6 to 43.5)."""
    mean = row[metric]
    if isnan(mean):
        return NO_VALUE

    sd = row[f"{metric} sd"]
    low = row.get(f"{metric} low", nan)
    spread = ""
    if not isnan(low):
        spread = f" ({percent(low)} to {percent(row[f'{metric} high'])})"
    elif not isnan(sd):
        spread = f" ± {percent(sd)}"

    return TableCell(percent(mean) + spread, "number best" if mean == best else "number")


def _table_of_settings(
    comparison: Comparison, summary: pd.DataFrame, contrasts: pd.DataFrame
) -> Table:
    axes = list(comparison.axes)
    seeds = len(comparison.seeds)
    test_of = {tuple(row[axis] for axis in axes): row for row in frame_rows(contrasts)}
    best = {metric: summary[metric].max() for metric in comparison.metrics}

    rows = []
    for row in frame_rows(summary):
        levels = tuple(row[axis] for axis in axes)
        cells = []
        for level in levels:
            cells.append(TableCell(level, "" if isnan(level_number(level)) else "number"))

        cells.append(TableCell(f"{row['n']} of {seeds}", "number"))
        cells += [_mean_cell(row, metric, best[metric]) for metric in comparison.metrics]
        cells += _difference_cells(test_of.get(levels))
        for cost in COST_HEADINGS:
            # the summary is in GiB, the table in MiB
            value = 1024 * row[cost] if cost == "memory" else row[cost]
            cells.append(_cost_cell(value))

        rows.append(cells)

    against = f"{comparison.metric} against {', '.join(comparison.baseline_levels.values())}"
    columns = [
        *map(axis_words, axes),
        "runs",
        *comparison.metrics,
        against,
        "p",
        *COST_HEADINGS.values(),
    ]
    note = (
        "Percent, mean ± standard deviation over the seeds; click on a heading to sort. "
        "Against the baseline at the same levels elsewhere: points seed for seed, "
        f"p by Holm over its rivals, * below {SIGNIFICANCE_LEVEL}."
    )
    return Table("Every setting", note, columns, rows)


def _difference_cells(test: dict[str, Any] | None) -> list[TableCell]:
    """The difference from the baseline, and its p."""
    if test is None or isnan(test["difference"]):
        return [NO_VALUE, NO_VALUE]

    p = test["p Holm"]
    if isnan(p):
        p_cell = NO_VALUE
    else:
        star = " *" if p < SIGNIFICANCE_LEVEL else ""
        p_cell = TableCell(f"{p:.2g}{star}", "number")

    return [TableCell(percent(test["difference"], "+"), "number"), p_cell]


def _cost_cell(value: float) -> TableCell:
    """At least three significant digits; a plain number would be shown with all its digits."""
    if isnan(value):
        return NO_VALUE

    digits = 2
    if abs(value) >= 10:
        digits = 1

    if abs(value) >= 100:
        digits = 0

    return TableCell(f"{value:,.{digits}f}", "number")
