"""The verdict of a comparison in sentences: what is best, by how much, at what cost, how surely."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan, nan
from statistics import median

import pandas as pd

from clipsmall.compare.grid import Comparison
from clipsmall.compare.stats import (
    Levels,
    contrasts_with_baseline,
    levels_elsewhere,
    pareto_front,
)
from clipsmall.compare.wording import (
    SIGNIFICANCE_LEVEL,
    Row,
    axis_words,
    difference_words,
    frame_rows,
    join_words,
    level_number,
    noise_words,
    p_value_words,
    percent,
)

# Outcome of a rival's test against the baseline -> start of the sentence.
OUTCOME_HEADS = {
    "better": "Better than {}",
    "worse": "Worse than {}",
    "open": "Not significantly different from {}",
    "ahead": "Ahead of {}, untested",
    "behind": "Behind {}, untested",
}
# Outcome of a leader's test -> remark in brackets.
LEADER_NOTES = {
    "better": "better than {}",
    "worse": "worse than {} seed for seed",
    "open": "not significantly different from {}",
    "": "no seed in common with {}",
}
# Smaller differences are rounding errors.
EQUAL = 1e-9
# (rival, its further levels) -> batch size -> setting
SettingsBySize = dict[tuple[str, Levels], dict[float, Levels]]


@dataclass(frozen=True)
class Study:
    """A comparison's tables by setting, and how its settings are named in a sentence.

    Settings are compared only within a place: the levels on the axes that the baseline does not
    name. If the baseline names an objective, a place is a batch size, and all objectives at this
    batch size are compared.
    """

    comparison: Comparison
    # the frame `runs` of `run_tables.tables_of_runs`
    runs: pd.DataFrame
    # the rows of `summarise_runs`
    table: dict[Levels, Row]
    # the rows of `contrasts_with_baseline`: first metric, against the baseline
    tests: list[Row]

    def ranked(self, metric: str) -> list[Levels]:
        """The settings that have a value of this metric, best first."""
        known = [levels for levels, row in self.table.items() if not isnan(row[metric])]
        return sorted(known, key=lambda levels: -self.table[levels][metric])

    def levels(self, row: Row) -> Levels:
        """The setting (its levels) of a row of any table."""
        return tuple(row[axis] for axis in self.comparison.axes)

    def place(self, levels: Levels) -> Levels:
        """The levels on the axes that the baseline does not name."""
        return levels_elsewhere(levels, self.comparison.axes, self.comparison.baseline_levels)

    def duel(self, metric: str, one: Levels, other: Levels) -> Row:
        """`one` minus `other` as a row of `contrasts_with_baseline`.

        The noise is estimated from all settings at the places of the two. For the best and the
        runner-up the uncorrected p is valid although they were selected, as the runner-up is the
        closest to the best (Gutmann & Maymin 1987, Is the selected population the best?, Annals of
        Statistics).
        """
        axes = self.comparison.axes
        around = {self.place(one), self.place(other)}
        settings = self.runs[list(axes)].itertuples(index=False, name=None)
        near = [self.place(levels) in around for levels in settings]

        # a baseline with a level on every axis, so that all settings are its rivals
        baseline = dict(zip(axes, other, strict=True))

        contrasts = contrasts_with_baseline(self.runs[near], axes, metric, baseline)
        for row in frame_rows(contrasts):
            if self.levels(row) == one:
                return row

        raise AssertionError(f"{one} is not among the rivals of {other}")

    def name(self, levels: Levels | Mapping[str, str]) -> str:
        """("chunked", "32") -> "chunked at batch size 32"."""
        if not isinstance(levels, Mapping):
            levels = dict(zip(self.comparison.axes, levels, strict=True))

        first_axis = next(iter(self.comparison.axes))
        words = []
        for axis, level in levels.items():
            # the first axis needs no name in front of a word, but does in front of a number
            speaks_for_itself = axis == first_axis and isnan(level_number(level))
            words.append(level if speaks_for_itself else f"{axis_words(axis)} {level}")

        head, *rest = words
        return f"{head} at {', '.join(rest)}" if rest else head

    def rival(self, levels: Levels) -> str:
        """The name of a setting without its place: its levels on the baseline's axes."""
        baseline = self.comparison.baseline_levels
        compared = {}
        for axis, level in zip(self.comparison.axes, levels, strict=True):
            if axis in baseline:
                compared[axis] = level

        return self.name(compared)

    @property
    def baseline(self) -> str:
        """The baseline's name."""
        return self.name(self.comparison.baseline_levels)

    def at(self, places: Iterable[Levels]) -> str:
        """Places in words.

        [("16",), ("32",)] -> " at batch sizes 16 and 32"; all of the grid's -> " at every batch
        size".
        """
        chosen = list(dict.fromkeys(places))
        every = {self.place(levels) for levels in self.table}
        baseline = self.comparison.baseline_levels
        axes = [axis_words(axis) for axis in self.comparison.axes if axis not in baseline]
        if not axes:
            return ""
        if len(chosen) == len(every) > 1:
            return f" at every {' and '.join(axes)}"

        if len(axes) == 1:
            levels = [place[0] for place in chosen]
            plural = "s" if len(levels) > 1 and not isnan(level_number(levels[0])) else ""
            return f" at {axes[0]}{plural} {join_words(levels)}"

        if len(chosen) > 3:
            return f" in {len(chosen)} of {len(every)} combinations of {join_words(axes)}"

        each = []
        for place in chosen:
            words = [f"{axis} {level}" for axis, level in zip(axes, place, strict=True)]
            each.append(", ".join(words))

        return f" at {join_words(each)}"

    def grouped(self, chosen: Iterable[Levels]) -> str:
        """Settings by rival: "chunked at batch sizes 16 and 32; mined at batch size 64"."""
        places_of: dict[str, list[Levels]] = {}
        for levels in chosen:
            places = places_of.setdefault(self.rival(levels), [])
            places.append(self.place(levels))
        return "; ".join(rival + self.at(places) for rival, places in places_of.items())

    def value(self, levels: Levels, metric: str) -> str:
        """A setting's mean and spread: "43.1 ± 0.5 %".

        With bootstrap intervals "43.1 % (42.6 to 43.5)"; seeds that are missing are mentioned.
        """
        row = self.table[levels]
        if isnan(row[metric]):
            return "no result"

        mean = percent(row[metric])
        sd = row[f"{metric} sd"]

        low = row.get(f"{metric} low", nan)
        if not isnan(low):
            text = f"{mean} % ({percent(low)} to {percent(row[f'{metric} high'])})"
        elif isnan(sd):
            text = f"{mean} %"
        else:
            text = f"{mean} ± {percent(sd)} %"

        seeds = len(self.comparison.seeds)
        return text if row["n"] == seeds else f"{text} ({row['n']} of {seeds} seeds)"


