"""The results of a comparison on disk and on the terminal: tables, plots, page, verdict."""

import shlex
import sys
from pathlib import Path

import pandas as pd
import yaml

from clipsmall.compare import compare_page
from clipsmall.compare.budgets import Budgets
from clipsmall.compare.compare_page import DASH
from clipsmall.compare.grid import Comparison
from clipsmall.compare.outcomes import outcomes
from clipsmall.compare.plots import figures, save
from clipsmall.compare.samples import TestedSample, samples
from clipsmall.compare.study import percent
from clipsmall.compare.summary import contrasts, summarise
from clipsmall.compare.verdict import verdict
from clipsmall.report_page import page


def tell(comparison: Comparison, budgets: Budgets, interval: str) -> pd.DataFrame:
    """Writes everything to the comparison's folder, prints table and verdict; returns the frame
    `runs`.
    """
    out = Path(comparison.out)
    runs, curves = outcomes(comparison, budgets.cells())
    comparison = _rivals(comparison, runs)
    summary = _there(
        summarise(runs, comparison.axes, comparison.metrics, interval), runs, comparison
    )
    tests = _there(
        contrasts(runs, comparison.axes, comparison.metric, comparison.against), runs, comparison
    )
    words = [*verdict(comparison, runs, summary, tests), *_rates(budgets)]
    for name, frame in {
        "runs": runs,
        "curves": curves,
        "summary": summary,
        "contrasts": tests,
    }.items():
        frame.to_csv(out / f"{name}.csv", index=False)
        frame.to_parquet(out / f"{name}.parquet", index=False)
    drawings = figures(comparison, runs, curves)
    save(drawings, out)
    shown = compare_page.Page(
        title=comparison.title,
        subtitle=f"{comparison.spent}; {comparison.metric} decides",
        facts=compare_page.facts(comparison, runs),
        verdict=words,
        tables=[*compare_page.tables(comparison, summary, tests), *_tried(budgets)],
        failures=compare_page.failures(comparison, runs),
        figures=drawings,
        samples=_samples(comparison, runs),
        config=yaml.safe_dump(
            comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True
        ),
        command=shlex.join(["python", "-m", "clipsmall.compare", *sys.argv[1:]]),
    )
    compare_page.write(shown, path := out / "compare.html")
    print(printed(comparison, summary), *words, f"\nreport: {path.resolve()}", sep="\n")
    return runs


def printed(comparison: Comparison, summary: pd.DataFrame) -> str:
    """The table for a terminal: a line a setting, metrics in percent."""
    table = summary[[*comparison.axes, "n"]].rename(columns={"n": "runs"})
    for metric in comparison.metrics:
        table[metric] = [
            DASH if pd.isna(mean) else percent(mean) + f" ± {percent(sd)}" * (not pd.isna(sd))
            for mean, sd in zip(summary[metric], summary[f"{metric} sd"], strict=True)
        ]
    for column, values in {"seconds": summary["seconds"], "MiB": 1024 * summary["memory"]}.items():
        table[column] = [DASH if pd.isna(value) else f"{value:,.0f}" for value in values]
    return table.to_string(index=False)


def _rivals(comparison: Comparison, runs: pd.DataFrame) -> Comparison:
    """Within a budget of memory the baseline meets rivals of other batches: its own batch is part
    of what it is.
    """
    against = dict(comparison.against)
    for axis in comparison.batch_axes if comparison.budget.memory else ():
        mine = runs[(runs[list(against)] == list(against.values())).all(axis=1)]
        if axis not in against and mine[axis].nunique() == 1:
            against[axis] = mine[axis].iloc[0]
    return comparison.model_copy(update={"baseline": against})


def _there(frame: pd.DataFrame, runs: pd.DataFrame, comparison: Comparison) -> pd.DataFrame:
    """The rows of settings that are part of the comparison: a budget of memory leaves batches
    out.
    """
    axes = list(comparison.axes)
    shown = set(runs[axes].itertuples(index=False, name=None))
    return frame[
        [levels in shown for levels in frame[axes].itertuples(index=False, name=None)]
    ].reset_index(drop=True)


def _tried(budgets: Budgets) -> list[page.Table]:
    """The learning rates that were tried, one of which each setting took."""
    rates = budgets.comparison.lr
    trials = budgets.tuning(budgets.fitting)
    if not rates or not trials:
        return []
    metric = rates.metric or budgets.comparison.metric
    rows = []
    for run in trials:
        score = budgets.score(run)
        lr = page.TableCell(f"{run.config.optim.lr:g}", "number")
        shown = DASH if score is None else percent(score)
        rows.append(
            [
                run.title.rpartition(", lr ")[0],
                lr,
                page.TableCell(shown, "number"),
                run.error or run.state,
            ]
        )
    note = f"{rates.pairs:,} pairs each, on a seed of their own; the best by {metric} is taken."
    return [
        page.Table("Learning rates tried", note, ["setting", "lr", f"{metric}, %", "state"], rows)
    ]


def _rates(budgets: Budgets) -> list[str]:
    if not (edges := budgets.edges()):
        return []
    return [
        f"The best learning rate is the least or greatest of those tried: {'; '.join(edges)}. Try more."
    ]


def _samples(comparison: Comparison, runs: pd.DataFrame) -> list[TestedSample]:
    """Of each level of the first axis its best setting among those that `gallery.at` names, its
    first seed.
    """
    done = runs[runs["state"] == "done"].dropna(subset=comparison.metric)
    for axis, level in comparison.gallery.at.items():
        done = done[done[axis] == level]
    axes = list(comparison.axes)
    models = []
    for level in comparison.axes[axes[0]]:
        mine = done[done[axes[0]] == level]
        if len(mine):
            means = mine.groupby(axes)[comparison.metric].mean()
            best = means.idxmax()
            levels = best if isinstance(best, tuple) else (best,)
            chosen = mine[(mine[axes] == list(levels)).all(axis=1)].iloc[0]
            models.append((", ".join(levels), Path(chosen["folder"])))
    models = models[: comparison.gallery.models]
    try:
        return samples(models)
    except (ValueError, OSError, RuntimeError) as error:
        # data on another machine, a full GPU: the page says so
        return [TestedSample(title, error=str(error)) for title, _ in models]
