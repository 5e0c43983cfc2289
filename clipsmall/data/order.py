"""The order of pairs: a pure function of (seed, epoch, position), whoever asks and from
wherever.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def permutation(size: int, *seed: int) -> Rows:
    """A seeded permutation of range(size). Sorted raw PCG64 words: numpy keeps that stream between
    releases.
    """
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(raw, kind="stable").astype(np.int64)


class Order:
    """Shuffled epochs that a disk can follow.

    Shards are cut into *blocks* of neighbouring pairs; an epoch lays all blocks out in random
    order, and shuffles pairs within *windows* of that line. So an epoch shows every pair once, a
    window mixes `window // block` places of the whole data set, and while one window plays, only
    its few contiguous blocks are read. A window as long as the data set is a full shuffle.

    Args:
        sizes: pairs in each shard.
        seed: of the whole order.
        window: pairs shuffled together; 0 = no shuffle at all, shards as they lie.
        block: neighbouring pairs that stay in one window.
    """

    def __init__(
        self, sizes: list[int], seed: int, window: int = 65_536, block: int = 1_024
    ) -> None:
        self.length = sum(sizes)
        self.seed = seed
        self.window = window
        starts = [
            np.arange(0, size, block) + before
            for size, before in zip(sizes, np.cumsum([0, *sizes]), strict=False)
        ]
        self._starts: Rows = np.concatenate([*starts, np.zeros(0)]).astype(np.int64)
        ends = np.minimum(
            self._starts + block,
            np.cumsum(sizes)[np.searchsorted(np.cumsum(sizes), self._starts, side="right")]
            if sizes
            else 0,
        )
        self._lengths: Rows = (ends - self._starts).astype(np.int64)
        self._remember()

    def _remember(self) -> None:
        self._epoch = lru_cache(maxsize=2)(self._laid_out)
        self._window = lru_cache(maxsize=4)(self._shuffled)

    def __getstate__(self) -> dict[str, object]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_epoch", "_window")
        }

    # in a spawned loader process
    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._remember()

    def rows(self, epoch: int, positions: Rows) -> Rows:
        """(n,) positions within an epoch, each in [0, length) -> (n,) rows of the data set."""
        if self.window == 0:
            return positions
        out = np.empty_like(positions)
        which = positions // self.window
        for window in np.unique(which):
            here = which == window
            out[here] = self._window(epoch, int(window))[positions[here] - window * self.window]
        return out

    def window_blocks(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """The contiguous (first row, number of rows) pieces that a window reads, in the order of
        the disk.
        """
        starts, lengths, before = self._epoch(epoch)
        low = window * self.window
        high = min((window + 1) * self.window, self.length)
        pieces = list[tuple[int, int]]()
        if low >= self.length:
            return pieces
        for block in range(int(np.searchsorted(before, low, side="right")) - 1, len(starts)):
            if before[block] >= high:
                break
            first = max(low - int(before[block]), 0)
            last = min(high - int(before[block]), int(lengths[block]))
            pieces.append((int(starts[block]) + first, last - first))
        return sorted(pieces)

    def _laid_out(self, epoch: int) -> tuple[Rows, Rows, Rows]:
        order = permutation(len(self._starts), self.seed, epoch)
        lengths = self._lengths[order]
        return (
            self._starts[order],
            lengths,
            np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        )

    def _shuffled(self, epoch: int, window: int) -> Rows:
        rows = np.concatenate(
            [np.arange(start, start + size) for start, size in self.window_blocks(epoch, window)]
        )
        shuffled: Rows = rows[permutation(len(rows), self.seed, epoch, window)]
        return shuffled
