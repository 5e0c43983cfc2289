"""What a run says while it trains: a progress bar, a JSON line every few steps, and trackers when
asked.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from clipsmall.batch import Progress
from clipsmall.distributed import world
from clipsmall.training.feed import Feed

# seconds between lines in a log file
LINE_EVERY = 15.0


class MetricsLog:
    """A job: `report(progress, losses)` every few steps. Only the main rank writes, every rank must
    call.

    Losses are means over ranks; `chance` is ln N, softmax's loss of a model that knows nothing
    among the N pairs that a row meets; `data_wait` is the share of the time spent waiting for
    pairs, `mining_time` that spent on mining; what else is said of mining is about the pool that is
    being played.
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
        self.others = 0
        self._mark = (0.0, 0, 0.0, 0.0)
        self._said = 0.0

    def start(self, progress: Progress, batch_size: int) -> None:
        self.others = batch_size - 1
        self.bar.update(progress.pairs - self.bar.n)
        self._mark = (time.perf_counter(), progress.pairs, self.feed.waited, self.feed.mined)

    def leave_out(self, seconds: float) -> None:
        """What was spent on evaluation is no training: the speed knows nothing of it."""
        then, pairs, waited, mined = self._mark
        self._mark = (then + seconds, pairs, waited, mined)

    def __call__(self, progress: Progress, losses: dict[str, Tensor]) -> None:
        now, (then, pairs, waited, mined) = time.perf_counter(), self._mark
        names = sorted(losses)
        stacked = torch.stack(
            [losses[name].detach().float().to(losses["loss"].device) for name in names]
        )
        means = dict(zip(names, world.mean_over_ranks(stacked).tolist(), strict=True))
        row = {
            "step": progress.step,
            "pairs": progress.pairs,
            **means,
            "chance": math.log1p(means.get("effective_negatives", self.others)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "logit_scale": self.model.logit_scale.exp().item(),
            "logit_bias": self.model.logit_bias.item(),
            "pairs_per_second": (progress.pairs - pairs) / (now - then),
            "data_wait": (self.feed.waited - waited) / (now - then),
            "skipped": self.feed.skips.total,
        }
        if self.feed.mining:
            row |= {
                **self.feed.mining.numbers,
                "mining_time": (self.feed.mined - mined) / (now - then),
            }
        self._mark = (now, progress.pairs, self.feed.waited, self.feed.mined)
        self.write(row)
        self._say(row)

    def _say(self, row: dict[str, Any]) -> None:
        """On the bar; where there is no terminal, as a line every LINE_EVERY seconds."""
        met = (
            f"{row['effective_negatives']:.0f} negatives, " if "effective_negatives" in row else ""
        )
        words = (
            f"loss {row['loss']:.3f} (chance {row['chance']:.2f}), lr {row['lr']:.1e}, scale {row['logit_scale']:.1f}, "
            f"{met}data wait {row['data_wait']:.0%}"
        )
        if "mined_loss" in row:
            words += f", mined {row['mined_loss']:.2f} of {row['pool_loss']:.2f}, {row['blocked']:.1%} blocked"
        if row.get("bad_steps"):
            words += f", {row['bad_steps']:.0f} steps skipped"
        self.bar.update(row["pairs"] - self.bar.n)
        self.bar.set_postfix_str(words)
        now = time.perf_counter()
        if self.bar.disable and self.accelerator.is_main_process and now - self._said > LINE_EVERY:
            self._said = now
            print(
                f"{row['pairs']:,} pairs, {row['pairs_per_second']:,.0f}/s, {words}",
                file=sys.stderr,
                flush=True,
            )

    def write(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the trackers."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                # an overflow that fp16's scaler skips has an infinite gradient norm, which is no
                # JSON
                finite = {
                    name: value if math.isfinite(value) else None for name, value in row.items()
                }
                file.write(json.dumps(finite) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self.bar.close()
