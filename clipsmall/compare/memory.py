"""The memory that each setting of a grid needs, planned without running it, and which fit."""

import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from clipsmall.compare.grid import Comparison, GridSetting, Tree
from clipsmall.compare.runs import config_digest
from clipsmall.config.reader import lay_over, validated
from clipsmall.plan.largest_batch import Planner
from clipsmall.plan.step import Machine
from clipsmall.storage import atomic

GIB = 2**30


def batch_size_of(setting: GridSetting) -> int:
    """Pairs in a setting's global batch."""
    return validated(setting.tree).data.batch_size


def groups_by_batch_size(
    comparison: Comparison, settings: list[GridSetting]
) -> list[list[GridSetting]]:
    """Groups of settings that differ only in batch size."""
    groups = dict[tuple[str, ...], list[GridSetting]]()
    for setting in settings:
        others = []
        for axis, level in setting.levels.items():
            if axis not in comparison.batch_axes:
                others.append(level)

        group = groups.setdefault(tuple(others), [])
        group.append(setting)

    return list(groups.values())


def settings_that_fit(
    comparison: Comparison, settings: list[GridSetting], needs: dict[str, float]
) -> list[GridSetting]:
    """All settings; under a memory limit, only each group's largest batch that fits.

    Args:
        needs: title of a setting -> GiB; NaN never fits.
    """
    limit = comparison.budget.memory
    if limit is None:
        return settings

    largest = []
    for group in groups_by_batch_size(comparison, settings):
        fitting = [setting for setting in group if needs[setting.title] <= limit]
        if fitting:
            largest.append(max(fitting, key=batch_size_of))

    return largest


def planned_memory(comparison: Comparison, settings: list[GridSetting]) -> dict[str, float]:
    """Title of each setting -> GiB per rank; NaN where the planner cannot tell.

    Planning a setting takes half a second for small towers and a minute for large ones; results are
    kept in memory.json.
    """
    device = comparison.budget.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    machine = Machine(device, comparison.budget.ranks)
    # an objective may store something per pair, so the number of pairs matters
    pairs = comparison.budget.pairs
    spent = {"optim": {"pairs": pairs}} if pairs else {}
    planner = Planner(machine, budget=2**63)
    path = Path(comparison.out) / "memory.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    needs = {}

    bar = tqdm(
        settings, desc="memory", unit=" settings", leave=False, disable=not sys.stderr.isatty()
    )
    for setting in bar:
        tree = lay_over(setting.tree, spent)
        key = f"{setting.title} {config_digest(tree)}, {machine.ranks} x {machine.device}"
        if key not in known:
            try:
                known[key] = _peak(planner, tree)
            except OSError:
                # the hub may be unreachable only now: not kept
                needs[setting.title] = math.nan
                continue

            atomic.write_json(path, known)

        needs[setting.title] = math.nan if known[key] is None else known[key]

    return needs


def _peak(planner: Planner, tree: Tree) -> float | None:
    """GiB of a step; None for a model that the planner cannot build.

    Its run will report the error, or may work nevertheless.
    """
    config = validated(tree)
    try:
        return planner.peak(config, config.data.batch_size // planner.machine.ranks) / GIB
    except (ValueError, NotImplementedError):
        return None
