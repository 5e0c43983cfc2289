"""The statistics of a comparison: spread over seeds, differences from a baseline, Pareto fronts."""

from collections.abc import Collection, Mapping
from itertools import product
from math import nan
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

# axis -> its levels, in order
Axes = Mapping[str, Collection[str]]
# a setting: one level per axis
Levels = tuple[str, ...]
COSTS = ("seconds", "pairs_per_second", "logit_scale", "logit_bias", "lr", "pairs", "steps")
TESTED = ("difference", "low", "high", "t", "df", "p", "p Holm", "seeds")


def pareto_front(cost: ArrayLike, gain: ArrayLike) -> NDArray[np.bool_]:
    """(n,) costs, (n,) gains -> (n,) bool: the points on the Pareto front.

    A point is dominated if another costs no more and gains no less, and is strictly better in one
    of the two. Equal points do not dominate each other; a point with a NaN is never on the front.
    """
    costs = np.asarray(cost, dtype=float)
    gains = np.asarray(gain, dtype=float)
    # (n, 1) the point in question, against (n,) all others
    own_cost = costs[:, None]
    own_gain = gains[:, None]
    no_worse = (costs <= own_cost) & (gains >= own_gain)
    strictly_better = (costs < own_cost) | (gains > own_gain)
    beaten = (no_worse & strictly_better).any(axis=1)

    # comparisons with NaN are false, so such points look undominated
    known = ~np.isnan(costs) & ~np.isnan(gains)
    return np.asarray(~beaten & known, dtype=bool)


