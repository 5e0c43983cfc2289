"""What each setting of a grid may spend: its learning rate, its pairs, and which of its batches fit the memory."""

import json
import math
import os
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from clipsmall.comparing.grid import Comparison, Setting, Tree, settings
from clipsmall.comparing.runs import Run, digest, make_run
from clipsmall.config_reader import lay_over, validated
from clipsmall.planning.largest import Planner
from clipsmall.planning.step import Machine

GIB = 2**30


class Cell(NamedTuple):
    """A setting with what it costs and its runs; none where that is not known yet, or where it does not fit."""

    setting: Setting
    memory: float  # GiB of a rank at the peak of a step; NaN = the planner cannot tell
    fits: bool
    runs: list[Run]
    error: str  # why there will be none


class Budgets:
    """Everything is read off the folders of finished runs, so that a comparison goes on where it stopped."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.settings = settings(comparison)
        self._memory = _memory(comparison, self.settings)
        self.fitting = self._fitting()
        least = [min(group, key=batch) for group in self._groups() if not any(each in self.fitting for each in group)]
        self.shown = [each for each in self.settings if each in self.fitting or each in least]

    def _fitting(self) -> list[Setting]:
        """All settings; within a budget of memory, of those that differ in their batch alone the largest that fits."""
        most = self.comparison.budget.memory
        if most is None:
            return self.settings
        fit = [[each for each in group if self._memory[each.title] <= most] for group in self._groups()]
        return [max(group, key=batch) for group in fit if group]

    def _groups(self) -> list[list[Setting]]:
        """Settings that differ in the size of their batch alone."""
        found = dict[tuple[str, ...], list[Setting]]()
        sizes = self._batch_axes()
        for setting in self.settings:
            others = tuple(level for axis, level in setting.levels.items() if axis not in sizes)
            found.setdefault(others, []).append(setting)
        return list(found.values())

    def _batch_axes(self) -> set[str]:
        axes = self.comparison.axes.items()
        return {axis for axis, levels in axes if any("batch_size" in tree.get("data", {}) for tree in levels.values())}

    def tuning(self, chosen: list[Setting]) -> list[Run]:
        """Trials of learning rates, each once for all settings that share them."""
        found = {run.folder: run for setting in chosen for run in self._trials(setting).values()}
        return list(found.values())

    def _trials(self, setting: Setting) -> dict[float, Run]:
        rates = self.comparison.lr
        if rates is None:
            return {}
        wanted = setting.levels | rates.at
        there = next(each for each in self.settings if each.levels == wanted)
        seed = max(self.comparison.seeds) + 1
        changes: list[Tree] = [self._spent(rates.pairs), {"run": {"evaluate_every": 0}}]
        return {
            lr: make_run(self.comparison.out, there, seed, [*changes, {"optim": {"lr": lr}}], "tuning")
            for lr in rates.values
        }

    def rate(self, setting: Setting) -> float | None:
        """The best of the rates tried; None before all trials have ended, or if none ended well."""
        trials = self._trials(setting)
        if not trials:
            return validated(setting.tree).optim.lr
        if not all(run.state in ("done", "failed") for run in trials.values()):
            return None
        rates = self.comparison.lr
        key = self.comparison.metrics[rates.metric if rates and rates.metric else self.comparison.metric]
        scores = {lr: last(run, key) for lr, run in trials.items() if run.finished}
        known = {lr: score for lr, score in scores.items() if score is not None}
        return max(known, key=lambda lr: known[lr], default=None)

    def edges(self) -> list[str]:
        """Groups of settings whose best rate is the least or the greatest that was tried."""
        rates = self.comparison.lr
        found = {}
        for setting in self.fitting if rates else ():
            lr = self.rate(setting)
            if rates and lr in (min(rates.values), max(rates.values)):
                name = ", ".join(level for axis, level in setting.levels.items() if axis not in rates.at)
                found[name] = f"{name}: {lr:g}"
        return list(found.values())

    def speeds(self, chosen: list[Setting]) -> list[Run]:
        """Where time is the budget: a short run a setting."""
        return [self._trial(setting) for setting in chosen] if self.comparison.budget.seconds else []

    def _trial(self, setting: Setting) -> Run:
        pairs = max(self.comparison.budget.trial, 20 * batch(setting))
        steps = pairs // batch(setting)
        silent = {
            "run": {"log_every": max(1, steps // 10), "evaluate_every": 0},
            "evaluate": {"zero_shot": [], "retrieval": []},
        }
        return make_run(self.comparison.out, setting, self.comparison.seeds[0], [self._spent(pairs), silent], "speed")

    def pairs(self, setting: Setting) -> int | None:
        """Of a run, the grid's own word first; None before its speed is known."""
        budget = self.comparison.budget
        changes = [self.comparison.axes[axis][level] for axis, level in setting.levels.items()]
        for given in [each["optim"]["pairs"] for each in changes if "pairs" in each.get("optim", {})]:
            return int(given)
        if budget.pairs is not None:
            return budget.pairs
        trial = self._trial(setting)
        if not trial.finished:
            return None
        rates = [line["pairs_per_second"] for line in trial.lines() if "pairs_per_second" in line][1:]
        steps = int(median(rates) * (budget.seconds or 0)) // batch(setting)
        return max(1, steps) * batch(setting)

    def _every(self, steps: int) -> int:
        """Steps between evaluations on the way; the last comes at the end."""
        points = self.comparison.curve
        return max(1, -(-steps // points)) if points > 1 else 0

    def _spent(self, pairs: int) -> Tree:
        warmup = int(self.comparison.budget.warmup * pairs)
        return {"optim": {"pairs": pairs, "warmup_pairs": warmup}}

    def cells(self) -> list[Cell]:
        """One for each setting; within a budget of memory, one for each group: its largest batch, or that none fits."""
        found = []
        for setting in self.shown:
            fits = setting in self.fitting
            runs, lr, pairs = list[Run](), self.rate(setting), self.pairs(setting)
            if fits and lr is not None and pairs is not None:
                every = self._every(pairs // batch(setting))
                changes: list[Tree] = [self._spent(pairs), {"optim": {"lr": lr}}, {"run": {"evaluate_every": every}}]
                runs = [make_run(self.comparison.out, setting, seed, changes) for seed in self.comparison.seeds]
            error = "" if runs else self._error(setting, fits)
            found.append(Cell(setting, self._memory[setting.title], fits, runs, error))
        return found

    def _error(self, setting: Setting, fits: bool) -> str:
        """Why a setting has no runs, if it is not that trials are still to come."""
        if not fits:
            return "its memory is not known" if math.isnan(self._memory[setting.title]) else ""
        trials = list(self._trials(setting).values())
        if trials and all(run.state == "failed" for run in trials):
            return f"no learning rate could be tried: {trials[0].error}"
        speed = self._trial(setting) if self.comparison.budget.seconds else None
        return f"its speed could not be tried: {speed.error}" if speed and speed.state == "failed" else ""


def batch(setting: Setting) -> int:
    return validated(setting.tree).data.batch_size


def last(run: Run, key: str) -> float | None:
    """A metric of the run's last evaluation; None if it was no number."""
    return next((float(line[key]) for line in reversed(run.lines()) if line.get(key) is not None), None)


def _memory(comparison: Comparison, found: list[Setting]) -> dict[str, float]:
    """GiB of a rank for each setting, by title; counted once and kept in memory.json."""
    machine = Machine("cuda" if torch.cuda.is_available() else "cpu", comparison.budget.ranks)
    # gcl remembers each pair, so that the number of pairs counts
    spent = {"optim": {"pairs": comparison.budget.pairs}} if comparison.budget.pairs else {}
    planner, path = Planner(machine, budget=2**63), Path(comparison.out) / "memory.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    needs = {}
    for setting in tqdm(found, desc="memory", unit=" settings", leave=False, disable=not sys.stderr.isatty()):
        tree = lay_over(setting.tree, spent)
        key = f"{setting.title} {digest(tree)}, {machine.ranks} x {machine.device}"
        if key not in known:  # half a second for the glyph towers, a minute for large ones
            known[key] = _peak(planner, tree)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".tmp-{os.getpid()}-{path.name}")
            part.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
            part.replace(path)
        needs[setting.title] = math.nan if known[key] is None else known[key]
    return needs


def _peak(planner: Planner, tree: Tree) -> float | None:
    """GiB; None for a model that the planner cannot have: its run will say why, or is none the worse for it."""
    config = validated(tree)
    try:
        return planner.peak(config, config.data.batch_size // planner.machine.ranks) / GIB
    except (ValueError, NotImplementedError, OSError):
        return None
