"""The stream of pairs a rank trains on: counts what was skipped, measures the wait, and ends when
asked to.
"""

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
ENOUGH = 10_000


class Stop:
    """SIGTERM and the first Ctrl-C ask a run to save and leave; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal = 0

    def listen(self) -> "Stop":
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        return self

    def end(self) -> None:
        """Signals end the process again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Feed:
    """Iterates over `Pairs` on `device`; all ranks end at the same step.

    Args:
        loader: of this rank's batches, ending with the run.
        stop: looked at after every step, on all ranks together.
        max_error_rate: bad pairs a pair seen, over all ranks, that end the run with a ShardError.
        pairs: of the data set; the rate is judged against at least so many, or ENOUGH.
        images: False leaves them in host memory, for a model that fetches them in chunks.
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
        self.enough = min(ENOUGH, pairs)
        self.skips = Skips()
        # seconds spent waiting for data
        self.waited = 0.0
        self.stopped = False

    def __iter__(self) -> Iterator[Pairs]:
        batches: Any = iter(self.loader)
        try:
            while True:
                start = time.perf_counter() - self.mined
                loaded = next(batches, None)
                self.waited += time.perf_counter() - self.mined - start
                if loaded is None:
                    return
                self.skips.merge(loaded.skips)
                yield loaded.pairs.to(self.device, self.images)
                self._agree()
                if self.stopped:
                    return
        finally:
            # ends the workers now: at interpreter exit they would be waited for
            del batches

    @property
    def mined(self) -> float:
        """Seconds spent on mining."""
        return self.mining.seconds if self.mining else 0.0

    def _agree(self) -> None:
        """Every rank learns whether one was told to stop, and how many bad pairs all have met."""
        mine = torch.tensor(
            [self.stop.signal, self.skips.total, self.skips.seen], device=self.device
        )
        told, bad, seen = world.sum_over_ranks(mine).tolist()
        self.stopped = told > 0
        if bad > self.max_error_rate * max(seen, self.enough):
            raise ShardError(
                f"{bad} of {seen} pairs could not be read, over data.max_error_rate={self.max_error_rate}: "
                f"{self.skips}; find them with: python -m data_tools.check_shards FOLDER --decode (then begin anew), "
                "or go on with a higher rate"
            )

    def skips_of_all(self) -> Skips:
        """The skips of all ranks together; every rank must call."""
        together = Skips()
        for state in world.gather_bytes(json.dumps(self.state_dict()).encode(), self.device):
            together.merge(self.read_skips(json.loads(state)))
        return together

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.skips.seen,
            "reasons": dict(self.skips.reasons),
            "examples": self.skips.examples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skips = self.read_skips(state)

    @staticmethod
    def read_skips(state: dict[str, Any]) -> Skips:
        return Skips(state["seen"], Counter(state["reasons"]), state["examples"])
