"""A run of a comparison: its config, its folder and its state."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from clipsmall.compare.grid import GridSetting, Tree
from clipsmall.config import Config
from clipsmall.config.reader import lay_over, validated
from clipsmall.evaluation.results import safe
from clipsmall.storage import locks
from clipsmall.storage.run_folder import RunFolder

State = Literal["done", "failed", "submitted", "running", "begun", "missing"]
# Section -> options that do not affect what is learned; "" is the top level of the config.
WITHOUT_EFFECT = {
    "": {"out", "resume"},
    "data": {"workers"},
    "run": {"log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every", "trackers"},
}


def config_digest(tree: Tree) -> str:
    """Eight hexadecimal digits over all options that affect what is learned.

    Only explicit options count, not defaults, so a new option in clipsmall does not make old runs
    obsolete.
    """
    relevant = {name: value for name, value in tree.items() if name not in WITHOUT_EFFECT[""]}
    for section in ("data", "run"):
        left = {}
        for name, value in relevant.pop(section, {}).items():
            if name not in WITHOUT_EFFECT[section]:
                left[name] = value

        # an empty section counts as none
        if left:
            relevant[section] = left

    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class GridRun:
    """One run. Its folder's name has a digest of its config, so other options are another run."""

    setting: GridSetting
    seed: int
    tree: Tree
    folder: Path
    # runs, tuning, speed
    kind: str

    @property
    def title(self) -> str:
        """The setting, and what distinguishes this run from the setting's other runs."""
        if self.kind == "runs":
            which = f"seed {self.seed}"
        elif self.kind == "tuning":
            which = f"lr {self.config.optim.lr:g}"
        else:
            which = self.kind

        return f"{self.setting.title}, {which}"

    @cached_property
    def config(self) -> Config:
        """The run's tree as a checked config."""
        return validated(self.tree)

    @cached_property
    def files(self) -> RunFolder:
        """The files that the trainer writes."""
        return RunFolder(str(self.folder))

    @property
    def finished(self) -> bool:
        """Whether the last step is evaluated or, if there is nothing to evaluate, saved.

        Checkpoints of an evaluated run may be deleted to make room.
        """
        steps = self.config.steps
        if self.config.evaluate.all:
            return self.files.last_evaluation() >= steps

        return (self.files.checkpoints / f"step_{steps:08d}" / "manifest.json").exists()

    @property
    def state(self) -> State:
        """The state of the run, from the files in its folder."""
        if self.finished:
            return "done"
        # `lock` is held by `clipsmall.compare`, `.lock` by the trainer
        if any(locks.held(self.folder / name) for name in ("lock", ".lock")):
            return "running"
        if self.mark:
            return self.mark

        return "begun" if (self.folder / "run.yaml").exists() else "missing"

    @property
    def mark(self) -> Literal["failed", "submitted", ""]:
        """The outcome of the last attempt, if it was recorded as failed or submitted."""
        if (self.folder / "failed.json").exists():
            return "failed"
        if (self.folder / "submitted.json").exists():
            return "submitted"

        return ""

    @property
    def error(self) -> str:
        """Why the run failed; "" if it did not."""
        path = self.folder / "failed.json"
        if not path.exists() or self.finished:
            return ""

        try:
            return str(json.loads(path.read_text())["error"])
        except (ValueError, KeyError):
            return f"see {self.folder}/log.txt"

    def logged_lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without one that a kill has truncated."""
        if not self.files.metrics.exists():
            return []

        lines = []
        for line in self.files.metrics.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue

        return lines


def make_run(
    out: str, setting: GridSetting, seed: int, changes: Sequence[Tree], kind: str = "runs"
) -> GridRun:
    """The run of a setting, with budget and learning rate added to its config."""
    tree = setting.tree
    for change in (*changes, {"seed": seed}):
        tree = lay_over(tree, change)

    parts = [*setting.levels.values(), f"s{seed}", config_digest(tree)]
    name = safe("-".join(parts))
    return GridRun(setting, seed, tree, Path(out) / kind / name, kind)