def verdict_sentences(
    comparison: Comparison, runs: pd.DataFrame, summary: pd.DataFrame, contrasts: pd.DataFrame
) -> list[str]:
    """The verdict in sentences, most important first.

    Metrics are in percent, differences in percentage points.

    Args:
        runs: one row for each of the comparison's runs, of `run_tables.tables_of_runs`.
        summary: of `summarise_runs`.
        contrasts: of `contrasts_with_baseline`, of the first metric against the baseline.
    """
    table = {tuple(row[axis] for axis in comparison.axes): row for row in frame_rows(summary)}
    study = Study(comparison, runs, table, frame_rows(contrasts))
    if not study.ranked(comparison.metric):
        return ["No run is done yet: there is nothing to conclude.", *_unfinished(study)]

    return [
        *_best_and_runner_up(study),
        *_unfinished(study),
        *_leaders(study),
        *_rivals_of_the_baseline(study),
        *_batch_sizes(study),
        *_pareto_fronts(study),
        *_other_metrics(study),
        *_unsteady(study),
        *_what_it_rests_on(study),
    ]


def _best_and_runner_up(study: Study) -> list[str]:
    metric = study.comparison.metric
    first, *others = study.ranked(metric)
    best = f"{study.name(first)}, {study.value(first, metric)} {metric}"
    if not others:
        return [f"Only one setting is done: {best}."]

    second = others[0]
    test = study.duel(metric, first, second)
    versus = difference_words(test)

    if test["difference"] < 0:
        # with missing seeds, means and paired differences may disagree
        versus = f"by the means; seed for seed it is behind: {versus}"

    runner_up = f"{study.name(second)}, {study.value(second, metric)}"
    return [f"Best: {best}. Runner-up: {runner_up}; {versus}."]


