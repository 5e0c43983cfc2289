"""The folder of a run, used by one process; files in it record how the run was made."""

import json
import math
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clipsmall.storage import atomic, locks

PACKAGES = (
    "clipsmall",
    "torch",
    "torchvision",
    "accelerate",
    "transformers",
    "open_clip_torch",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """The versions of packages, Python, platform and device."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _step(line: str) -> float:
    """The step of a log line; infinite for a truncated line."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        # the process was killed while writing this line
        return math.inf


class RunFolder:
    """The paths of a run's results.

    Only the main rank calls `claim`, whose lock is held until the process ends.
    """

    def __init__(self, out: str) -> None:
        self.path = Path(out)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "eval"

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint belongs to this run."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def refuse_if_used(self, resume: bool, checkpoint: Path | None) -> None:
        """Raises ValueError if the folder holds a run that is not to be continued."""
        continued = resume or (checkpoint is not None and self.holds(checkpoint))
        if not continued and (self.path / "run.yaml").exists():
            raise ValueError(
                f"{self.path}: holds a run already; continue it with --resume=auto, "
                "or give another --out"
            )

    def last_evaluation(self) -> int:
        """The last step with evaluation results in metrics.jsonl; -1 if there is none.

        Lines with results have no `loss`.
        """
        last = -1
        for line in self._log_lines():
            if '"loss"' in line:
                continue
            step = _step(line)
            if step < math.inf:
                last = max(last, int(step))
        return last

    def _log_lines(self) -> list[str]:
        """The lines of metrics.jsonl, which may end in half a character if the run was killed."""
        if not self.metrics.exists():
            return []
        return self.metrics.read_text(errors="replace").splitlines()

    def claim(self, config: str, step: int, launch: dict[str, Any]) -> None:
        """Create and lock the folder, write run.yaml, command.txt and env.json.

        Log lines after `step` are removed, so a resumed run has the log of an uninterrupted one.
        Checkpoints after `step` (broken ones, or when the user named an earlier one) are renamed,
        so that the newest checkpoint is the one that the run continues from.

        Raises:
            ValueError: the folder cannot be written, or another run is using it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror}); give another --out"
            ) from None
        if not locks.take(self._lock):
            raise ValueError(
                f"{self.path}: another run is writing here; wait for it, or give another --out"
            )
        if self.metrics.exists():
            kept = [line for line in self._log_lines() if _step(line) <= step]
            atomic.write_text(self.metrics, "".join(f"{line}\n" for line in kept))
        for folder in self.checkpoints.glob("step_*"):
            if int(folder.name.removeprefix("step_")) > step:
                aside = folder.with_name(f"aside_{folder.name}_{time.time_ns()}")
                atomic.move(folder, aside)
                print(
                    f"note: {folder.name} is later than step {step}; renamed to {aside.name}",
                    file=sys.stderr,
                )
        # atomic writes: if the disk is full, a resumed run's earlier files are kept
        atomic.write_text(self.path / "run.yaml", config)
        atomic.write_text(self.path / "command.txt", shlex.join(sys.argv) + "\n")
        atomic.write_json(self.path / "env.json", versions() | launch)
