"""Tests of the verdict: made-up studies whose truth is known, half done, failed and of one seed.

Seen to fail when: p need not be small, is not Holm's, or its sign is ignored; a difference of
exactly 0 counts as ahead; missing settings are judged, beaten places called unbeaten, a place with
one result gets a leader; the best is the worst, its lead has the wrong sign or the noise of other
places, a lost number ranks first, missing seeds go unmentioned; noise is not noise; a substitute
needs no baseline at its own batch, no gain from the larger one, need not reach it, or is not the
smallest; fronts are upside down or the wrong way round; times are compared that were given;
unfinished runs, lost numbers, unsteady settings, one seed or bootstrap intervals are not told;
shares are not percent; NaN or -0.0 is written.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from clipsmall.compare.grid import Comparison
from clipsmall.compare.stats import COSTS, contrasts_with_baseline, summarise_runs
from clipsmall.compare.verdict import verdict_sentences

OBJECTIVES = ["softmax", "sigmoid", "sinkhorn", "dcl", "gcl", "moco"]
SIZES = ["16", "32", "64", "128", "256"]
GRID: dict[str, Any] = {"objective": OBJECTIVES, "batch_size": SIZES}
PAIR: dict[str, Any] = {"objective": ["softmax", "dcl"]}


def grid(
    axes: Mapping[str, Any] = GRID, metrics: Sequence[str] = ("recall@1",), **fields: Any
) -> Comparison:
    given = {
        "budget": {"pairs": 60_000},
        "metrics": {metric: metric for metric in metrics},
    } | fields
    return Comparison(title="a study", out="out", config=["base.yaml"], axes=dict(axes), **given)  # type: ignore[arg-type]


def done(
    comparison: Comparison, result: Callable[..., float], noise: float = 0.004
) -> pd.DataFrame:
    """All runs; result(*levels) -> the mean of the first metric, the others are its negative."""
    random = np.random.default_rng(0)
    rows = []
    common = random.normal(0, noise, len(comparison.seeds))
    for levels in product(*comparison.axes.values()):
        for at, seed in enumerate(comparison.seeds):
            value = result(*levels) + common[at] + random.normal(0, noise)
            values = {
                metric: value if metric == comparison.metric else 1 - value
                for metric in comparison.metrics
            }
            rows.append({**dict(zip(comparison.axes, levels, strict=True)), "seed": seed, **values})
    return pd.DataFrame(rows).assign(
        state="done", error="", memory=math.nan, **dict.fromkeys(COSTS, math.nan)
    )


def without(
    runs: pd.DataFrame, where: Any, state: str = "missing", error: str = ""
) -> pd.DataFrame:
    metrics = [column for column in runs if "@" in str(column)]
    runs = runs.copy()
    runs.loc[where, ["state", "error", *metrics]] = [state, error, *[math.nan] * len(metrics)]
    return runs


def said(comparison: Comparison, runs: pd.DataFrame, interval: str = "sd") -> list[str]:
    axes = comparison.axes
    against = comparison.baseline_levels
    table = summarise_runs(runs, axes, comparison.metrics, interval)
    tests = contrasts_with_baseline(runs, axes, comparison.metric, against)
    found = verdict_sentences(comparison, runs, table, tests)
    assert not [
        sentence for sentence in found if re.search(r"nan|inf\b|None|-0\.0|\[|_|  ", sentence)
    ], found
    return found


def one(sentences: list[str], start: str) -> str:
    (found,) = (sentence for sentence in sentences if sentence.startswith(start))
    return found


def growing(objective: str, size: str) -> float:
    """Every doubling of the batch gives 2 points; dcl is 3 ahead up to 128, sinkhorn 6 behind, the
    others equal.
    """
    own = {"dcl": 0.03 * (size != "256"), "sinkhorn": -0.06}.get(objective, 0.0)
    return 0.25 + 0.02 * math.log2(int(size) / 16) + own


def test_a_full_grid_is_told_in_a_dozen_sentences() -> None:
    sentences = said(grid(), done(grid(), growing))
    assert len(sentences) <= 12
    assert one(sentences, "Best").startswith("Best: ")
    assert "dcl at batch sizes 16, 32, 64 and 128 (+" in one(sentences, "Better than softmax")
    assert re.search(
        r"sinkhorn at every batch size \(-6.\d to -5.\d points, p < 0.001\)",
        one(sentences, "Worse than softmax"),
    )
    equals = one(sentences, "Not significantly different from softmax")
    assert all(f"{name} at" in equals for name in ("sigmoid", "gcl", "moco"))
    assert "dcl at batch size 256" in equals
    assert ", p" not in equals
    assert (
        one(sentences, "Nothing is shown to beat")
        == "Nothing is shown to beat softmax at batch size 256."
    )
    leaders = one(sentences, "In the lead")
    assert "dcl (better than softmax) at batch sizes 16, 32, 64 and 128" in leaders
    assert leaders.count(" at batch size 256") == 1
    assert "softmax at batch size 256 is better than softmax at batch size 16: " in " ".join(
        sentences
    )
    assert (
        one(sentences, "60,000 pairs per run")
        == "60,000 pairs per run, 3 seeds, ± their standard deviation."
    )


def test_better_needs_a_small_p() -> None:
    """Everything said of a rival is what its contrast says, whatever the noise."""
    for noise in (0.001, 0.01, 0.04):
        runs = done(grid(), growing, noise)
        sentences = said(grid(), runs)
        tests = contrasts_with_baseline(runs, GRID, "recall@1", {"objective": "softmax"})
        for test in tests.to_dict("records"):
            outcome = "Better than" if test["difference"] > 0 else "Worse than"
            start = outcome if test["p Holm"] < 0.05 else "Not significantly different from"
            clause = next(
                c for c in one(sentences, f"{start} softmax").split("; ") if test["objective"] in c
            )
            assert "every" in clause or re.search(rf"\b{test['batch_size']}\b", clause), (
                test,
                clause,
            )


@pytest.mark.parametrize(("gap", "words"), [(0.05, "more than noise"), (0.0, "within noise")])
def test_the_winner_leads_only_beyond_noise(gap: float, words: str) -> None:
    comparison = grid(PAIR, seeds=[0, 1, 2, 3])
    runs = done(comparison, lambda objective: 0.3 + gap * (objective == "dcl"))
    best = one(said(comparison, runs), "Best")
    mean, sd = (
        runs.groupby("objective")["recall@1"].agg(["mean", "std"]).sort_values("mean").iloc[-1]
    )
    assert f", {100 * mean:.1f} ± {100 * sd:.1f} % recall@1. Runner-up: " in best
    assert best.endswith(f"{words}).")
    difference = abs(runs.groupby("objective")["recall@1"].mean().diff().iloc[-1])
    assert f"a difference of {100 * difference:.1f} points" in best


def test_a_rival_far_below_is_worse() -> None:
    sentences = said(
        grid(PAIR), done(grid(PAIR), lambda objective: 0.3 - 0.04 * (objective == "dcl"))
    )
    assert one(sentences, "Worse than softmax").startswith("Worse than softmax: dcl (-")
    assert "Nothing is shown to beat softmax." in sentences
    assert "Better than" not in " ".join(sentences)


def test_equals_are_not_told_apart() -> None:
    comparison = grid({"objective": OBJECTIVES})
    sentences = said(comparison, done(comparison, lambda objective: 0.3))
    assert not [
        sentence for sentence in sentences if sentence.startswith(("Better than", "Worse than"))
    ]
    assert all(
        name in one(sentences, "Not significantly different from softmax")
        for name in OBJECTIVES[1:]
    )


def test_identical_numbers_are_not_told_apart() -> None:
    sentences = said(grid(PAIR), done(grid(PAIR), lambda objective: 0.3, noise=0))
    assert (
        one(sentences, "Not significantly different")
        == "Not significantly different from softmax: dcl (+0.0 points)."
    )
    assert "not tested" in one(sentences, "Best")


def test_a_rival_makes_up_for_a_batch() -> None:
    """dcl at 32 has 30 %: as much as softmax at 64 and a bit; softmax at 32 has 27."""
    sentences = said(grid(), done(grid(), growing, noise=0.0005))
    found = next(sentence for sentence in sentences if " reaches " in sentence)
    assert found.startswith("dcl at batch size 16 reaches softmax at batch size 32: 28.")
    assert " % against 27." in found


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(
            lambda objective, size: 0.5 - 0.001 * int(size) + 0.01 * (objective == "dcl"),
            id="it costs",
        ),
        pytest.param(
            lambda objective, size: growing("softmax", size) - 0.01 * (objective == "dcl"),
            id="none does",
        ),
    ],
)
def test_no_rival_makes_up_for_what_a_batch_does_not_give(result: Any) -> None:
    assert " reaches " not in " ".join(said(grid(), done(grid(), result, noise=0.0005)))


def test_a_substitute_is_compared_at_its_own_batch() -> None:
    """Without softmax at 16, nobody knows whether dcl makes up for anything there."""
    runs = done(grid(), growing, noise=0.0005)
    runs = without(runs, (runs["objective"] == "softmax") & (runs["batch_size"] == "16"))
    assert "dcl at batch size 32 reaches softmax at batch size 64" in " ".join(said(grid(), runs))


def test_fronts_name_what_nothing_beats() -> None:
    comparison = grid({"objective": OBJECTIVES[:3]})
    runs = done(
        comparison, lambda objective: {"softmax": 0.3, "sigmoid": 0.2, "sinkhorn": 0.25}[objective]
    )
    runs["memory"] = runs["objective"].map({"softmax": 2.0, "sigmoid": 0.25, "sinkhorn": 3.0})
    runs["seconds"] = runs["objective"].map({"softmax": 900.0, "sigmoid": 80, "sinkhorn": 85})
    sentences = said(comparison, runs)
    memory, time = (
        one(sentences, f"By the means, nothing is better for its {cost}")
        for cost in ("memory", "training")
    )
    assert memory.split(" than ")[1].startswith("sigmoid; softmax: 2")
    assert " % for 256 MiB to " in memory
    assert memory.endswith(" % for 2.0 GiB.")
    assert time.split(" than ")[1].startswith("sigmoid; sinkhorn; softmax: ")
    assert time.endswith(" % for 15 min.")
    runs.loc[0, "seconds"] = 1800.0
    assert "up to 2.0-fold between its seeds" in " ".join(said(comparison, runs))
    same_time = grid({"objective": OBJECTIVES[:3]}, budget={"seconds": 60})
    assert not [sentence for sentence in said(same_time, runs) if "training time" in sentence]
    runs["memory"] = 0.5
    assert "The memory hardly differs: 512 MiB." in said(comparison, runs)


def test_a_metric_that_disagrees_is_named() -> None:
    comparison = grid(PAIR, ("recall@1", "recall@10"))
    runs = done(comparison, lambda objective: 0.3 + 0.05 * (objective == "dcl"))
    assert one(said(comparison, runs), "Best by another metric").startswith(
        "Best by another metric: recall@10: softmax, "
    )
    runs["recall@10"] = runs["recall@1"]
    assert "The other metrics have the same best setting." in said(comparison, runs)


def test_what_is_not_done_is_counted_and_not_judged() -> None:
    def at(objective: str, size: str) -> Any:
        return (runs["objective"] == objective) & (runs["batch_size"] == size)

    runs = done(grid(), growing)
    runs = without(runs, runs["objective"] == "gcl")
    runs = without(runs, at("moco", "16"), "failed", "Traceback\n  boom\nE: oom")
    runs = without(runs, at("dcl", "256"), "unfit")
    runs = without(runs, at("sigmoid", "64") & (runs["seed"] == 1), "running")
    sentences = said(grid(), runs)
    assert one(sentences, "68 of 90 runs are done") == (
        "68 of 90 runs are done: 3 failed (moco at batch size 16), "
        "16 not done yet (sigmoid at batch size 64; gcl at every batch size) "
        "and 3 too large for the memory (dcl at batch size 256). The verdict is of what is done."
    )
    assert (
        one(sentences, "The first failure")
        == "The first failure, moco at batch size 16, seed 0: E: oom"
    )
    told = " ".join(
        sentence
        for sentence in sentences
        if not sentence.startswith(("68 of 90", "The first failure"))
    )
    assert "gcl" not in told
    assert "dcl at batch sizes 16, 32, 64 and 128 (" in told
    assert not re.search(r"moco at [^;(]*\b16\b", told)


def test_few_seeds_are_said_to_be_few() -> None:
    comparison = grid(PAIR)
    runs = done(comparison, lambda objective: 0.3 + 0.05 * (objective == "dcl"))
    sentences = said(comparison, without(runs, (runs["objective"] == "dcl") & (runs["seed"] == 2)))
    assert "(2 of 3 seeds) recall@1" in one(sentences, "Best")


def test_a_result_without_a_number_is_told() -> None:
    runs = done(grid(PAIR), lambda objective: 0.3)
    runs.loc[0, "recall@1"] = math.nan
    assert "1 done without recall@1 (softmax)" in one(said(grid(PAIR), runs), "6 of 6")


def test_no_baseline_no_comparison() -> None:
    runs = done(grid(), growing)
    sentences = said(grid(), without(runs, runs["objective"] == "softmax", "failed", ""))
    assert not [s for s in sentences if re.match("Better|Worse|Not told|Nothing|Ahead|Behind", s)]
    assert "no seed in common with softmax" in one(sentences, "In the lead")
    assert one(sentences, "The first failure").endswith("seed 0: no message")


def test_nothing_done_nothing_said() -> None:
    runs = done(grid(PAIR), lambda objective: 0.3)
    assert (
        said(grid(PAIR), without(runs, runs.index))[0]
        == "No run is done yet: there is nothing to conclude."
    )
    first = without(runs, runs["objective"] == "dcl")
    assert one(said(grid(PAIR), first), "Only one setting is done").endswith("% recall@1.")


def test_one_seed_shows_no_significance() -> None:
    comparison = grid(seeds=[7])
    sentences = said(comparison, done(comparison, growing))
    assert sentences[-1] == "60,000 pairs per run; one run each: no interval, no significance."
    told = " ".join(sentences)
    assert not re.search(r"p [=<≤]|Better than|Worse than|±|noise|interval \d", told)
    assert "dcl at " in one(sentences, "Ahead of softmax, untested")
    assert "sinkhorn at every batch size" in one(sentences, "Behind softmax, untested")


def test_bootstrap_intervals_stand_in_for_the_spread() -> None:
    runs = done(grid(PAIR), lambda objective: 0.3 + 0.05 * (objective == "dcl"))
    low, high = (
        100 * value for value in runs[runs["objective"] == "dcl"]["recall@1"].agg(["min", "max"])
    )
    sentences = said(grid(PAIR), runs, "bootstrap")
    assert f" % ({low:.1f} to {high:.1f}) recall@1." in one(sentences, "Best")
    assert "in brackets the 95 % bootstrap interval" in one(sentences, "60,000")


def test_three_axes_and_a_baseline_on_the_second() -> None:
    axes = {"batch_size": ["16", "64"], "trick": ["none", "queue"], "optim.lr": ["0.1", "0.01"]}
    comparison = grid(axes, baseline={"trick": "none"})
    runs = done(
        comparison, lambda size, trick, lr: 0.3 + 0.05 * (trick == "queue") + 0.1 * (size == "64")
    )
    sentences = said(comparison, runs)
    assert one(sentences, "Best").startswith("Best: batch size 64 at trick queue, lr 0.")
    assert one(sentences, "Better than").startswith(
        "Better than trick none: trick queue at every batch size and lr (+"
    )
    some = without(runs, (runs["batch_size"] == "16") & (runs["trick"] == "queue"))
    assert "trick queue at batch size 64, lr 0.1 and batch size 64, lr 0.01 (" in one(
        said(comparison, some), "Better than"
    )


def test_a_place_with_one_result_has_no_leader() -> None:
    runs = done(grid(), growing)
    runs = without(runs, (runs["batch_size"] == "64") & (runs["objective"] != "moco"))
    few = without(runs, (runs["batch_size"] == "16") & ~runs["objective"].isin(["moco", "dcl"]))
    leaders = one(said(grid(), few), "In the lead")
    assert "64" not in leaders
    assert "dcl (no seed in common with softmax) at batch size 16" in leaders


@pytest.mark.parametrize(("sd", "named"), [(0.045, True), (0.035, False)])
def test_an_unsteady_setting_is_named(sd: float, named: bool) -> None:
    comparison = grid()
    runs = done(comparison, growing, noise=0)
    unsteady = (runs["objective"] == "gcl") & (runs["batch_size"] == "32")
    runs["recall@1"] += (runs["seed"] - 1) * np.where(unsteady, sd, 0.01)
    found = [
        sentence for sentence in said(comparison, runs) if sentence.startswith("Far less steady")
    ]
    assert bool(found) == named
    assert all("than the rest: gcl at batch size 32 (± 4.5); p" in sentence for sentence in found)


def test_the_lead_has_the_noise_of_its_place() -> None:
    runs = done(grid(), lambda objective, size: growing("softmax", size))
    alone = runs[runs["batch_size"] == "256"]
    runs.loc[runs["batch_size"] == "16", "recall@1"] += np.random.default_rng(1).normal(0, 0.02, 18)
    best = one(said(grid(), runs), "Best")
    assert best.count("at batch size 256") == 2
    assert best == one(said(grid({"objective": OBJECTIVES, "batch_size": ["256"]}), alone), "Best")


@pytest.mark.parametrize("seed", range(40))
def test_any_half_done_study_is_told(seed: int) -> None:
    """1 to 3 axes of 1 to 3 levels, 1 to 3 seeds, runs of any state, numbers lost: `said` finds no
    NaN in the words.
    """
    random = np.random.default_rng(seed)
    names = [list(GRID), ["batch_size", "trick", "objective"], ["trick"]][seed % 3]
    levels = {"objective": OBJECTIVES, "batch_size": SIZES, "trick": ["none", "queue", "mining"]}
    axes = {name: levels[name][: random.integers(1, 4)] for name in names}
    comparison = grid(axes, ("recall@1", "recall@10"), seeds=list(range(random.integers(1, 4))))
    runs = done(comparison, lambda *levels: random.random(), noise=0.01 * (seed % 4))
    runs["memory"], runs["seconds"] = random.random((2, len(runs))) * 1000
    states = random.choice(
        ["done", "failed", "missing", "running", "unfit"], len(runs), p=[0.6, 0.1, 0.1, 0.1, 0.1]
    )
    for state in ("failed", "missing", "running", "unfit"):
        runs = without(runs, states == state, state, "E: oom" if state == "failed" else "")
    for column in ("recall@1", "recall@10", "memory", "seconds"):
        runs.loc[random.random(len(runs)) < 0.1, column] = math.nan
    text = " ".join(said(comparison, runs, ["sd", "bootstrap"][seed % 2]))
    assert ("failed" in text) == (states == "failed").any()
