"""The results of a comparison on disk and on the terminal: tables, plots, page, verdict."""

import shlex
import sys
from pathlib import Path

import pandas as pd
import yaml

from clipsmall.comparing import compare_page
from clipsmall.comparing.budgets import Budgets
from clipsmall.comparing.grid import Comparison
from clipsmall.comparing.outcomes import outcomes
from clipsmall.comparing.plots import figures, save
from clipsmall.comparing.samples import Sample, samples
from clipsmall.comparing.study import percent
from clipsmall.comparing.summary import contrasts, summarise
from clipsmall.comparing.verdict import verdict

DASH = "\N{EN DASH}"


def tell(comparison: Comparison, budgets: Budgets, interval: str) -> pd.DataFrame:
    """Writes everything to the comparison's folder, prints table and verdict; returns the frame `runs`."""
    out = Path(comparison.out)
    runs, curves = outcomes(comparison, budgets.cells())
    summary = summarise(runs, comparison.axes, comparison.metrics, interval)
    tests = contrasts(runs, comparison.axes, comparison.metric, comparison.against)
    words = [*verdict(comparison, runs, summary, tests), *_rates(budgets)]
    for name, frame in {"runs": runs, "curves": curves, "summary": summary, "contrasts": tests}.items():
        frame.to_csv(out / f"{name}.csv", index=False)
        frame.to_parquet(out / f"{name}.parquet", index=False)
    drawings = figures(comparison, runs, curves)
    save(drawings, out)
    shown = compare_page.Page(
        title=comparison.title,
        subtitle=f"{comparison.budget.words}; {comparison.metric} decides",
        facts=compare_page.facts(comparison, runs),
        verdict=words,
        tables=compare_page.tables(comparison, summary, tests),
        failures=compare_page.failures(comparison, runs),
        figures=drawings,
        samples=_samples(comparison, runs),
        config=yaml.safe_dump(comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
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


def _rates(budgets: Budgets) -> list[str]:
    if not (edges := budgets.edges()):
        return []
    return [f"The best learning rate is the least or greatest of those tried: {'; '.join(edges)}. Try more."]


def _samples(comparison: Comparison, runs: pd.DataFrame) -> list[Sample]:
    """Of each level of the first axis its best setting among those that `gallery.at` names, its first seed."""
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
    except ValueError as error:  # the data may lie on another machine: the page says so
        return [Sample(title, error=str(error)) for title, _ in models]