def _unfinished(study: Study) -> list[str]:
    """Runs without a result, by reason; and done runs without a value of the metric."""
    reasons = {"failed": "failed", "missing": "not done yet", "unfit": "too large for the memory"}
    items = []
    for state, words in reasons.items():
        settings = [levels for levels, row in study.table.items() if row[state]]
        if settings:
            count = sum(study.table[levels][state] for levels in settings)
            items.append(f"{count} {words} ({study.grouped(settings)})")

    done = study.runs[study.runs["state"] == "done"]
    metric = study.comparison.metric

    blank = done[done[metric].isna()]
    if len(blank):
        settings = sorted({study.levels(row) for row in frame_rows(blank)})
        items.append(f"{len(blank)} done without {metric} ({study.grouped(settings)})")

    if not items:
        return []

    total = len(study.table) * len(study.comparison.seeds)
    reasons_why = join_words(items)
    sentences = [
        f"{len(done)} of {total} runs are done: {reasons_why}. The verdict is of what is done."
    ]

    failed = study.runs[study.runs["state"] == "failed"]
    if len(failed):
        run = frame_rows(failed)[0]
        # the last line of a traceback is the message
        error = (str(run["error"]).strip() or "no message").splitlines()[-1]
        name = f"{study.name(study.levels(run))}, seed {run['seed']}"
        sentences.append(f"The first failure, {name}: {error[:160]}")

    return sentences


def _outcome(test: Row) -> str:
    """The outcome of a rival's test: a key of OUTCOME_HEADS, or "" without a common seed."""
    difference = test["difference"]
    p = test["p Holm"]
    if isnan(difference):
        return ""
    if isnan(p) and abs(difference) > EQUAL:
        return "ahead" if difference > 0 else "behind"
    if isnan(p) or p >= SIGNIFICANCE_LEVEL:
        return "open"

    return "better" if difference > 0 else "worse"


def _leaders(study: Study) -> list[str]:
    """The best setting at each place, such as each batch size."""
    outcomes = {study.levels(test): _outcome(test) for test in study.tests}
    baseline = study.baseline
    ranked = study.ranked(study.comparison.metric)

    places_of = dict[str, list[Levels]]()
    for place in dict.fromkeys(map(study.place, study.table)):
        here = [levels for levels in ranked if study.place(levels) == place]
        # a single setting has nothing to lead
        if len(here) < 2:
            continue

        best = here[0]
        leader = study.rival(best)
        if leader != baseline:
            note = LEADER_NOTES.get(outcomes.get(best, ""), "not tested against {}")
            leader = f"{leader} ({note.format(baseline)})"

        places_of.setdefault(leader, []).append(place)

    # with a single place the first sentence has said it already
    if sum(map(len, places_of.values())) < 2:
        return []

    leaders = "; ".join(leader + study.at(places) for leader, places in places_of.items())
    return [f"In the lead: {leaders}."]


def _rivals_of_the_baseline(study: Study) -> list[str]:
    """All rivals against the baseline, one sentence for each outcome."""
    # outcome -> rival -> its tests
    tests_of: dict[str, dict[str, list[Row]]] = {outcome: {} for outcome in OUTCOME_HEADS}
    unbeaten = dict[Levels, bool]()
    for test in study.tests:
        outcome = _outcome(test)
        levels = study.levels(test)
        if outcome:
            tests_of[outcome].setdefault(study.rival(levels), []).append(test)

        if outcome in ("better", "worse", "open"):
            place = study.place(levels)
            unbeaten[place] = unbeaten.get(place, True) and outcome != "better"

    sentences = []
    for outcome, rivals in tests_of.items():
        if not rivals:
            continue

        items = []
        for rival, tests in rivals.items():
            places = [study.place(study.levels(test)) for test in tests]
            items.append(rival + study.at(places) + _range_of_differences(tests))

        head = OUTCOME_HEADS[outcome].format(study.baseline)
        sentences.append(f"{head}: {'; '.join(items)}.")

    safe = [place for place, holds in unbeaten.items() if holds]
    if safe:
        sentences.append(f"Nothing is shown to beat {study.baseline}{study.at(safe)}.")

    return sentences


