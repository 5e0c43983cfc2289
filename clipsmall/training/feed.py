"""Feeds pairs to a rank: counts skipped ones, measures waiting time, stops on a signal."""

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

# lower bound of pairs seen in the error rate; else one bad pair in a first batch of 32 is 3 %
JUDGED_FROM = 10_000


class Stop:
    """Listens for signals that end a run.

    On SIGTERM or the first Ctrl-C the run saves and exits; a second Ctrl-C ends it immediately.
    """

    def __init__(self) -> None:
        # number of the received signal; 0 = none yet
        self.signal = 0

    def listen(self) -> "Stop":
        """Handle both signals from now on."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        return self

    def end(self) -> None:
        """Restore the default handling: both signals end the process."""
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
        stop: checked after every step, on all ranks together.
        max_error_rate: fraction of unreadable pairs among the pairs seen, over all ranks, above
            which the run ends with a ShardError.
        pairs: size of the data set. The fraction is taken of the pairs seen, but of at least this
            many or JUDGED_FROM, whichever is smaller.
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
        # skipped pairs of this rank
        self.skips = Skips()
        # seconds spent waiting for data
        self.waited = 0.0
        # whether a signal ended the iteration
        self.stopped = False

    def __iter__(self) -> Iterator[Pairs]:
        batches: Any = iter(self.loader)
        try:
            while True:
                # mining happens inside next(), but does not count as waiting for data
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
            # end the loader's workers now; at exit, the interpreter would wait for them
            del batches

    @property
    def mined(self) -> float:
        """Seconds spent on mining so far."""
        return self.mining.seconds if self.mining else 0.0

    def _agree(self) -> None:
        """Exchange between ranks whether any got a stop signal, and how many pairs were bad.

        Raises:
            ShardError: too many bad pairs; raised on all ranks together.
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
        """The skipped pairs of all ranks. Every rank must call."""
        together = Skips()
        mine = json.dumps(self.state_dict()).encode()
        for state in world.gather_bytes(mine, self.device):
            together.merge(self.read_skips(json.loads(state)))
        return together

    def state_dict(self) -> dict[str, Any]:
        """This rank's skipped pairs, as JSON. The position in the data is kept in `Progress`."""
        return {
            "seen": self.skips.seen,
            "reasons": dict(self.skips.reasons),
            "examples": self.skips.examples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skips = self.read_skips(state)

    @staticmethod
    def read_skips(state: dict[str, Any]) -> Skips:
        """The skipped pairs in a `state_dict`."""
        return Skips(state["seen"], Counter(state["reasons"]), state["examples"])
