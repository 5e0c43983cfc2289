"""The last pairs that were pushed, starting with none: what queues are made of."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Fifo(nn.Module):
    """Features of the last `size` pairs of all ranks, each with the pair's index and caption.

    Buffers, the same on every rank; the first `len` rows are filled, in no order of time once it wraps around.
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
        self.register_buffer("caption", torch.zeros(size, dtype=torch.int64))  # hash
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # ever; the next one goes to seen % size

    def __len__(self) -> int:
        return min(int(self.seen), self.size)

    @torch.no_grad()
    def push(self, index: Tensor, caption: Tensor, **features: Tensor) -> None:
        """(N,), (N,) and (N, D) each: the same on all ranks. Any N: of more than fit the last stay."""
        count = len(index)
        spots = ((self.seen + torch.arange(count, device=index.device)) % self.size)[-self.size :]
        for name, rows in {"index": index, "caption": caption, **features}.items():
            kept = self.get_buffer(name)
            kept[spots] = rows[-self.size :].to(kept.dtype)
        self.seen += count
