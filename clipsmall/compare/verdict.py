"""What a comparison found, in sentences: who leads, by how much, and what the seeds leave open."""

from math import isnan
from statistics import median

import pandas as pd

from clipsmall.compare.grid import Comparison
from clipsmall.compare.study import TOLD, Row, Study, chance, gap, listed, noise, percent, records
from clipsmall.compare.summary import Levels
from clipsmall.compare.trades import trades

# what a contrast says of a rival
HEADS = {
    "better": "Better than {}",
    "worse": "Worse than {}",
    "open": "Not told apart from {}",
    "ahead": "Ahead of {}, untested",
    "behind": "Behind {}, untested",
}


def verdict(
    comparison: Comparison, runs: pd.DataFrame, summary: pd.DataFrame, contrasts: pd.DataFrame
) -> list[str]:
    """Sentences for somebody in a hurry, the answer first; numbers are percent, differences
    percentage points.

    Args:
        comparison, runs: the grid, and a row for each of its runs (`outcomes`).
        summary: of `summarise`; contrasts: of `contrasts`, of the first metric against
            `comparison.against`.
    """
    table = {tuple(row[axis] for axis in comparison.axes): row for row in records(summary)}
    study = Study(comparison, runs, table, records(contrasts))
    if not study.ranked(comparison.metric):
        return ["No run is done yet: there is nothing to conclude.", *_unfinished(study)]
    found = [*_best(study), *_unfinished(study), *_leaders(study), *_against(study), *trades(study)]
    return [*found, *_other_metrics(study), *_unsteady(study), *_footing(study)]


def _best(study: Study) -> list[str]:
    metric = study.comparison.metric
    first, *others = study.ranked(metric)
    best = f"{study.name(first)}, {study.value(first, metric)} {metric}"
    if not others:
        return [f"Only one setting is done: {best}."]
    test = study.duel(metric, first, others[0])
    versus = ("by the means; seed for seed it is behind: " if test["difference"] < 0 else "") + gap(
        test
    )
    return [
        f"Best: {best}. Runner-up: {study.name(others[0])}, {study.value(others[0], metric)}; {versus}."
    ]


def _says(test: Row) -> str:
    """What a contrast says of the rival: a key of HEADS, or "" where the two cannot be compared."""
    difference = test["difference"]
    p = test["p Holm"]
    if isnan(difference):
        return ""
    if isnan(p) and abs(difference) > 1e-9:
        return "ahead" if difference > 0 else "behind"
    return "open" if isnan(p) or p >= TOLD else "better" if difference > 0 else "worse"


def _leaders(study: Study) -> list[str]:
    """Who leads at each batch size, or whatever else the baseline leaves open."""
    said = {study.levels(test): _says(test) for test in study.tests}
    against = study.baseline
    asides = {
        "better": "better than {}",
        "worse": "worse than {} seed for seed",
        "open": "not told apart from {}",
        "": "no seed in common with {}",
    }
    ranked = study.ranked(study.comparison.metric)
    groups = dict[str, list[Levels]]()
    for place in dict.fromkeys(map(study.place, study.table)):
        here = [levels for levels in ranked if study.place(levels) == place]
        if len(here) > 1:
            who = study.rival(here[0])
            aside = asides.get(said.get(here[0], ""), "not tested against {}")
            groups.setdefault(
                who if who == against else f"{who} ({aside.format(against)})", []
            ).append(place)
    leaders = "; ".join(who + study.at(places) for who, places in groups.items())
    return [f"In the lead: {leaders}."] if sum(map(len, groups.values())) > 1 else []


def _against(study: Study) -> list[str]:
    """All rivals against the baseline, a sentence for each outcome."""
    found: dict[str, dict[str, list[Row]]] = {says: {} for says in HEADS}
    unbeaten = dict[Levels, bool]()
    for test in study.tests:
        says = _says(test)
        levels = study.levels(test)
        if says:
            found[says].setdefault(study.rival(levels), []).append(test)
        if says in ("better", "worse", "open"):
            unbeaten[study.place(levels)] = (
                unbeaten.get(study.place(levels), True) and says != "better"
            )
    sentences = []
    for says, rivals in found.items():
        items = [
            who + study.at(study.place(study.levels(t)) for t in tests) + _by(tests)
            for who, tests in rivals.items()
        ]
        sentences += [f"{HEADS[says].format(study.baseline)}: {'; '.join(items)}."] * bool(items)
    if safe := [place for place, holds in unbeaten.items() if holds]:
        sentences.append(f"Nothing is shown to beat {study.baseline}{study.at(safe)}.")
    return sentences


