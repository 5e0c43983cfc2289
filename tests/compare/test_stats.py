"""Tests of the comparison's statistics against counts, scipy, least squares, closed testing and
simulated studies.

Seen to fail when: the front drops equal points, or keeps NaN or what is beaten at the same cost or
gain; an interval is of 90 %, or another each time; runs that are not done count, or blanks; sd has
ddof 0; memory forgets what does not fit, or missing counts rows only; the seed is left out of the
model, or the rank of the design taken for its width; t is the normal's, p one-sided, the error or
the sign of a contrast wrong; rounding counts as noise; confounded settings are compared; Holm is
Bonferroni or not monotone; blocks are mixed up.
"""

import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clipsmall.compare.stats import (
    COSTS,
    bootstrap_interval,
    contrasts_with_baseline,
    holm_adjusted,
    pareto_front,
    summarise_runs,
)

OBJECTIVES = ("softmax", "dcl", "moco", "gcl")
SIZES = ("16", "128", "32")
AXES = {"objective": OBJECTIVES, "batch_size": SIZES}
few = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf]),
        st.sampled_from([0.0, 0.5, 1.0, math.nan]),
    )
)


def study(axes: dict[str, Any], results: Any, seeds: int = 3) -> pd.DataFrame:
    """Runs that are done; results(levels, seed) -> recall@1."""
    rows = [
        {
            **dict(zip(axes, levels, strict=True)),
            "seed": seed,
            "state": "done",
            "recall@1": results(levels, seed),
        }
        for levels in product(*axes.values())
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows).assign(**dict.fromkeys(COSTS, 1.0), memory=0.5, error="")


def noisy(seed: int, seeds: int = 3, axes: dict[str, Any] = AXES) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    common = random.normal(0, 0.02, seeds)
    return study(axes, lambda levels, seed: 0.3 + common[seed] + random.normal(0, 0.01), seeds)


def against(runs: pd.DataFrame, axes: dict[str, Any] = AXES, **levels: str) -> pd.DataFrame:
    return contrasts_with_baseline(runs, axes, "recall@1", levels or {"objective": "softmax"})


# ---- fronts


@given(few)
def test_the_front_is_what_nobody_beats(points: list[tuple[float, float]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    expected = [
        not any(map(math.isnan, point)) and not any(beats(other, point) for other in points)
        for point in points
    ]
    costs = [cost for cost, _ in points]
    gains = [gain for _, gain in points]
    assert pareto_front(costs, gains).tolist() == expected


def test_equal_points_stay_together() -> None:
    assert pareto_front([1, 1, 1, 2], [5, 5, 4, 5]).tolist() == [True, True, False, False]


# ---- means


def test_a_row_a_setting_in_the_grid_s_order() -> None:
    table = summarise_runs(noisy(0), AXES, ["recall@1"])
    assert list(zip(table["objective"], table["batch_size"], strict=True)) == list(
        product(OBJECTIVES, SIZES)
    )
    assert (table["n"] == 3).all()
    assert not table[["failed", "unfit", "missing"]].any(axis=None)


def test_mean_and_spread_are_over_the_seeds_that_are_done() -> None:
    runs = study(
        {"objective": ("a", "b", "c")},
        lambda levels, seed: {"a": 0.1, "b": 0.4, "c": 0.9}[levels[0]] + seed / 10,
    )
    runs["seconds"], runs["memory"] = [10.0, 20, 60] * 3, [1.0, 1, 1] * 2 + [9.0] * 3
    # a number that must not count
    runs.loc[2, ["state", "recall@1"]] = "failed", 0.99
    runs.loc[[3, 4], ["state", "recall@1"]] = "running", math.nan
    runs.loc[6:, ["state", "recall@1"]] = "unfit", math.nan
    table = summarise_runs(runs, {"objective": ("a", "b", "c")}, ["recall@1"])
    assert table[["n", "failed", "unfit", "missing"]].to_numpy().tolist() == [
        [2, 1, 0, 0],
        [1, 0, 0, 2],
        [0, 0, 3, 0],
    ]
    np.testing.assert_allclose(table["recall@1"], [0.15, 0.6, math.nan])
    np.testing.assert_allclose(
        table["recall@1 sd"], [np.std([0.1, 0.2], ddof=1), math.nan, math.nan]
    )
    np.testing.assert_allclose(table["seconds"], [15, 60, math.nan])
    # of what does not fit, too
    np.testing.assert_allclose(table["memory"], [1, 1, 9])


def test_a_setting_without_rows_is_missing() -> None:
    runs = noisy(0)
    table = summarise_runs(runs[runs["objective"] != "dcl"], AXES, ["recall@1"], "bootstrap")
    assert table[table["objective"] == "dcl"]["missing"].tolist() == [3, 3, 3]
    assert summarise_runs(runs.iloc[:0], AXES, ["recall@1"])["n"].sum() == 0


def test_the_table_is_flat_and_survives_parquet(tmp_path: Any) -> None:
    table = summarise_runs(noisy(0), AXES, ["recall@1"], "bootstrap")
    table.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)
    assert {"recall@1", "recall@1 sd", "recall@1 low", "recall@1 high", "memory", *COSTS} < set(
        table
    )


def test_the_bootstrap_is_scipy_s() -> None:
    values = np.random.default_rng(3).exponential(1.0, 40)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(values), theirs, atol=0.02)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_the_bootstrap_of_three_is_their_range() -> None:
    assert bootstrap_interval([0.2, 0.5, 0.3]) == pytest.approx((0.2, 0.5))
    assert all(map(math.isnan, bootstrap_interval([0.2])))
    runs = study(
        {"objective": ("a", "b")}, lambda levels, seed: 0.1 * seed + 0.1 * (levels[0] == "b")
    )
    table = summarise_runs(runs, {"objective": ("a", "b")}, ["recall@1"], "bootstrap")
    np.testing.assert_allclose(
        table[["recall@1 low", "recall@1 high"]], [[0, 0.2], [0.1, 0.3]], atol=1e-12
    )


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="interval=se: take sd or bootstrap"):
        summarise_runs(noisy(0), AXES, ["recall@1"], "se")


