"""What a larger batch, more memory and more time buy, in sentences."""

from math import isnan

from clipsmall.compare.study import TOLD, Study, gap, percent
from clipsmall.compare.summary import Levels, pareto

# (rival, its further levels) -> batch size -> setting
Lines = dict[tuple[str, Levels], dict[float, Levels]]


def trades(study: Study) -> list[str]:
    return [*_batches(study), *_fronts(study)]


def _batches(study: Study) -> list[str]:
    """What the largest batch gives the baseline, and the smallest at which a rival makes up for a
    larger one.
    """
    axes = study.comparison.axes
    metric = study.comparison.metric
    sized = [
        axis
        for axis, levels in axes.items()
        if all("batch_size" in tree.get("data", {}) for tree in levels.values())
    ]
    if not sized:
        return []
    at = list(axes).index(sized[0])
    size = {level: float(tree["data"]["batch_size"]) for level, tree in axes[sized[0]].items()}
    lines: Lines = {}
    for levels in study.ranked(metric):
        further = study.place((*levels[:at], "", *levels[at + 1 :]))
        lines.setdefault((study.rival(levels), further), {})[size[levels[at]]] = levels
    return [*_growth(study, lines), *_substitute(study, lines)]


def _growth(study: Study, lines: Lines) -> list[str]:
    """The baseline with the largest batch against the smallest; its other levels are those where it
    is best.
    """
    metric = study.comparison.metric
    # the best first
    for (who, _), line in lines.items():
        if who == study.baseline and len(line) > 1:
            small = line[min(line)]
            large = line[max(line)]
            test = study.duel(metric, large, small)
            if isnan(test["difference"]):
                return []
            told = ("better than", "worse than") if test["p"] < TOLD else ("ahead of", "behind")
            open_ = test["p"] >= TOLD or abs(test["difference"]) <= 1e-9
            words = "not told apart from" if open_ else told[test["difference"] <= 0]
            values = f"{study.value(large, metric)} and {study.value(small, metric)}"
            return [f"{study.name(large)} is {words} {study.name(small)}: {values}; {gap(test)}."]
    return []


def _substitute(study: Study, lines: Lines) -> list[str]:
    """The smallest batch with which a rival has what the baseline has with a larger one only."""
    metric = study.comparison.metric
    found = list[tuple[float, float, float, Levels, Levels]]()
    for (_, further), line in lines.items():
        base = lines.get((study.baseline, further), {})
        for size, levels in line.items():
            mean = study.table[levels][metric]
            for larger, goal in base.items():
                below = [study.table[base[other]][metric] for other in base if other < larger]
                if (
                    size in base
                    and size < larger
                    and max(below) < study.table[goal][metric] <= mean
                ):
                    found.append((size, -larger, -mean, levels, goal))
    if not found:
        return []
    *_, levels, goal = min(found)
    values = f"{study.value(levels, metric)} against {study.value(goal, metric)}"
    return [
        f"{study.name(levels)} reaches {study.name(goal)}: {values}; {gap(study.duel(metric, levels, goal))}."
    ]


def _fronts(study: Study) -> list[str]:
    """The settings that no other beats at their memory, and at their time unless all had the
    same.
    """
    metric = study.comparison.metric
    sentences = []
    costs = {"memory": "memory"} | (
        {} if study.comparison.budget.seconds else {"seconds": "training time"}
    )
    for cost, words in costs.items():
        known = [levels for levels in study.ranked(metric) if not isnan(study.table[levels][cost])]
        price, gain = ([study.table[levels][name] for levels in known] for name in (cost, metric))
        if len(known) < 2:
            continue
        if max(price) < 1.05 * min(price):
            span = " to ".join(
                dict.fromkeys(_amount(cost, value) for value in (min(price), max(price)))
            )
            sentences.append(f"The {words} hardly differs: {span}.")
            continue
        # the cheapest first
        front = [at for at, on in enumerate(pareto(price, gain)) if on][::-1]
        ends = dict.fromkeys(
            f"{percent(gain[at])} % for {_amount(cost, price[at])}" for at in (front[0], front[-1])
        )
        settings = study.grouped(known[at] for at in front)
        span = " to ".join(ends) + (_wavering(study) if cost == "seconds" else "")
        sentences.append(
            f"By the means, nothing is better for its {words} than {settings}: {span}."
        )
    return sentences


def _wavering(study: Study) -> str:
    """How far a setting's times are apart, where that is more than a tenth."""
    done = study.runs[study.runs["state"] == "done"]
    times = done.groupby(list(study.comparison.axes))["seconds"]
    ratio = (times.max() / times.min()).max()
    return (
        f" (but times of one setting differ up to {ratio:.1f}-fold between its seeds)"
        if ratio > 1.1
        else ""
    )


def _amount(cost: str, value: float) -> str:
    """0.31 GiB -> 317 MiB; 750 s -> 12 min."""
    if cost == "memory":
        return f"{value:.1f} GiB" if value >= 1 else f"{1024 * value:.0f} MiB"
    return f"{value / 60:.0f} min" if value >= 600 else f"{value:.0f} s"
