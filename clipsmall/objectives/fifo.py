"""First-in-first-out memory of pairs' features, the base of queues."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def finite(*features: Tensor) -> Tensor:
    """() bool: whether all features are finite, so that a memory may take them.

    fp16 skips a step whose features overflow; in a queue they would spoil all later steps. Computed
    on the device, so that the host does not wait, and for the batch as a whole, so that a queue has
    no gaps.
    """
    return torch.stack([each.isfinite().all() for each in features]).all()


class Fifo(nn.Module):
    """Features of the last `size` pairs of all ranks, each with the pair's index and caption.

    Its contents are buffers, the same on every rank. It starts empty; the first `len` rows are
    filled, in no order of time once it wraps around.

    Args:
        size: pairs.
        width: D of the features.
        features: names of the buffers (size, D).
    """

    def __init__(self, size: int, width: int, features: Iterable[str]) -> None:
        super().__init__()
        self.size = size
        self.index: Tensor
        self.caption: Tensor
        self.seen: Tensor
        for name in features:
            self.register_buffer(name, torch.zeros(size, width))
        self.register_buffer("index", torch.zeros(size, dtype=torch.int64))
        # caption hashes
        self.register_buffer("caption", torch.zeros(size, dtype=torch.int64))
        # pairs pushed so far; the next one goes to row seen % size
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.seen), self.size)

    @torch.no_grad()
    def push(self, index: Tensor, caption: Tensor, **features: Tensor) -> None:
        """Add pairs, the same on all ranks; if there are more than fit, the last are kept.

        If any feature is not finite, nothing is added: see `finite`.

        Args:
            index: (N,) of the pairs.
            caption: (N,) hash of their captions.
            features: (N, D) each.
        """
        count = len(index)
        last = slice(-self.size, None)
        sound = finite(*features.values())

        # rows for these pairs: after the newest ones, wrapping around at the end
        following = self.seen + torch.arange(count, device=index.device)
        positions = (following % self.size)[last]

        entries = {"index": index, "caption": caption, **features}
        for name, rows in entries.items():
            kept = self.get_buffer(name)
            old = kept[positions]
            new = rows[last].to(kept.dtype)
            # torch.where instead of `if`, so that the host does not wait for `sound`
            kept[positions] = torch.where(sound, new, old)

        self.seen += count * sound
