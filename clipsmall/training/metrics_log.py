"""What a run reports while it trains: metrics.jsonl, trackers, and a progress bar or log lines."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from clipsmall.batch import Progress
from clipsmall.distributed import world
from clipsmall.training.feed import Feed

# seconds between lines in a log file
LINE_EVERY = 15.0


class Moment(NamedTuple):
    """When the last line was written, and what the run had done by then."""

    # of time.perf_counter
    seconds: float = 0.0
    pairs: int = 0
    # seconds spent waiting for data, and on mining
    waited: float = 0.0
    mined: float = 0.0


class MetricsLog:
    """A job: `report(progress, losses)` every few steps. Every rank must call, the main one writes.

    Each call writes one line: means over ranks of the losses, and with them:

    - `chance`: ln N, the softmax loss of a model that knows nothing among the N pairs that a row
      is compared with;
    - `data_wait`, `mining_time`: fractions of the time since the last line that were spent waiting
      for pairs, and on mining. Other numbers about mining belong to the pool now trained on;
    - `skipped`: unreadable pairs of this rank so far.

    Args:
        path: of metrics.jsonl.
        model: its logit_scale and logit_bias are reported.
        optimizer: its learning rate is reported.
        pairs: of the whole run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        model: Any,
        optimizer: Any,
        feed: Feed,
        pairs: int,
    ) -> None:
        self.accelerator = accelerator
        self.path = path
        self.model = model
        self.optimizer = optimizer
        self.feed = feed
        shown = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=pairs, unit=" pairs", unit_scale=True, disable=not shown)
        # negatives of a row
        self.others = 0
        self._last = Moment()
        # when the last line of a log file was printed
        self._printed = 0.0

    def start(self, progress: Progress, batch_size: int) -> None:
        """Measure from now on. batch_size: pairs that are compared with one another."""
        self.others = batch_size - 1
        self.bar.update(progress.pairs - self.bar.n)
        self._last = self._now(progress)

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was spent on evaluation: the speed is that of training."""
        self._last = self._last._replace(seconds=self._last.seconds + seconds)

    def _now(self, progress: Progress) -> Moment:
        return Moment(time.perf_counter(), progress.pairs, self.feed.waited, self.feed.mined)

    def __call__(self, progress: Progress, losses: dict[str, Tensor]) -> None:
        now = self._now(progress)
        last = self._last
        seconds = now.seconds - last.seconds
        means = self._means(losses)
        row = {
            "step": progress.step,
            "pairs": progress.pairs,
            **means,
            "chance": math.log1p(means.get("effective_negatives", self.others)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "logit_scale": self.model.logit_scale.exp().item(),
            "logit_bias": self.model.logit_bias.item(),
            "pairs_per_second": (now.pairs - last.pairs) / seconds,
            "data_wait": (now.waited - last.waited) / seconds,
            "skipped": self.feed.skips.total,
        }
        if self.feed.mining:
            row |= self.feed.mining.numbers
            row["mining_time"] = (now.mined - last.mined) / seconds
        self._last = now
        self.write(row)
        self._show(row)

    def _means(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Means over ranks, in one exchange."""
        names = sorted(losses)
        # some terms are made on the host
        device = losses["loss"].device
        values = []
        for name in names:
            value = losses[name].detach().float()
            values.append(value.to(device))
        means = world.mean_over_ranks(torch.stack(values))
        return dict(zip(names, means.tolist(), strict=True))

    def _show(self, row: dict[str, Any]) -> None:
        """On the bar; where there is no terminal, as a line every LINE_EVERY seconds."""
        words = summary_of(row)
        self.bar.update(row["pairs"] - self.bar.n)
        self.bar.set_postfix_str(words)
        now = time.perf_counter()
        due = now - self._printed > LINE_EVERY
        if self.bar.disable and self.accelerator.is_main_process and due:
            self._printed = now
            speed = row["pairs_per_second"]
            print(
                f"{row['pairs']:,} pairs, {speed:,.0f}/s, {words}",
                file=sys.stderr,
                flush=True,
            )

    def write(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and hand it to the trackers. `row` has a `step`."""
        if self.accelerator.is_main_process:
            # JSON has no infinity, which is the gradient norm of a step that fp16's scaler skips
            finite = {}
            for name, value in row.items():
                finite[name] = value if math.isfinite(value) else None
            with self.path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
        values = {name: value for name, value in row.items() if name != "step"}
        self.accelerator.log(values, step=int(row["step"]))

    def close(self) -> None:
        self.bar.close()


def summary_of(row: dict[str, Any]) -> str:
    """The most important numbers of a line of metrics.jsonl, in words."""
    parts = [
        f"loss {row['loss']:.3f} (chance {row['chance']:.2f})",
        f"lr {row['lr']:.1e}",
        f"scale {row['logit_scale']:.1f}",
    ]
    if "effective_negatives" in row:
        parts.append(f"{row['effective_negatives']:.0f} negatives")
    parts.append(f"data wait {row['data_wait']:.0%}")
    if "mined_loss" in row:
        parts.append(f"mined {row['mined_loss']:.2f} of {row['pool_loss']:.2f}")
        parts.append(f"{row['blocked']:.1%} blocked")
    if row.get("bad_steps"):
        parts.append(f"{row['bad_steps']:.0f} steps skipped")
    return ", ".join(parts)