# ---- differences


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_two_settings_are_the_paired_t_test(seeds: int) -> None:
    axes = {"objective": ("softmax", "dcl")}
    runs = noisy(5, seeds, axes)
    ours = against(runs, axes).iloc[0]
    dcl, softmax = (
        runs[runs["objective"] == name]["recall@1"].to_numpy() for name in ("dcl", "softmax")
    )
    theirs = stats.ttest_rel(dcl, softmax)
    low, high = theirs.confidence_interval(0.95)
    found = ours[["t", "p", "p Holm", "df", "low", "high", "difference"]].astype(float)
    expected = [
        theirs.statistic,
        theirs.pvalue,
        theirs.pvalue,
        seeds - 1,
        low,
        high,
        (dcl - softmax).mean(),
    ]
    np.testing.assert_allclose(found, expected)


def least_squares(block: pd.DataFrame, rival: str, base: str) -> tuple[float, float, int]:
    """difference, t, df by lstsq: the rival's effect when the baseline's is the intercept, one seed
    left out.
    """
    names = [base, *sorted(set(block["objective"]) - {base})]
    seeds = sorted(set(block["seed"]))
    columns = [np.ones(len(block))]
    columns += [(block["objective"] == name).to_numpy(float) for name in names[1:]]
    columns += [(block["seed"] == seed).to_numpy(float) for seed in seeds[1:]]
    x = np.stack(columns, axis=1)
    y = block["recall@1"].to_numpy()
    beta, (rest,), rank, _ = np.linalg.lstsq(x, y)
    at = names.index(rival)
    df = len(y) - rank
    error = math.sqrt(rest / df * np.linalg.inv(x.T @ x)[at, at])
    return beta[at], beta[at] / error, int(df)


@pytest.mark.parametrize("lost", [(), (4,), (0, 13, 28), (1, 2, 12, 35)])
def test_more_settings_are_the_least_squares_fit(lost: tuple[int, ...]) -> None:
    runs = noisy(6).drop(index=list(lost))
    found = against(runs)
    assert len(found) == 9
    for row in found.to_dict("records"):
        block = runs[runs["batch_size"] == row["batch_size"]]
        difference, t, df = least_squares(block, row["objective"], "softmax")
        assert (row["difference"], row["t"], row["df"]) == pytest.approx((difference, t, df))
        assert row["p"] == pytest.approx(2 * stats.t.sf(abs(t), df))
        assert (row["high"] - row["low"]) / 2 == pytest.approx(
            stats.t.ppf(0.975, df) * abs(difference / t)
        )
        assert (row["high"] + row["low"]) / 2 == pytest.approx(difference)


def test_a_balanced_block_is_the_textbook_s() -> None:
    runs = noisy(7)
    y = (
        runs[runs["batch_size"] == "32"]
        .pivot(index="objective", columns="seed", values="recall@1")
        .loc[list(OBJECTIVES)]
    )
    values = y.to_numpy()
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    # (4 - 1)(3 - 1)
    square = (rest**2).sum() / 6
    row = against(runs).query("objective == 'gcl' and batch_size == '32'").iloc[0]
    assert row["t"] == pytest.approx(
        (values[3].mean() - values[0].mean()) / math.sqrt(2 * square / 3)
    )
    assert row[["df", "seeds"]].tolist() == [6, 3]