def _range_of_differences(tests: list[Row]) -> str:
    """The range of differences and the largest p: " (+1.2 to +4.1 points, p ≤ 0.012)"."""
    values = sorted(test["difference"] for test in tests)
    ends = [percent(values[0], "+"), percent(values[-1], "+")]
    # one number if both ends read the same
    text = " to ".join(dict.fromkeys(ends))

    p = max(test["p Holm"] for test in tests)
    if p < SIGNIFICANCE_LEVEL:
        return f" ({text} points, {p_value_words(p, len(tests) > 1)})"

    return f" ({text} points)"


def _batch_sizes(study: Study) -> list[str]:
    """What the largest batch gains the baseline, and which rival replaces a larger batch."""
    axes = study.comparison.axes
    sized = [
        axis
        for axis, levels in axes.items()
        if all("batch_size" in tree.get("data", {}) for tree in levels.values())
    ]
    if not sized:
        return []

    axis = sized[0]
    position = list(axes).index(axis)
    size_of = {level: float(tree["data"]["batch_size"]) for level, tree in axes[axis].items()}

    lines: SettingsBySize = {}
    for levels in study.ranked(study.comparison.metric):
        # the place without its batch size
        further = study.place((*levels[:position], "", *levels[position + 1 :]))
        line = lines.setdefault((study.rival(levels), further), {})
        line[size_of[levels[position]]] = levels

    return [*_gain_of_the_largest_batch(study, lines), *_rival_for_a_larger_batch(study, lines)]


def _gain_of_the_largest_batch(study: Study, lines: SettingsBySize) -> list[str]:
    """The baseline with the largest batch against the smallest, at its best other levels."""
    metric = study.comparison.metric
    # the best first
    baselines = [line for (rival, _), line in lines.items() if rival == study.baseline]
    grown = [line for line in baselines if len(line) > 1]
    if not grown:
        return []

    line = grown[0]
    small = line[min(line)]
    large = line[max(line)]
    test = study.duel(metric, large, small)
    difference = test["difference"]
    if isnan(difference):
        return []

    significant = test["p"] < SIGNIFICANCE_LEVEL
    if test["p"] >= SIGNIFICANCE_LEVEL or abs(difference) <= EQUAL:
        words = "not significantly different from"
    elif difference > 0:
        words = "better than" if significant else "ahead of"
    else:
        words = "worse than" if significant else "behind"

    values = f"{study.value(large, metric)} and {study.value(small, metric)}"
    names = f"{study.name(large)} is {words} {study.name(small)}"
    return [f"{names}: {values}; {difference_words(test)}."]


def _rival_for_a_larger_batch(study: Study, lines: SettingsBySize) -> list[str]:
    """The smallest batch at which a rival reaches the baseline with a larger batch."""
    metric = study.comparison.metric
    # (size, -larger size, -mean, setting, the baseline's setting): the minimum is the smallest
    # batch; of these the one that replaces the largest batch; of these the best result
    found = list[tuple[float, float, float, Levels, Levels]]()
    for (_, further), line in lines.items():
        base = lines.get((study.baseline, further), {})
        base_means = {size: study.table[levels][metric] for size, levels in base.items()}
        for size, levels in line.items():
            # the baseline must have a result at this size, too
            if size not in base:
                continue

            mean = study.table[levels][metric]
            for larger, goal in base_means.items():
                below = [base_means[other] for other in base if other < larger]
                if size < larger and max(below) < goal <= mean:
                    found.append((size, -larger, -mean, levels, base[larger]))

    if not found:
        return []

    *_, levels, replaced = min(found)
    values = f"{study.value(levels, metric)} against {study.value(replaced, metric)}"
    difference = difference_words(study.duel(metric, levels, replaced))
    return [f"{study.name(levels)} reaches {study.name(replaced)}: {values}; {difference}."]


def _pareto_fronts(study: Study) -> list[str]:
    """The Pareto-optimal settings by memory, and by training time.

    Time is left out if it is the budget.
    """
    costs = {"memory": "memory"}
    if not study.comparison.budget.seconds:
        costs["seconds"] = "training time"

    sentences = []
    for cost, words in costs.items():
        sentences += _pareto_sentence(study, cost, words)

    return sentences


