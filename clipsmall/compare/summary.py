"""What the runs of a comparison say: spread over the seeds, differences from the baseline, Pareto
fronts.
"""

from collections.abc import Collection, Mapping
from itertools import product
from math import nan
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# axis -> its levels, in their order
Axes = Mapping[str, Collection[str]]
# a setting: a level of every axis
Levels = tuple[str, ...]
COSTS = ("seconds", "pairs_per_second", "logit_scale", "logit_bias", "lr", "pairs", "steps")
TESTED = ("difference", "low", "high", "t", "df", "p", "p Holm", "seeds")


def pareto(cost: ArrayLike, gain: ArrayLike) -> NDArray[np.bool_]:
    """(n,), (n,) -> (n,) points that nobody beats: no other costs at most as much and gains at
    least as much, one of the two strictly. Equal points stay together; a point with a NaN is never
    on the front."""
    costs = np.asarray(cost, dtype=float)
    gains = np.asarray(gain, dtype=float)
    c = costs[:, None]
    g = gains[:, None]
    better = (costs <= c) & (gains >= g) & ((costs < c) | (gains > g))
    return np.asarray(~better.any(axis=1) & ~np.isnan(costs) & ~np.isnan(gains), dtype=bool)


def bootstrap(values: ArrayLike, draws: int = 10_000) -> tuple[float, float]:
    """(n,) -> the 95 % percentile interval of their mean (Efron 1979; Efron & Tibshirani 1993, ch.
    13), seeded.

    It is narrow for few values: of three it is their range, which holds the true mean in about 3
    cases of 4 only.
    One value has none: NaN.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return nan, nan
    means = np.random.default_rng(0).choice(found, (draws, len(found))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def summarise(
    runs: pd.DataFrame, axes: Axes, metrics: Collection[str], interval: str = "sd"
) -> pd.DataFrame:
    """A row a setting, in the grid's order, done or not; flat columns for CSV and Parquet.

    axes' names           the levels
    n failed unfit missing    seeds done, failed, too large for the memory budget, and not there yet
    M, "M sd"             a metric's mean over the done runs that have it; standard deviation (ddof
    1; NaN of one seed) "M low", "M high"     with interval=bootstrap: see `bootstrap`
    COSTS                 means over the done runs
    memory                mean over all runs: what does not fit shows what it needs

    Raises:
        ValueError: an interval that is neither sd nor bootstrap.
    """
    if interval not in ("sd", "bootstrap"):
        raise ValueError(f"interval={interval}: take sd or bootstrap")
    found: dict[Any, pd.DataFrame] = dict(list(runs.groupby(list(axes))))
    seeds = runs["seed"].nunique()
    rows = []
    for levels in product(*axes.values()):
        every = found.get(levels, runs.iloc[:0])
        done = every[every["state"] == "done"]
        failed, unfit = (int((every["state"] == state).sum()) for state in ("failed", "unfit"))
        row: dict[str, Any] = dict(zip(axes, levels, strict=True))
        row |= {
            "n": len(done),
            "failed": failed,
            "unfit": unfit,
            "missing": seeds - len(done) - failed - unfit,
        }
        for metric in metrics:
            values = done[metric].astype(float).dropna()
            row |= {metric: values.mean(), f"{metric} sd": values.std()}
            if interval == "bootstrap":
                row[f"{metric} low"], row[f"{metric} high"] = bootstrap(values)
        row |= {cost: done[cost].astype(float).mean() for cost in COSTS}
        rows.append(row | {"memory": every["memory"].astype(float).mean()})
    return pd.DataFrame(rows)


def contrasts(
    runs: pd.DataFrame, axes: Axes, metric: str, baseline: Mapping[str, str]
) -> pd.DataFrame:
    """A row a setting with another level than the baseline's on the baseline's axes, compared with
    the setting that has the baseline's there and the same levels elsewhere (sigmoid at batch size
    32 with softmax at 32).

    All settings that are equal elsewhere are one randomised complete block design (Montgomery,
    Design and Analysis of Experiments, ch. 4): the seed is the block, as it sets the order of the
    pairs and the initial weights. The additive model y = setting + seed + noise is fitted by least
    squares to the runs that are done, so missing runs are no special case; when none is missing,
    the difference is that of the means, its standard error √(2 MS / n) and df = (k − 1)(n − 1). Of
    two settings this is the paired t-test.

    The noise MS is pooled over the settings, as though all had the same variance. Shares near 0 or
    1 vary less, and
    unstable objectives more, so it is a compromise: p is too large for a quiet pair, too small for
    a noisy one (six
    settings, three seeds, equal means: a rival three times as noisy as the rest has p < 0.05 in 19
    % of the studies). But a variance of its own leaves a pair df = 2, so that t must pass 4.3
    instead of 2.2 with df = 10: a difference of three sd is then found in 51 % of the studies,
    pooled in 91 %.

    Columns: the axes; difference (larger is better than the baseline), low and high (95 % interval
    of this difference alone), t, df, p (two-sided), "p Holm" (over the rivals of one baseline that
    have a p, see `holm`), seeds (in common). NaN: a difference without a path of common seeds;
    interval and p without residual freedom (one seed) or noise.
    """
    assert baseline.keys() <= axes.keys(), (baseline, list(axes))
    done = runs[(runs["state"] == "done") & runs[metric].notna()]
    found: dict[Any, dict[int, float]] = {
        levels: dict(zip(group["seed"], group[metric].astype(float), strict=True))
        for levels, group in done.groupby(list(axes))
    }
    blocks: dict[Levels, list[Levels]] = {}
    for levels in product(*axes.values()):
        blocks.setdefault(elsewhere(levels, axes, baseline), []).append(levels)
    rows: list[dict[str, Any]] = []
    for settings in blocks.values():
        base = next(
            s
            for s in settings
            if all(baseline.get(a, at) == at for a, at in zip(axes, s, strict=True))
        )
        rivals = [levels for levels in settings if levels != base]
        tested = _against_first([found.get(levels, {}) for levels in (base, *rivals)])
        rows += [
            dict(zip(axes, levels, strict=True)) | test
            for levels, test in zip(rivals, tested, strict=True)
        ]
    return pd.DataFrame(rows, columns=[*axes, *TESTED])


def elsewhere(levels: Levels, axes: Axes, baseline: Collection[str]) -> Levels:
    """The levels on the axes of which the baseline says nothing: the same for all settings of a
    block.
    """
    return tuple(level for axis, level in zip(axes, levels, strict=True) if axis not in baseline)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """(m,) -> p adjusted for m tests (Holm 1979): the i-th smallest times m − i + 1, no smaller
    than those before it. NaN stays, and is no test."""
    found = np.array(p, dtype=float)
    # NaN sorts last
    order = np.argsort(found)[: np.count_nonzero(~np.isnan(found))]
    found[order] = np.minimum(1, np.maximum.accumulate(found[order] * np.arange(len(order), 0, -1)))
    return found


def _against_first(settings: list[dict[int, float]]) -> list[dict[str, float]]:
    """The rows of `contrasts` for settings 1, 2 … against setting 0; each is seed -> result."""
    y = np.array([value for results in settings for value in results.values()])
    setting = np.repeat(np.arange(len(settings)), [len(results) for results in settings])
    seed = np.array([seed for results in settings for seed in results])
    x = np.hstack(
        [setting[:, None] == np.arange(len(settings)), seed[:, None] == np.unique(seed)]
    ).astype(float)
    gram = x.T @ x
    inverse = np.linalg.pinv(gram, hermitian=True)
    effects = inverse @ x.T @ y
    free = len(y) - np.linalg.matrix_rank(gram, hermitian=True)
    noise = np.sqrt(((y - x @ effects) ** 2).sum() / free) if free else nan
    # rounding: as good as identical numbers, of which no t can be made
    if free and noise <= 1e-9 * np.abs(y).max():
        noise = nan
    tests = []
    for rival in range(1, len(settings)):
        contrast = np.zeros(len(gram))
        contrast[[rival, 0]] = 1, -1
        # else seeds and settings are confounded
        known = np.allclose(contrast @ inverse @ gram, contrast, atol=1e-6)
        difference = contrast @ effects if known else nan
        error = noise * np.sqrt(contrast @ inverse @ contrast)
        reach = stats.t.ppf(0.975, free) * error if free else nan
        t = difference / error
        p = 2 * stats.t.sf(abs(t), free) if free else nan
        common = len(settings[rival].keys() & settings[0].keys())
        values = (difference, difference - reach, difference + reach, t, free, p, nan, common)
        tests.append(dict(zip(TESTED, values, strict=True)))
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p Holm"] = adjusted
    return tests
