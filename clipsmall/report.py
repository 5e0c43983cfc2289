"""What a run says while it trains: a progress bar, a JSON line every few steps, and trackers when asked."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from clipsmall import world
from clipsmall.batch import Progress
from clipsmall.feed import Feed


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, so that a resumed run's log is that of an uninterrupted one."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # a line cut by a kill
        return math.inf


class Report:
    """A job: `report(progress, losses)` every few steps. Only the main rank writes, every rank must call.

    Losses are means over ranks; `chance` is ln B, the loss of a model that knows nothing; `data_wait` is the share
    of the time spent waiting for pairs.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        model: Any,
        optimizer: torch.optim.Optimizer,
        feed: Feed,
        batch_size: int,
        pairs: int,
    ) -> None:
        self.accelerator, self.path, self.model, self.optimizer, self.feed = accelerator, path, model, optimizer, feed
        self.chance = math.log(batch_size)
        self.bar = tqdm(total=pairs, unit=" pairs", unit_scale=True, disable=not accelerator.is_main_process)
        self._mark: tuple[float, int, float] | None = None

    def start(self, progress: Progress) -> None:
        self.bar.update(progress.pairs - self.bar.n)
        self._mark = (time.perf_counter(), progress.pairs, self.feed.waited)

    def __call__(self, progress: Progress, losses: dict[str, Tensor]) -> None:
        assert self._mark is not None
        now, (then, pairs, waited) = time.perf_counter(), self._mark
        names = sorted(losses)
        means = world.mean(torch.stack([losses[name].detach().double().to(losses["loss"].device) for name in names]))
        row = {
            "step": progress.step,
            "pairs": progress.pairs,
            **dict(zip(names, means.tolist(), strict=True)),
            "chance": self.chance,
            "lr": self.optimizer.param_groups[0]["lr"],
            "logit_scale": self.model.logit_scale.exp().item(),
            "logit_bias": self.model.logit_bias.item(),
            "pairs_per_second": (progress.pairs - pairs) / (now - then),
            "data_wait": (self.feed.waited - waited) / (now - then),
            "skipped": self.feed.skips.total,
        }
        self._mark = (now, progress.pairs, self.feed.waited)
        self.write(row)
        self.bar.update(progress.pairs - self.bar.n)
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f} of ln B {self.chance:.2f}, lr {row['lr']:.1e}, scale {row['logit_scale']:.1f}, "
            f"{row['effective_negatives']:.0f} negatives, data wait {row['data_wait']:.0%}"
        )

    def write(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the trackers."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self.bar.close()