def bootstrap_interval(values: ArrayLike, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of (n,) values, with a fixed seed.

    It is too narrow for few values: with three it is their range, which contains the true mean in
    only about 3 cases of 4. NaN for a single value.

    Source: Efron 1979; Efron & Tibshirani 1993, chapter 13.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return nan, nan

    # a fixed seed: the same results give the same page
    generator = np.random.default_rng(0)
    means = generator.choice(found, (draws, len(found))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def summarise_runs(
    runs: pd.DataFrame, axes: Axes, metrics: Collection[str], interval: str = "sd"
) -> pd.DataFrame:
    """One row per setting in the grid's order, finished or not; flat columns for CSV and Parquet.

    Columns:
        the axes: the setting's levels.
        n, failed, unfit, missing: numbers of seeds that are done, failed, too large for the memory
            budget, and not run yet.
        M and "M sd" for each metric M: mean over the done runs that have it, and standard
            deviation (ddof 1; NaN for one seed).
        "M low", "M high": with interval=bootstrap, see `bootstrap_interval`.
        the columns of COSTS: means over the done runs.
        memory: mean over all runs, so that settings that do not fit show what they need.

    Raises:
        ValueError: an interval that is neither sd nor bootstrap.
    """
    if interval not in ("sd", "bootstrap"):
        raise ValueError(f"interval={interval}: take sd or bootstrap")

    runs_of: dict[Any, pd.DataFrame] = dict(list(runs.groupby(list(axes))))
    none = runs.iloc[:0]
    seeds = runs["seed"].nunique()

    rows = []
    for levels in product(*axes.values()):
        every = runs_of.get(levels, none)
        done = every[every["state"] == "done"]
        failed = int((every["state"] == "failed").sum())
        unfit = int((every["state"] == "unfit").sum())
        row: dict[str, Any] = dict(zip(axes, levels, strict=True))
        row["n"] = len(done)
        row["failed"] = failed
        row["unfit"] = unfit
        row["missing"] = seeds - len(done) - failed - unfit
        for metric in metrics:
            values = done[metric].astype(float).dropna()
            row[metric] = values.mean()
            row[f"{metric} sd"] = values.std()
            if interval == "bootstrap":
                row[f"{metric} low"], row[f"{metric} high"] = bootstrap_interval(values)

        for cost in COSTS:
            row[cost] = done[cost].astype(float).mean()

        row["memory"] = every["memory"].astype(float).mean()
        rows.append(row)

    return pd.DataFrame(rows)


def contrasts_with_baseline(
    runs: pd.DataFrame, axes: Axes, metric: str, baseline: Mapping[str, str]
) -> pd.DataFrame:
    """One row per setting that differs from the baseline on the baseline's axes.

    It is compared with the setting that has the baseline's levels on these axes and the same levels
    on all others (one objective at batch size 32 with another at 32).

    Settings with the same levels on the other axes form one randomised complete block design
    (Montgomery, Design and Analysis of Experiments, ch. 4). The seed is the block: it sets the
    order of the pairs and the initial weights. The additive model y = setting + seed + noise is
    fitted by least squares to the finished runs, so missing runs need no special case. If none is
    missing, the estimate is the difference of means, with standard error √(2 MS / n) and
    df = (k − 1)(n − 1). For two settings this is the paired t-test.

    The noise MS is pooled over the settings, as if all had the same variance. This is a compromise,
    as fractions near 0 or 1 vary less and unstable objectives more: p is too large for two quiet
    settings and too small for noisy ones (six settings, three seeds, equal means: a rival three
    times as noisy as the rest has p < 0.05 in 19 % of the studies). A separate variance per pair of
    settings would leave df = 2, so that t must exceed 4.3 instead of 2.2 with df = 10: a difference
    of three sd is then found in 51 % of the studies, and with pooling in 91 %.

    Columns:
        the axes: the setting's levels.
        difference: positive is better than the baseline. NaN if no chain of common seeds links
            the two.
        low, high: 95 % interval of this one difference. NaN, like p, without residual degrees of
            freedom (one seed) or without noise.
        t, df, p: the two-sided t-test.
        p Holm: p, corrected over all rivals of one baseline, see `holm_adjusted`.
        seeds: number of seeds that the two have in common.
    """
    assert baseline.keys() <= axes.keys(), (baseline, list(axes))
    done = runs[(runs["state"] == "done") & runs[metric].notna()]
    # levels -> seed -> result
    results: dict[Any, dict[int, float]] = {
        levels: dict(zip(group["seed"], group[metric].astype(float), strict=True))
        for levels, group in done.groupby(list(axes))
    }

    blocks: dict[Levels, list[Levels]] = {}
    for levels in product(*axes.values()):
        block = blocks.setdefault(levels_elsewhere(levels, axes, baseline), [])
        block.append(levels)

    rows: list[dict[str, Any]] = []
    for settings in blocks.values():
        base = next(levels for levels in settings if _has_levels(levels, axes, baseline))
        rivals = [levels for levels in settings if levels != base]
        # a setting without results has a row, but no test
        found = [results.get(levels, {}) for levels in (base, *rivals)]
        tests = _tests_against_first(found)
        for levels, test in zip(rivals, tests, strict=True):
            rows.append(dict(zip(axes, levels, strict=True)) | test)

    return pd.DataFrame(rows, columns=[*axes, *TESTED])


def _has_levels(levels: Levels, axes: Axes, wanted: Mapping[str, str]) -> bool:
    """Whether a setting has the wanted level on every axis that `wanted` names."""
    own = dict(zip(axes, levels, strict=True))
    return all(own[axis] == level for axis, level in wanted.items())


def levels_elsewhere(levels: Levels, axes: Axes, baseline: Collection[str]) -> Levels:
    """The levels on the axes that the baseline does not name, which a block has in common."""
    return tuple(level for axis, level in zip(axes, levels, strict=True) if axis not in baseline)


def holm_adjusted(p: ArrayLike) -> NDArray[np.float64]:
    """(m,) p-values, adjusted for m tests (Holm 1979).

    The i-th smallest is multiplied by m − i + 1, and raised to the one before it if smaller. NaN
    stays NaN and does not count as a test.
    """
    adjusted = np.array(p, dtype=float)
    tests = np.count_nonzero(~np.isnan(adjusted))
    # NaN sorts last
    order = np.argsort(adjusted)[:tests]

    # m, m - 1 ... 1
    factors = np.arange(len(order), 0, -1)
    no_smaller = np.maximum.accumulate(adjusted[order] * factors)
    adjusted[order] = np.minimum(1, no_smaller)
    return adjusted


def _tests_against_first(settings: list[dict[int, float]]) -> list[dict[str, float]]:
    """The rows of `contrasts_with_baseline` for settings 1, 2 … against setting 0.

    Args:
        settings: seed -> result of each.
    """
    y = np.array([value for results in settings for value in results.values()])
    setting = np.repeat(np.arange(len(settings)), [len(results) for results in settings])
    seed = np.array([seed for results in settings for seed in results])
    # the design: one column of ones and zeros per setting, then one per seed
    setting_columns = setting[:, None] == np.arange(len(settings))
    seed_columns = seed[:, None] == np.unique(seed)
    x = np.hstack([setting_columns, seed_columns]).astype(float)
    gram = x.T @ x
    # setting columns and seed columns have the same sum, so the matrix is singular
    inverse = np.linalg.pinv(gram, hermitian=True)
    effects = inverse @ x.T @ y

    # residual degrees of freedom, and the standard deviation of one run
    free = len(y) - np.linalg.matrix_rank(gram, hermitian=True)
    noise = np.sqrt(((y - x @ effects) ** 2).sum() / free) if free else nan
    # differences at rounding level: treated as identical results, which have no t
    if free and noise <= 1e-9 * np.abs(y).max():
        noise = nan

    tests = []
    for rival in range(1, len(settings)):
        contrast = np.zeros(len(gram))
        contrast[rival] = 1
        contrast[0] = -1
        # a contrast is estimable unless seeds and settings are confounded
        known = np.allclose(contrast @ inverse @ gram, contrast, atol=1e-6)
        difference = contrast @ effects if known else nan

        error = noise * np.sqrt(contrast @ inverse @ contrast)
        reach = student_t.ppf(0.975, free) * error if free else nan
        t = difference / error
        p = 2 * student_t.sf(abs(t), free) if free else nan

        common = len(settings[rival].keys() & settings[0].keys())
        # Holm's p needs all tests and is filled in below
        values = (difference, difference - reach, difference + reach, t, free, p, nan, common)
        tests.append(dict(zip(TESTED, values, strict=True)))

    adjusted = holm_adjusted([test["p"] for test in tests])
    for test, p_holm in zip(tests, adjusted, strict=True):
        test["p Holm"] = p_holm

    return tests