def _pareto_sentence(study: Study, cost: str, words: str) -> list[str]:
    metric = study.comparison.metric
    known = [levels for levels in study.ranked(metric) if not isnan(study.table[levels][cost])]
    if len(known) < 2:
        return []

    price = [study.table[levels][cost] for levels in known]
    gain = [study.table[levels][metric] for levels in known]
    # costs within 5 % are not worth a choice
    if max(price) < 1.05 * min(price):
        ends = [_amount(cost, value) for value in (min(price), max(price))]
        return [f"The {words} hardly differs: {' to '.join(dict.fromkeys(ends))}."]

    # `known` is sorted best first; on the front the best costs most, so reverse: cheapest first
    front = [at for at, on_front in enumerate(pareto_front(price, gain)) if on_front][::-1]
    settings = study.grouped(known[at] for at in front)

    ends = []
    for at in (front[0], front[-1]):
        ends.append(f"{percent(gain[at])} % for {_amount(cost, price[at])}")

    span = " to ".join(dict.fromkeys(ends))

    if cost == "seconds":
        span += _varying_times(study)

    return [f"By the means, nothing is better for its {words} than {settings}: {span}."]


def _varying_times(study: Study) -> str:
    """A remark if one setting's training times differ by more than 10 % between seeds."""
    done = study.runs[study.runs["state"] == "done"]
    times = done.groupby(list(study.comparison.axes))["seconds"]
    ratio = (times.max() / times.min()).max()
    if ratio > 1.1:
        return f" (but times of one setting differ up to {ratio:.1f}-fold between its seeds)"

    return ""


def _amount(cost: str, value: float) -> str:
    """0.31 GiB -> 317 MiB; 750 s -> 12 min."""
    if cost == "memory" and value >= 1:
        return f"{value:.1f} GiB"
    if cost == "memory":
        return f"{1024 * value:.0f} MiB"

    # seconds
    if value >= 600:
        return f"{value / 60:.0f} min"

    return f"{value:.0f} s"


def _other_metrics(study: Study) -> list[str]:
    """The metrics whose best setting differs from that of the first metric."""
    main, *metrics = study.comparison.metrics
    if not metrics:
        return []

    best = study.ranked(main)[0]
    items = []
    for metric in metrics:
        winner = next(iter(study.ranked(metric)), best)
        if winner == best or study.table[winner][metric] == study.table[best][metric]:
            continue

        values = f"{study.value(winner, metric)} against {study.value(best, metric)}"
        # Holm's p, as the winner was selected among all settings
        noise = noise_words(study.duel(metric, winner, best), "p Holm")
        items.append(f"{metric}: {study.name(winner)}, {values}, {noise}")

    if items:
        return [f"Best by another metric: {'; '.join(items)}."]

    return ["The other metrics have the same best setting."]


def _unsteady(study: Study) -> list[str]:
    """Settings whose sd over seeds is more than 4 times that of the settings they compete with.

    With equal variances this happens to 1 setting in 1000 (six settings, three seeds: F above 16
    with 2 and 10 degrees of freedom).
    """
    column = f"{study.comparison.metric} sd"
    items = []
    for levels, row in study.table.items():
        own = row[column]
        place = study.place(levels)
        known = []
        for other, other_row in study.table.items():
            if study.place(other) == place and not isnan(other_row[column]):
                known.append(other_row[column])

        # the sum of the other settings' variances
        squares = sum(sd**2 for sd in known) - own**2
        others = len(known) - 1
        if others > 1 and own**2 * others > 16 * squares:
            items.append(f"{study.name(levels)} (± {percent(own)})")

    if not items:
        return []

    consequence = "p is too small there, and too large for the rest"
    return [f"Far less steady than the rest: {join_words(items)}; {consequence}."]


def _what_it_rests_on(study: Study) -> list[str]:
    """The budget, the seeds, and how precisely a single difference is known."""
    budget = study.comparison.budget_words
    if max(row["n"] for row in study.table.values()) < 2:
        return [f"{budget}; one run each: no interval, no significance."]

    drawn = any(f"{study.comparison.metric} low" in row for row in study.table.values())
    spread = "in brackets the 95 % bootstrap interval" if drawn else "± their standard deviation"
    sentences = [f"{budget}, {len(study.comparison.seeds)} seeds, {spread}."]

    tested = [test for test in study.tests if not isnan(test["high"])]
    if tested:
        reach = median((test["high"] - test["low"]) / 2 for test in tested)
        each = study.at(map(study.place, study.table))
        sentences.append(
            f"Better and worse: p < {SIGNIFICANCE_LEVEL}, compared seed by seed and corrected for "
            f"many rivals (Holm){each}; "
            f"a single difference is known to about ± {percent(reach)} points."
        )

    return sentences