def test_the_baseline_may_lie_on_any_axes() -> None:
    runs = noisy(8)
    found = against(runs, batch_size="128")
    assert set(found["batch_size"]) == {"16", "32"}
    assert len(found) == 8
    everything = against(runs, objective="dcl", batch_size="128")
    assert len(everything) == 11
    assert (everything["df"] == 22).all()


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=6))
@settings(deadline=None)
def test_holm_is_closed_testing_with_bonferroni(p: list[float]) -> None:
    known = [at for at, value in enumerate(p) if not math.isnan(value)]
    families = [family for size in range(1, len(known) + 1) for family in combinations(known, size)]
    for at, ours in enumerate(holm_adjusted(p)):
        tests = [
            min(1.0, len(family) * min(p[i] for i in family)) for family in families if at in family
        ]
        assert math.isnan(ours) if math.isnan(p[at]) else ours == pytest.approx(max(tests))


def test_p_is_corrected_within_a_block() -> None:
    found = against(noisy(9))
    for _, block in found.groupby("batch_size"):
        np.testing.assert_allclose(block["p Holm"], holm_adjusted(block["p"]))
    assert not np.allclose(found["p Holm"], holm_adjusted(found["p"]))


def test_one_seed_has_a_difference_and_no_p() -> None:
    found = against(noisy(10, seeds=1))
    assert found[["low", "high", "t", "p", "p Holm"]].isna().all(axis=None)
    assert found["difference"].notna().all()
    assert (found["df"] == 0).all()


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_numbers_without_noise_make_no_p(gap: float) -> None:
    runs = study(AXES, lambda levels, seed: 0.3 + gap * (levels[0] == "dcl") + 0.01 * seed)
    with np.errstate(all="raise"):
        found = against(runs)
    assert found[["t", "p", "p Holm"]].isna().all(axis=None)
    np.testing.assert_allclose(found["difference"], gap * (found["objective"] == "dcl"), atol=1e-12)


def test_no_common_seed_no_difference() -> None:
    axes = {"objective": ("softmax", "dcl")}
    # softmax: seed 0; dcl: seeds 1 and 2
    runs = noisy(11, axes=axes).drop(index=[1, 2, 3])
    assert against(runs, axes).iloc[0][["difference", "low", "t", "p"]].isna().all()
    assert against(runs, axes).iloc[0]["seeds"] == 0


def test_a_baseline_without_runs_leaves_no_numbers() -> None:
    runs = noisy(12)
    runs.loc[runs["objective"] == "softmax", "state"] = "failed"
    found = against(runs)
    assert found[["difference", "p"]].isna().all(axis=None)
    assert len(found) == 9
    assert against(runs.iloc[:0])["difference"].isna().all()


def test_failed_runs_and_blanks_do_not_count() -> None:
    runs = noisy(13)
    lost = runs.drop(index=[4, 20])
    runs.loc[4, ["state", "recall@1"]] = "failed", 0.9
    runs.loc[20, "recall@1"] = math.nan
    pd.testing.assert_frame_equal(against(runs), against(lost))


def test_chance_alone_is_found_in_one_of_twenty() -> None:
    axes = {
        "objective": ("softmax", "sigmoid", "sinkhorn", "dcl", "gcl", "moco"),
        "grid": [str(i) for i in range(400)],
    }
    found = against(noisy(14, axes=axes), axes)
    assert len(found) == 2000
    assert 0.035 < (found["p"] < 0.05).mean() < 0.065
    families = found.groupby("grid")["p Holm"].min()
    # at most 5 % in any grid; 0.011 is its standard error
    assert 0.02 < (families < 0.05).mean() < 0.075
    inside = (found["low"] < 0) & (found["high"] > 0)
    assert (inside == (found["p"] > 0.05)).all()


def test_the_best_of_equals_seldom_leads() -> None:
    """The plain p of the best against the runner-up is honest although both are picked (Gutmann &
    Maymin 1987).
    """
    wrong = {2: 0, 4: 0}
    for k, seed in product(wrong, range(200)):
        axes = {"objective": OBJECTIVES[:k]}
        runs = noisy(seed, axes=axes)
        first, second, *_ = (
            runs.groupby("objective")["recall@1"].mean().sort_values(ascending=False).index
        )
        wrong[k] += int(
            against(runs, axes, objective=second).set_index("objective").loc[first, "p"] < 0.05
        )
    # 10 expected
    assert 2 <= wrong[2] <= 19
    assert wrong[4] <= 10


def test_a_real_difference_is_found() -> None:
    random = np.random.default_rng(15)
    runs = study(
        AXES, lambda levels, seed: 0.3 - 0.05 * (levels[0] == "moco") + random.normal(0, 0.005)
    )
    found = against(runs)
    assert (found[found["objective"] == "moco"]["p Holm"] < 0.001).all()
    assert (found[found["objective"] != "moco"]["p Holm"] > 0.01).all()
