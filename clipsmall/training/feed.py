"""The pairs that a rank trains on: counts skipped ones, measures the wait, ends when asked to."""

import json
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch

from clipsmall.batch import Pairs
from clipsmall.data import LoadedBatch, ShardError, Skips
from clipsmall.distributed import world
from clipsmall.mining.online import MinedBatches

# pairs before the error rate is judged: one bad pair in a first batch of 32 is 3 %
JUDGED_FROM = 10_000


class Stop:
    """How a run is asked to end.

    SIGTERM and the first Ctrl-C ask it to save and exit; a second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        # number of the signal that asked; 0 = none has
        self.signal = 0

    def listen(self) -> "Stop":
        """Take over both signals from now on."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        return self

    def end(self) -> None:
        """Let both signals end the process again, as if nobody had listened."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Feed:
    """Iterates over `Pairs` on `device`; all ranks end at the same step.

    Args:
        loader: this rank's slices of the run's batches, up to the last.
        stop: looked at after every step, on all ranks together.
        max_error_rate: ratio of unreadable to seen pairs, over all ranks, above which the run ends
            with a ShardError.
        pairs: in the data set. The rate is judged as if at least so many pairs, or JUDGED_FROM,
            had been seen.
        images: False leaves images in host memory, for a model that fetches them in chunks.
    """

    def __init__(
        self,
        loader: Iterable[LoadedBatch],
        device: torch.device,
        stop: Stop,
        max_error_rate: float,
        pairs: int,
        images: bool = True,
    ) -> None:
        self.loader = loader
        self.device = device
        self.stop = stop
        self.images = images
        self.mining = loader if isinstance(loader, MinedBatches) else None
        self.max_error_rate = max_error_rate
        self.judged_from = min(JUDGED_FROM, pairs)
        # of this rank
        self.skips = Skips()
        # seconds spent waiting for data
        self.waited = 0.0
        # whether iteration ended because a signal asked for it
        self.stopped = False

    def __iter__(self) -> Iterator[Pairs]:
        batches: Any = iter(self.loader)
        try:
            while True:
                # mining happens inside next(), but is no wait for data
                before = time.perf_counter() - self.mined
                loaded = next(batches, None)
                self.waited += time.perf_counter() - self.mined - before
                if loaded is None:
                    return
                self.skips.merge(loaded.skips)
                yield loaded.pairs.to(self.device, self.images)
                self._agree()
                if self.stopped:
                    return
        finally:
            # ends the loader's workers now: at interpreter exit they would be waited for
            del batches

    @property
    def mined(self) -> float:
        """Seconds spent on mining."""
        return self.mining.seconds if self.mining else 0.0

    def _agree(self) -> None:
        """Exchange between all ranks whether one was asked to stop, and how many pairs were bad.

        Raises:
            ShardError: too many, on all ranks alike.
        """
        mine = torch.tensor(
            [self.stop.signal, self.skips.total, self.skips.seen], device=self.device
        )
        signals, bad, seen = world.sum_over_ranks(mine).tolist()
        self.stopped = signals > 0
        if bad > self.max_error_rate * max(seen, self.judged_from):
            raise ShardError(
                f"{bad} of {seen} pairs could not be read, over data.max_error_rate="
                f"{self.max_error_rate}: {self.skips}; find them with: python -m "
                "data_tools.check_shards FOLDER --decode (then start a new run), "
                "or go on with a higher rate"
            )

    def all_skips(self) -> Skips:
        """The skips of all ranks together. Every rank must call."""
        together = Skips()
        mine = json.dumps(self.state_dict()).encode()
        for state in world.gather_bytes(mine, self.device):
            together.merge(self.read_skips(json.loads(state)))
        return together

    def state_dict(self) -> dict[str, Any]:
        """This rank's skips, as JSON. The position in the data is `Progress`, the same on all."""
        return {
            "seen": self.skips.seen,
            "reasons": dict(self.skips.reasons),
            "examples": self.skips.examples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skips = self.read_skips(state)

    @staticmethod
    def read_skips(state: dict[str, Any]) -> Skips:
        """The skips in a `state_dict`."""
        return Skips(state["seen"], Counter(state["reasons"]), state["examples"])
