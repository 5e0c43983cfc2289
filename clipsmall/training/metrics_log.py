"""Reports of a training run: metrics.jsonl, trackers, and a progress bar or log lines."""

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
    """The time of the last line, and what the run had done by then."""

    # value of time.perf_counter
    seconds: float = 0.0
    pairs: int = 0
    # seconds spent waiting for data, and on mining
    waited: float = 0.0
    mined: float = 0.0


class MetricsLog:
    """A job, called as `report(progress, losses)`. All ranks must call; the main rank writes.

    Each call writes one line with the losses, averaged over ranks, and with:

    - `chance`: ln N, the softmax loss of random guessing among the N columns that a row is compared
      with;
    - `data_wait`, `mining_time`: fractions of the time since the last line that were spent waiting
      for pairs, and on mining. Other mining numbers are those of the pool in use;
    - `skipped`: unreadable pairs of this rank so far.

    Args:
        path: path of metrics.jsonl.
        model: its logit_scale and logit_bias are reported.
        optimizer: its learning rate is reported.
        pairs: samples seen in the whole run.
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
        # number of negatives per row
        self.others = 0
        self._last = Moment()
        # time when the last line was printed, if there is no terminal
        self._printed = 0.0

    def start(self, progress: Progress, batch_size: int) -> None:
        """Start measuring. batch_size: number of pairs compared with one another."""
        self.others = batch_size - 1
        self.bar.update(progress.pairs - self.bar.n)
        self._last = self._now(progress)

    def leave_out(self, seconds: float) -> None:
        """Exclude time spent on evaluation from the training speed."""
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
        """Means of the losses over ranks, in one exchange."""
        names = sorted(losses)
        # some terms are computed on the host
        device = losses["loss"].device
        values = []
        for name in names:
            value = losses[name].detach().float()
            values.append(value.to(device))
        means = world.mean_over_ranks(torch.stack(values))
        return dict(zip(names, means.tolist(), strict=True))

    def _show(self, row: dict[str, Any]) -> None:
        """Update the progress bar or, without a terminal, print a line every LINE_EVERY seconds."""
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
        """Append a line to metrics.jsonl and send it to the trackers. `row` must have `step`."""
        if self.accelerator.is_main_process:
            # JSON has no infinity, but fp16 steps that are skipped have an infinite gradient norm
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
    """A short text with the main numbers of a line of metrics.jsonl."""
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
