"""What each setting of a grid may spend: its learning rate and its pairs; and the runs that
follow.
"""

import math
from typing import NamedTuple

from clipsmall.compare.grid import TRIED, Comparison, GridSetting, Tree, settings
from clipsmall.compare.memory import batch, fitting, groups, planned
from clipsmall.compare.runs import GridRun, make_run
from clipsmall.config.reader import validated


class GridCell(NamedTuple):
    """A setting with what it costs and its runs; none where that is not known yet, or where it does
    not fit.
    """

    setting: GridSetting
    # GiB of a rank at the peak of a step; NaN = the planner cannot tell
    memory: float
    fits: bool
    runs: list[GridRun]
    # what they wait for
    waits: str
    # why there will be none
    error: str


class Budgets:
    """Everything is read off the folders of finished runs, so that a comparison goes on where it
    stopped.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.settings = settings(comparison)
        self._memory = planned(comparison, self.settings)
        self.fitting = fitting(comparison, self.settings, self._memory)
        alike = groups(comparison, self.settings)
        least = [
            min(group, key=batch)
            for group in alike
            if not any(each in self.fitting for each in group)
        ]
        self.shown = [each for each in self.settings if each in self.fitting or each in least]

    def tuning(self, chosen: list[GridSetting]) -> list[GridRun]:
        """Trials of learning rates, each once for all settings that share them."""
        found = {run.folder: run for setting in chosen for run in self._trials(setting).values()}
        return list(found.values())

    def _trials(self, setting: GridSetting) -> dict[float, GridRun]:
        rates = self.comparison.lr
        if rates is None:
            return {}
        # another batch may not fit
        own = self.comparison.batch_axes if self.comparison.budget.memory else []
        wanted = setting.levels | {
            axis: level for axis, level in rates.at.items() if axis not in own
        }
        there = next(each for each in self.settings if each.levels == wanted)
        changes: list[Tree] = [self._spent(there, rates.pairs), {"run": {"evaluate_every": 0}}]
        return {
            lr: make_run(
                self.comparison.out, there, rates.seed, [*changes, {"optim": {"lr": lr}}], "tuning"
            )
            for lr in rates.values
        }

    def rate(self, setting: GridSetting) -> float | None:
        """The best of the rates tried; None before all trials have ended, or if none ended well."""
        trials = self._trials(setting)
        if not trials:
            return validated(setting.tree).optim.lr
        if not all(run.state in ("done", "failed") for run in trials.values()):
            return None
        scores = {lr: self.score(run) for lr, run in trials.items() if run.finished}
        known = {lr: score for lr, score in scores.items() if score is not None}
        return max(known, key=lambda lr: known[lr], default=None)

    def score(self, trial: GridRun) -> float | None:
        """What a trial of a learning rate came to; None if it has not ended, or with no number."""
        rates = self.comparison.lr
        key = self.comparison.metrics[
            rates.metric if rates and rates.metric else self.comparison.metric
        ]
        values = [line[key] for line in trial.lines() if line.get(key) is not None]
        return float(values[-1]) if values and trial.finished else None

    def edges(self) -> list[str]:
        """Groups of settings whose best rate is the least or the greatest that was tried."""
        rates = self.comparison.lr
        found = {}
        for setting in self.fitting if rates else ():
            lr = self.rate(setting)
            if rates and lr in (min(rates.values), max(rates.values)):
                name = ", ".join(
                    level for axis, level in setting.levels.items() if axis not in rates.at
                )
                found[name] = f"{name}: {lr:g}"
        return list(found.values())

    def speeds(self, chosen: list[GridSetting]) -> list[GridRun]:
        """Where time is the budget: a short run a setting."""
        return (
            [self._trial(setting) for setting in chosen] if self.comparison.budget.seconds else []
        )

    def _trial(self, setting: GridSetting) -> GridRun:
        pairs = max(self.comparison.budget.trial, 20 * batch(setting))
        steps = pairs // batch(setting)
        evaluate: Tree = {"zero_shot": [], "retrieval": []}
        # only where it is given: it is part of the digest in the run's folder name
        if setting.tree.get("evaluate", {}).get("tasks"):
            evaluate["tasks"] = []
        silent = {
            "run": {"log_every": max(1, steps // 10), "evaluate_every": 0},
            "evaluate": evaluate,
        }
        return make_run(
            self.comparison.out, setting, TRIED, [self._spent(setting, pairs), silent], "speed"
        )

    def pairs(self, setting: GridSetting) -> int | None:
        """Of a run, the grid's own word first; None before its speed is known."""
        budget = self.comparison.budget
        if (own := self._own(setting, "pairs")) is not None:
            return own
        if budget.pairs is not None:
            return budget.pairs
        trial = self._trial(setting)
        if not trial.finished:
            return None
        first, *lines = [line for line in trial.lines() if "pairs_per_second" in line]
        places = [first["pairs"], *(line["pairs"] for line in lines)]
        took = sum(
            (line["pairs"] - before) / line["pairs_per_second"]
            for before, line in zip(places, lines, strict=False)
        )
        steps = int((places[-1] - places[0]) / took * (budget.seconds or 0)) // batch(setting)
        return max(1, steps) * batch(setting)

    def _own(self, setting: GridSetting, field: str) -> int | None:
        """What a level of the setting says of `optim.field`, which then holds."""
        levels = [self.comparison.axes[axis][level] for axis, level in setting.levels.items()]
        return next(
            (int(tree["optim"][field]) for tree in levels if field in tree.get("optim", {})), None
        )

    def _every(self, steps: int) -> int:
        """Steps between evaluations on the way; the last comes at the end."""
        points = self.comparison.curve
        return max(1, -(-steps // points)) if points > 1 else 0

    def _spent(self, setting: GridSetting, pairs: int) -> Tree:
        own = self._own(setting, "warmup_pairs")
        share = int(self.comparison.budget.warmup * pairs)
        return {"optim": {"pairs": pairs, "warmup_pairs": share if own is None else own}}

    def cells(self) -> list[GridCell]:
        """One for each setting; within a budget of memory, one for each group: its largest batch,
        or that none fits.
        """
        found = []
        for setting in self.shown:
            fits = setting in self.fitting
            runs = list[GridRun]()
            lr = self.rate(setting)
            pairs = self.pairs(setting)
            if fits and lr is not None and pairs is not None:
                every = self._every(pairs // batch(setting))
                changes: list[Tree] = [
                    self._spent(setting, pairs),
                    {"optim": {"lr": lr}},
                    {"run": {"evaluate_every": every}},
                ]
                runs = [
                    make_run(self.comparison.out, setting, seed, changes)
                    for seed in self.comparison.seeds
                ]
            waits, error = ("", "") if runs else self._why(setting, fits)
            found.append(GridCell(setting, self._memory[setting.title], fits, runs, waits, error))
        return found

    def _why(self, setting: GridSetting, fits: bool) -> tuple[str, str]:
        """What the runs of a setting wait for, or why there will be none."""
        if not fits:
            return "", "its memory is not known" if math.isnan(self._memory[setting.title]) else ""
        trials = list(self._trials(setting).values())
        trials += [self._trial(setting)] if self.comparison.budget.seconds else []
        states = [run.state for run in trials]
        if all(state in ("done", "failed") for state in states):
            errors = [run.error for run in trials if run.error]
            return (
                "",
                f"its learning rate or speed could not be tried: {errors[0] if errors else 'no number came out'}",
            )
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"waits for trials of its learning rate or speed: {told}", ""
