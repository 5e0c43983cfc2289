"""A run of a comparison: its config, its folder, and how far it is."""

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
# Section -> options that change nothing of what is learned; "" is the top of the config.
WITHOUT_EFFECT = {
    "": {"out", "resume"},
    "data": {"workers"},
    "run": {"log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every", "trackers"},
}


def config_digest(tree: Tree) -> str:
    """Eight hexadecimal digits of what a config says of learning.

    It is of what was written, not of defaults: an option that is new to clipsmall makes no run over
    again.
    """
    relevant = {name: value for name, value in tree.items() if name not in WITHOUT_EFFECT[""]}
    for section in ("data", "run"):
        left = {}
        for name, value in relevant.pop(section, {}).items():
            if name not in WITHOUT_EFFECT[section]:
                left[name] = value

        # an empty section is as good as none
        if left:
            relevant[section] = left

    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class GridRun:
    """One run. Its folder's name has a digest of its config: other options make another run."""

    setting: GridSetting
    seed: int
    tree: Tree
    folder: Path
    # runs, tuning, speed
    kind: str

    @property
    def title(self) -> str:
        """Its setting, and what distinguishes it from the setting's other runs."""
        if self.kind == "runs":
            which = f"seed {self.seed}"
        elif self.kind == "tuning":
            which = f"lr {self.config.optim.lr:g}"
        else:
            which = self.kind

        return f"{self.setting.title}, {which}"

    @cached_property
    def config(self) -> Config:
        """What the trainer makes of its tree."""
        return validated(self.tree)

    @cached_property
    def files(self) -> RunFolder:
        """What the trainer writes."""
        return RunFolder(str(self.folder))

    @property
    def finished(self) -> bool:
        """Whether its last step is evaluated or, with nothing to evaluate, saved.

        Checkpoints of an evaluated run may be deleted to make room.
        """
        steps = self.config.steps
        if self.config.evaluate.all:
            return self.files.last_evaluation() >= steps

        return (self.files.checkpoints / f"step_{steps:08d}" / "manifest.json").exists()

    @property
    def state(self) -> State:
        """How far it is."""
        if self.finished:
            return "done"
        # `lock` is that of a comparison, `.lock` the trainer's own
        if any(locks.held(self.folder / name) for name in ("lock", ".lock")):
            return "running"
        if self.mark:
            return self.mark

        return "begun" if (self.folder / "run.yaml").exists() else "missing"

    @property
    def mark(self) -> Literal["failed", "submitted", ""]:
        """What the last attempt left behind, if not a finished run."""
        if (self.folder / "failed.json").exists():
            return "failed"
        if (self.folder / "submitted.json").exists():
            return "submitted"

        return ""

    @property
    def error(self) -> str:
        """Why it failed; empty if it did not."""
        path = self.folder / "failed.json"
        if not path.exists() or self.finished:
            return ""

        try:
            return str(json.loads(path.read_text())["error"])
        except (ValueError, KeyError):
            return f"see {self.folder}/log.txt"

    def logged_lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl; a line cut by a kill is left out."""
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
    """The run of a setting, with its budget and learning rate as further changes of its config."""
    tree = setting.tree
    for change in (*changes, {"seed": seed}):
        tree = lay_over(tree, change)

    parts = [*setting.levels.values(), f"s{seed}", config_digest(tree)]
    name = safe("-".join(parts))
    return GridRun(setting, seed, tree, Path(out) / kind / name, kind)
