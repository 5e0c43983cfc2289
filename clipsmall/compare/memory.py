"""The memory that each setting of a grid needs, planned without running it, and which batches fit a
budget of it.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from clipsmall.compare.grid import Comparison, GridSetting, Tree
from clipsmall.compare.runs import digest
from clipsmall.config.reader import lay_over, validated
from clipsmall.plan.largest_batch import Planner
from clipsmall.plan.step import Machine

GIB = 2**30


def batch(setting: GridSetting) -> int:
    return validated(setting.tree).data.batch_size


def groups(comparison: Comparison, settings: list[GridSetting]) -> list[list[GridSetting]]:
    """Settings that differ in the size of their batch alone."""
    found = dict[tuple[str, ...], list[GridSetting]]()
    for setting in settings:
        others = tuple(
            level for axis, level in setting.levels.items() if axis not in comparison.batch_axes
        )
        found.setdefault(others, []).append(setting)
    return list(found.values())


def fitting(
    comparison: Comparison, settings: list[GridSetting], needs: dict[str, float]
) -> list[GridSetting]:
    """All settings; within a budget of memory, of those that differ in their batch alone the
    largest that fits.
    """
    most = comparison.budget.memory
    if most is None:
        return settings
    fit = [
        [each for each in group if needs[each.title] <= most]
        for group in groups(comparison, settings)
    ]
    return [max(group, key=batch) for group in fit if group]


def planned(comparison: Comparison, found: list[GridSetting]) -> dict[str, float]:
    """GiB of a rank for each setting, by title; counted once and kept in memory.json. NaN: the
    planner cannot tell.
    """
    device = comparison.budget.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = Machine(device, comparison.budget.ranks)
    # gcl remembers each pair, so that the number of pairs counts
    spent = {"optim": {"pairs": comparison.budget.pairs}} if comparison.budget.pairs else {}
    planner = Planner(machine, budget=2**63)
    path = Path(comparison.out) / "memory.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    needs = {}
    for setting in tqdm(
        found, desc="memory", unit=" settings", leave=False, disable=not sys.stderr.isatty()
    ):
        tree = lay_over(setting.tree, spent)
        key = f"{setting.title} {digest(tree)}, {machine.ranks} x {machine.device}"
        # half a second for the glyph towers, a minute for large ones
        if key not in known:
            try:
                known[key] = _peak(planner, tree)
            except OSError:
                # a hub that does not answer today
                needs[setting.title] = math.nan
                continue
            _keep(known, path)
        needs[setting.title] = math.nan if known[key] is None else known[key]
    return needs


def _peak(planner: Planner, tree: Tree) -> float | None:
    """GiB; None for a model that the planner cannot have: its run will say why, or is none the
    worse for it.
    """
    config = validated(tree)
    try:
        return planner.peak(config, config.data.batch_size // planner.machine.ranks) / GIB
    except (ValueError, NotImplementedError):
        return None


def _keep(known: dict[str, float | None], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    part.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
