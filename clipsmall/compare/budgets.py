"""The learning rate and samples of each setting of a grid, found by trials; and its runs."""

import math
from typing import NamedTuple

from clipsmall.compare.grid import TRIAL_SEED, Comparison, GridSetting, Tree, grid_settings
from clipsmall.compare.memory import (
    batch_size_of,
    groups_by_batch_size,
    planned_memory,
    settings_that_fit,
)
from clipsmall.compare.runs import GridRun, make_run
from clipsmall.config.reader import validated


class GridCell(NamedTuple):
    """A setting with its memory and its runs.

    There are no runs while its learning rate or budget is unknown, or if it does not fit.
    """

    setting: GridSetting
    # GiB per rank at the peak of a step; NaN = the planner cannot tell
    memory: float
    fits: bool
    runs: list[GridRun]
    # what the runs wait for
    waits: str
    # why there will be no runs
    error: str


class Budgets:
    """The runs of a comparison, and the trials that choose their learning rate and samples.

    All state is read from the folders of runs, so an interrupted comparison continues where it
    stopped.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.settings = grid_settings(comparison)
        self._memory = planned_memory(comparison, self.settings)
        self.fitting = settings_that_fit(comparison, self.settings, self._memory)

        # if no batch of a group fits, its smallest is shown with the memory it needs
        smallest = []
        for group in groups_by_batch_size(comparison, self.settings):
            some_fit = any(setting in self.fitting for setting in group)
            if not some_fit:
                smallest.append(min(group, key=batch_size_of))

        self.shown = [each for each in self.settings if each in self.fitting or each in smallest]

    def rate_trials(self, chosen: list[GridSetting]) -> list[GridRun]:
        """The learning-rate trials; settings that share a trial list it once."""
        by_folder = {}
        for setting in chosen:
            for run in self._rate_trials(setting).values():
                by_folder[run.folder] = run
        return list(by_folder.values())

    def _rate_trials(self, setting: GridSetting) -> dict[float, GridRun]:
        """Learning rate -> its trial."""
        rates = self.comparison.lr
        if rates is None:
            return {}

        # under a memory limit, rates are tried at the setting's own batch size: others may not fit
        own_axes = self.comparison.batch_axes if self.comparison.budget.memory else []
        tried_at = {axis: level for axis, level in rates.at.items() if axis not in own_axes}
        levels = setting.levels | tried_at
        tried = next(each for each in self.settings if each.levels == levels)
        spending = self._spending(tried, rates.pairs)
        # only a trial's last evaluation counts
        only_at_the_end: Tree = {"run": {"evaluate_every": 0}}

        trials = {}
        for lr in rates.values:
            changes = [spending, only_at_the_end, {"optim": {"lr": lr}}]
            trials[lr] = make_run(self.comparison.out, tried, rates.seed, changes, "tuning")

        return trials

    def learning_rate(self, setting: GridSetting) -> float | None:
        """The best rate tried; None until all trials have ended, or if none has a result."""
        trials = self._rate_trials(setting)
        if not trials:
            return validated(setting.tree).optim.lr
        if not all(run.state in ("done", "failed") for run in trials.values()):
            return None

        # a trial's metric may be NaN
        scores = {}
        for lr, run in trials.items():
            score = self.trial_score(run)
            if score is not None:
                scores[lr] = score

        return max(scores, key=lambda lr: scores[lr], default=None)

    def trial_score(self, trial: GridRun) -> float | None:
        """The metric of a learning-rate trial; None if it has not ended, or is not a number."""
        rates = self.comparison.lr
        column = self.comparison.metric

        if rates and rates.metric:
            column = rates.metric

        key = self.comparison.metrics[column]

        values = []
        for line in trial.logged_lines():
            if line.get(key) is not None:
                values.append(line[key])

        if not values or not trial.finished:
            return None

        return float(values[-1])

    def rates_at_the_edge(self) -> list[str]:
        """Groups of settings whose best rate is the smallest or the largest that was tried."""
        rates = self.comparison.lr
        if rates is None:
            return []

        found = {}
        for setting in self.fitting:
            lr = self.learning_rate(setting)
            if lr not in (min(rates.values), max(rates.values)):
                continue

            # settings that differ only on the axes of `at` share their trials
            own = [level for axis, level in setting.levels.items() if axis not in rates.at]
            name = ", ".join(own)
            found[name] = f"{name}: {lr:g}"

        return list(found.values())

    def speed_trials(self, chosen: list[GridSetting]) -> list[GridRun]:
        """One short run per setting, if the budget is time; else none."""
        if not self.comparison.budget.seconds:
            return []
        return [self._speed_trial(setting) for setting in chosen]

    def _speed_trial(self, setting: GridSetting) -> GridRun:
        batch_size = batch_size_of(setting)
        pairs = max(self.comparison.budget.trial, 20 * batch_size)
        steps = pairs // batch_size
        evaluate: Tree = {"zero_shot": [], "retrieval": []}
        # only if it is given, as it changes the digest in the run's folder name
        if setting.tree.get("evaluate", {}).get("tasks"):
            evaluate["tasks"] = []
        # no evaluations or saves, and ten lines of log
        silent = {
            "run": {"log_every": max(1, steps // 10), "evaluate_every": 0},
            "evaluate": evaluate,
        }
        changes = [self._spending(setting, pairs), silent]
        return make_run(self.comparison.out, setting, TRIAL_SEED, changes, "speed")

    def pairs_of(self, setting: GridSetting) -> int | None:
        """Samples of each run; the setting's levels come first. None until its speed is known."""
        budget = self.comparison.budget
        own = self._own_option(setting, "pairs")
        if own is not None:
            return own
        if budget.pairs is not None:
            return budget.pairs

        trial = self._speed_trial(setting)
        if not trial.finished:
            return None

        # the first line is left out: its time includes start-up
        first, *lines = [line for line in trial.logged_lines() if "pairs_per_second" in line]
        positions = [first["pairs"], *(line["pairs"] for line in lines)]
        took = sum(
            (line["pairs"] - before) / line["pairs_per_second"]
            for before, line in zip(positions, lines, strict=False)
        )
        batch_size = batch_size_of(setting)
        pairs_per_second = (positions[-1] - positions[0]) / took
        steps = int(pairs_per_second * (budget.seconds or 0)) // batch_size
        return max(1, steps) * batch_size

    def _own_option(self, setting: GridSetting, field: str) -> int | None:
        """The value that a level of the setting gives `optim.field`, or None."""
        for axis, level in setting.levels.items():
            tree = self.comparison.axes[axis][level]
            if field in tree.get("optim", {}):
                return int(tree["optim"][field])
        return None

    def _steps_between_evaluations(self, steps: int) -> int:
        """0 = only the evaluation at the end, which always takes place."""
        evaluations = self.comparison.curve
        if evaluations <= 1:
            return 0

        rounded_up = -(-steps // evaluations)
        return max(1, rounded_up)

    def _spending(self, setting: GridSetting, pairs: int) -> Tree:
        """The config changes that set samples and warm-up."""
        warmup = self._own_option(setting, "warmup_pairs")
        if warmup is None:
            warmup = int(self.comparison.budget.warmup * pairs)
        return {"optim": {"pairs": pairs, "warmup_pairs": warmup}}

    def cells(self) -> list[GridCell]:
        """One cell per setting, with its runs.

        Under a memory limit, one cell per group of settings that differ only in batch size: the
        largest that fits, or a cell that says that none fits.
        """
        cells = []
        for setting in self.shown:
            fits = setting in self.fitting
            lr = self.learning_rate(setting)
            pairs = self.pairs_of(setting)
            runs = list[GridRun]()
            waits = error = ""
            if fits and lr is not None and pairs is not None:
                runs = self._runs(setting, lr, pairs)
            else:
                waits, error = self._why_no_runs(setting, fits)

            memory = self._memory[setting.title]
            cells.append(GridCell(setting, memory, fits, runs, waits, error))

        return cells

    def _runs(self, setting: GridSetting, lr: float, pairs: int) -> list[GridRun]:
        """One run per seed."""
        every = self._steps_between_evaluations(pairs // batch_size_of(setting))
        changes: list[Tree] = [
            self._spending(setting, pairs),
            {"optim": {"lr": lr}},
            {"run": {"evaluate_every": every}},
        ]
        out = self.comparison.out
        return [make_run(out, setting, seed, changes) for seed in self.comparison.seeds]

    def _why_no_runs(self, setting: GridSetting, fits: bool) -> tuple[str, str]:
        """(what a setting's runs wait for, why there will be none); one of the two is ""."""
        if not fits:
            unknown = math.isnan(self._memory[setting.title])
            return "", "its memory is not known" if unknown else ""

        trials = list(self._rate_trials(setting).values())
        trials += self.speed_trials([setting])

        states = [run.state for run in trials]
        if all(state in ("done", "failed") for state in states):
            errors = [run.error for run in trials if run.error]
            reason = errors[0] if errors else "no number came out"
            return "", f"its learning rate or speed could not be tried: {reason}"

        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        return f"waits for trials of its learning rate or speed: {', '.join(counts)}", ""
