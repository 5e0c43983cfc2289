"""Writes the results of a comparison: tables, plots and page to its folder, verdict to stdout."""

import shlex
import sys
from pathlib import Path

import pandas as pd
import yaml

from clipsmall.compare.budgets import Budgets
from clipsmall.compare.compare_page import (
    ComparisonPage,
    comparison_facts,
    comparison_tables,
    unfinished_runs,
    write_comparison_page,
)
from clipsmall.compare.grid import Comparison
from clipsmall.compare.model_samples import TestedSample, sample_models
from clipsmall.compare.plots import comparison_figures, save_figures
from clipsmall.compare.run_tables import tables_of_runs
from clipsmall.compare.stats import contrasts_with_baseline, summarise_runs
from clipsmall.compare.verdict import verdict_sentences
from clipsmall.compare.wording import percent
from clipsmall.pages.html_page import DASH, Table, TableCell


def write_results(comparison: Comparison, budgets: Budgets, interval: str) -> pd.DataFrame:
    """Write all files to the comparison's folder, and print table and verdict.

    Args:
        interval: sd or bootstrap, see `summarise_runs`.

    Returns:
        The frame `runs` of `tables_of_runs`.
    """
    out = Path(comparison.out)
    runs, curves = tables_of_runs(comparison, budgets.cells())
    comparison = _with_full_baseline(comparison, runs)
    summary = summarise_runs(runs, comparison.axes, comparison.metrics, interval)
    summary = _settings_with_runs(summary, runs, comparison)
    contrasts = contrasts_with_baseline(
        runs, comparison.axes, comparison.metric, comparison.baseline_levels
    )
    contrasts = _settings_with_runs(contrasts, runs, comparison)
    verdict = [
        *verdict_sentences(comparison, runs, summary, contrasts),
        *_hint_of_more_rates(budgets),
    ]

    frames = {"runs": runs, "curves": curves, "summary": summary, "contrasts": contrasts}
    for name, frame in frames.items():
        frame.to_csv(out / f"{name}.csv", index=False)
        frame.to_parquet(out / f"{name}.parquet", index=False)

    figures = comparison_figures(comparison, runs, curves)
    save_figures(figures, out)
    grid = yaml.safe_dump(comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    page = ComparisonPage(
        title=comparison.title,
        subtitle=f"{comparison.budget_words}; {comparison.metric} decides",
        facts=comparison_facts(comparison, runs),
        verdict=verdict,
        tables=[*comparison_tables(comparison, summary, contrasts), *_table_of_rates(budgets)],
        failures=unfinished_runs(comparison, runs),
        figures=figures,
        samples=_best_models(comparison, runs),
        config=grid,
        command=shlex.join(["python", "-m", "clipsmall.compare", *sys.argv[1:]]),
    )
    path = out / "compare.html"
    write_comparison_page(page, path)
    print(terminal_table(comparison, summary), *verdict, sep="\n")
    print(f"\nreport: {path.resolve()}")
    return runs


def terminal_table(comparison: Comparison, summary: pd.DataFrame) -> str:
    """The table for a terminal: one line per setting, metrics in percent.

    Args:
        summary: of `summarise_runs`.
    """
    table = summary[[*comparison.axes, "n"]].rename(columns={"n": "runs"})
    for metric in comparison.metrics:
        cells = []
        for mean, sd in zip(summary[metric], summary[f"{metric} sd"], strict=True):
            # one seed has no standard deviation
            spread = "" if pd.isna(sd) else f" ± {percent(sd)}"
            text = DASH if pd.isna(mean) else percent(mean) + spread
            cells.append(text)

        table[metric] = cells

    costs = {"seconds": summary["seconds"], "MiB": 1024 * summary["memory"]}
    for column, values in costs.items():
        table[column] = [DASH if pd.isna(value) else f"{value:,.0f}" for value in values]

    return table.to_string(index=False)


def _with_full_baseline(comparison: Comparison, runs: pd.DataFrame) -> Comparison:
    """The comparison with the baseline's batch size added under a memory limit.

    There, rivals may have other batch sizes than the baseline and are compared with it anyway.
    """
    baseline = dict(comparison.baseline_levels)
    for axis in comparison.batch_axes if comparison.budget.memory else ():
        is_baseline = (runs[list(baseline)] == list(baseline.values())).all(axis=1)
        batch_sizes = runs[is_baseline][axis]
        # only if the baseline has a single batch size
        if axis not in baseline and batch_sizes.nunique() == 1:
            baseline[axis] = batch_sizes.iloc[0]

    return comparison.model_copy(update={"baseline": baseline})


def _settings_with_runs(
    frame: pd.DataFrame, runs: pd.DataFrame, comparison: Comparison
) -> pd.DataFrame:
    """The rows of settings that take part: a memory limit leaves some out."""
    axes = list(comparison.axes)
    with_runs = set(runs[axes].itertuples(index=False, name=None))

    shown = []
    for levels in frame[axes].itertuples(index=False, name=None):
        shown.append(levels in with_runs)

    return frame[shown].reset_index(drop=True)


def _table_of_rates(budgets: Budgets) -> list[Table]:
    """All learning-rate trials as a table."""
    rates = budgets.comparison.lr
    trials = budgets.rate_trials(budgets.fitting)
    if not rates or not trials:
        return []

    metric = rates.metric or budgets.comparison.metric
    rows = []
    for run in trials:
        score = budgets.trial_score(run)
        lr = TableCell(f"{run.config.optim.lr:g}", "number")
        score_cell = TableCell(DASH if score is None else percent(score), "number")
        setting = run.title.rpartition(", lr ")[0]
        rows.append([setting, lr, score_cell, run.error or run.state])

    note = f"{rates.pairs:,} pairs each, on a seed of their own; the best by {metric} is taken."
    return [Table("Learning rates tried", note, ["setting", "lr", f"{metric}, %", "state"], rows)]


def _hint_of_more_rates(budgets: Budgets) -> list[str]:
    """A warning if a best rate is at the edge of those tried, as a better one may lie beyond."""
    edges = budgets.rates_at_the_edge()
    if not edges:
        return []

    hint = "The best learning rate is the least or greatest of those tried"
    return [f"{hint}: {'; '.join(edges)}. Try more."]


def _best_models(comparison: Comparison, runs: pd.DataFrame) -> list[TestedSample]:
    """The best setting of each level of the first axis, by its first seed.

    Only settings with the levels of `gallery.at` take part.
    """
    done = runs[runs["state"] == "done"].dropna(subset=comparison.metric)
    for axis, level in comparison.gallery.at.items():
        done = done[done[axis] == level]

    axes = list(comparison.axes)
    models = []
    for level in comparison.axes[axes[0]]:
        of_level = done[done[axes[0]] == level]
        if of_level.empty:
            continue

        means = of_level.groupby(axes)[comparison.metric].mean()
        best = means.idxmax()
        # with one axis the index is not a tuple
        levels = best if isinstance(best, tuple) else (best,)
        chosen = of_level[(of_level[axes] == list(levels)).all(axis=1)].iloc[0]
        models.append((", ".join(levels), Path(chosen["folder"])))

    models = models[: comparison.gallery.models]
    try:
        return sample_models(models)
    except (ValueError, OSError, RuntimeError) as error:
        # missing data or a full GPU: the page shows the error
        return [TestedSample(title, error=str(error)) for title, _ in models]
