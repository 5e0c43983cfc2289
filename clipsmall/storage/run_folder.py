"""The folder of a run: claimed by one process, described by files that lie beside every result."""

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
    """What the run was made with: packages, Python, platform and device."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _step(line: str) -> float:
    """The step of a line of the log; infinite for a line that was cut."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        # a line cut by a kill
        return math.inf


class RunFolder:
    """Paths of a run's results.

    `claim` is called by the main rank only. Its lock is held until the process ends.
    """

    def __init__(self, out: str) -> None:
        self.path = Path(out)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "eval"

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def refuse_if_used(self, resume: bool, checkpoint: Path | None) -> None:
        """Raises ValueError when a run already lies here and it is not the one to continue."""
        continued = resume or (checkpoint is not None and self.holds(checkpoint))
        if not continued and (self.path / "run.yaml").exists():
            raise ValueError(
                f"{self.path}: holds a run already; continue it with --resume=auto, "
                "or give another --out"
            )

    def last_evaluation(self) -> int:
        """The last step with a line of results (which has no `loss`) in metrics.jsonl, -1 if there
        is none.
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
        """Of metrics.jsonl; a kill may have left half a character at its end."""
        if not self.metrics.exists():
            return []
        return self.metrics.read_text(errors="replace").splitlines()

    def claim(self, config: str, step: int, launch: dict[str, Any]) -> None:
        """Make the folder, lock it, write run.yaml, command.txt and env.json, and set aside what
        came after `step`.

        A resumed run then has the log of an uninterrupted one, and its newest checkpoint is the one
        it continues from: later ones (broken, or left behind on purpose by naming an earlier one)
        are renamed, not deleted.

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
                    f"note: {folder.name} is later than step {step}; kept as {aside.name}",
                    file=sys.stderr,
                )
        # whole or not at all: a resumed run's files outlive a full disk
        atomic.write_text(self.path / "run.yaml", config)
        atomic.write_text(self.path / "command.txt", shlex.join(sys.argv) + "\n")
        atomic.write_json(self.path / "env.json", versions() | launch)
