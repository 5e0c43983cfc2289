"""The order of pairs: a pure function of (seed, epoch, position), the same for every rank."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def permutation(size: int, *seed: int) -> Rows:
    """A seeded permutation of range(size), the same in every numpy release."""
    # PCG64's raw output never changes, but numpy's shuffle may change between releases
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(raw, kind="stable").astype(np.int64)


class Order:
    """Shuffled epochs with mostly sequential disk reads.

    Shards are cut into *blocks* of adjacent pairs. Each epoch puts all blocks in random order and
    shuffles pairs within *windows* of that sequence. So an epoch has every pair once, a window
    mixes `window // block` blocks from the whole data set, and only these contiguous blocks are
    read for it. A window as long as the data set is a full shuffle.

    Args:
        sizes: number of pairs in each shard.
        seed: seed of the order.
        window: pairs shuffled together; 0 = no shuffling, the order of the shards.
        block: number of adjacent pairs in a block.
    """

    def __init__(
        self, sizes: list[int], seed: int, window: int = 65_536, block: int = 1_024
    ) -> None:
        self.length = sum(sizes)
        self.seed = seed
        self.window = window
        starts = [np.zeros(0, np.int64)]
        lengths = [np.zeros(0, np.int64)]
        first = 0
        for size in sizes:
            # the last block of a shard may be shorter
            within = np.arange(0, size, block)
            starts.append(first + within)
            lengths.append(np.minimum(block, size - within))
            first += size
        self._starts: Rows = np.concatenate(starts)
        self._lengths: Rows = np.concatenate(lengths)
        self._remember()

    def _remember(self) -> None:
        self._epoch = lru_cache(maxsize=2)(self._laid_out)
        self._window = lru_cache(maxsize=4)(self._shuffled)

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        # caches cannot be pickled
        del state["_epoch"], state["_window"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        # in a spawned loader process
        self.__dict__.update(state)
        self._remember()

    def rows(self, epoch: int, positions: Rows) -> Rows:
        """(n,) rows of the catalog at (n,) positions within an epoch, each in [0, length)."""
        if self.window == 0:
            return positions
        out = np.empty_like(positions)
        which = positions // self.window
        for window in np.unique(which):
            here = which == window
            shuffled = self._window(epoch, int(window))
            out[here] = shuffled[positions[here] - window * self.window]
        return out

    def window_blocks(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """The contiguous pieces (first row, number of rows) that a window reads, in disk order."""
        starts, lengths, before = self._epoch(epoch)
        low = window * self.window
        high = min((window + 1) * self.window, self.length)
        pieces = list[tuple[int, int]]()
        if low >= self.length:
            return pieces
        # from the block that holds the window's first pair to the one that holds its last
        first_block = int(np.searchsorted(before, low, side="right")) - 1
        for block in range(first_block, len(starts)):
            position = int(before[block])
            if position >= high:
                break
            first = max(low - position, 0)
            last = min(high - position, int(lengths[block]))
            pieces.append((int(starts[block]) + first, last - first))
        return sorted(pieces)

    def _laid_out(self, epoch: int) -> tuple[Rows, Rows, Rows]:
        """First row and length of each block in the order of the epoch, and the pairs before it."""
        order = permutation(len(self._starts), self.seed, epoch)
        lengths = self._lengths[order]
        before = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        return self._starts[order], lengths, before

    def _shuffled(self, epoch: int, window: int) -> Rows:
        blocks = self.window_blocks(epoch, window)
        rows = np.concatenate([np.arange(first, first + size) for first, size in blocks])
        order = permutation(len(rows), self.seed, epoch, window)
        shuffled: Rows = rows[order]
        return shuffled