def _by(tests: list[Row]) -> str:
    """The rows' range of differences and the largest of their p: " (+1.2 to +4.1 points, p ≤
    0.012)".
    """
    values = sorted(test["difference"] for test in tests)
    p = max(test["p Holm"] for test in tests)
    text = " to ".join(dict.fromkeys(percent(value, "+") for value in (values[0], values[-1])))
    return f" ({text} points, {chance(p, len(tests) > 1)})" if p < TOLD else f" ({text} points)"


def _other_metrics(study: Study) -> list[str]:
    """Those that name another best setting than the first."""
    main, *metrics = study.comparison.metrics
    best = study.ranked(main)[0]
    items = []
    for metric in metrics:
        winner = next(iter(study.ranked(metric)), best)
        if winner != best and study.table[winner][metric] != study.table[best][metric]:
            values = f"{study.value(winner, metric)} against {study.value(best, metric)}"
            # Holm's p: the winner is picked out of all
            test = study.duel(metric, winner, best)
            items.append(f"{metric}: {study.name(winner)}, {values}, {noise(test, 'p Holm')}")
    if items:
        return [f"Best by another metric: {'; '.join(items)}."]
    return ["The other metrics have the same best setting."] if metrics else []


def _unfinished(study: Study) -> list[str]:
    """Runs without a result, by why; and results without a number."""
    total = len(study.table) * len(study.comparison.seeds)
    reasons = {"failed": "failed", "missing": "not done yet", "unfit": "too large for the memory"}
    items = []
    for state, words in reasons.items():
        if settings := [levels for levels, row in study.table.items() if row[state]]:
            count = sum(study.table[levels][state] for levels in settings)
            items.append(f"{count} {words} ({study.grouped(settings)})")
    done = study.runs[study.runs["state"] == "done"]
    metric = study.comparison.metric
    if blank := sorted({study.levels(row) for row in records(done[done[metric].isna()])}):
        items.append(f"{done[metric].isna().sum()} done without {metric} ({study.grouped(blank)})")
    if not items:
        return []
    sentences = [
        f"{len(done)} of {total} runs are done: {listed(items)}. The verdict is of what is done."
    ]
    for run in records(study.runs[study.runs["state"] == "failed"])[:1]:
        error = (str(run["error"]).strip() or "no message").splitlines()[-1]
        sentences.append(
            f"The first failure, {study.name(study.levels(run))}, seed {run['seed']}: {error[:160]}"
        )
    return sentences


def _unsteady(study: Study) -> list[str]:
    """Settings that vary over 4 times as much between seeds as those that they are compared with.

    Of equal ones 1 in 1000 does (six settings, three seeds: an F of 2 and 10 degrees of freedom
    above 16).
    """
    metric = study.comparison.metric
    items = []
    for levels, row in study.table.items():
        others = [
            study.table[at][f"{metric} sd"]
            for at in study.table
            if study.place(at) == study.place(levels)
        ]
        squares = sum(sd**2 for sd in others if not isnan(sd)) - row[f"{metric} sd"] ** 2
        count = sum(not isnan(sd) for sd in others) - 1
        if count > 1 and row[f"{metric} sd"] ** 2 * count > 16 * squares:
            items.append(f"{study.name(levels)} (± {percent(row[f'{metric} sd'])})")
    if not items:
        return []
    return [
        f"Far less steady than the rest: {listed(items)}; p is too small there, and too large for the rest."
    ]


def _footing(study: Study) -> list[str]:
    """What the numbers rest on."""
    budget = study.comparison.spent
    seeds = len(study.comparison.seeds)
    if max(row["n"] for row in study.table.values()) < 2:
        return [f"{budget}; one run each: no interval, no significance."]
    drawn = any(f"{study.comparison.metric} low" in row for row in study.table.values())
    spread = "in brackets the 95 % bootstrap interval" if drawn else "± their standard deviation"
    found = [f"{budget}, {seeds} seeds, {spread}."]
    if known := [
        (test["high"] - test["low"]) / 2 for test in study.tests if not isnan(test["high"])
    ]:
        each = study.at(map(study.place, study.table))
        found.append(
            f"Better and worse: p < {TOLD}, compared seed by seed and corrected for many rivals (Holm){each}; "
            f"a single difference is known to about ± {percent(median(known))} points."
        )
    return found
