"""The last pairs that were pushed, starting with none: what queues are made of."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def finite(*features: Tensor) -> Tensor:
    """() bool: whether a memory may take them, all or none.

    fp16 skips a step whose features overflowed; a queue would bring them back as columns of all
    steps to come. Judged on the device, so that the host need not wait, and for the batch as a
    whole, so that a queue gets no gaps.
    """
    return torch.stack([each.isfinite().all() for each in features]).all()


class Fifo(nn.Module):
    """Features of the last `size` pairs of all ranks, each with the pair's index and caption.

    Buffers, the same on every rank; the first `len` rows are filled, in no order of time once it
    wraps around.
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
        # hash
        self.register_buffer("caption", torch.zeros(size, dtype=torch.int64))
        # ever; the next one goes to seen % size
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.seen), self.size)

    @torch.no_grad()
    def push(self, index: Tensor, caption: Tensor, **features: Tensor) -> None:
        """(N,), (N,) and (N, D) each: the same on all ranks. Any N: of more than fit the last stay.

        Features that are not all finite are not taken: see `finite`.
        """
        count = len(index)
        sound = finite(*features.values())
        spots = ((self.seen + torch.arange(count, device=index.device)) % self.size)[-self.size :]
        for name, rows in {"index": index, "caption": caption, **features}.items():
            kept = self.get_buffer(name)
            kept[spots] = torch.where(sound, rows[-self.size :].to(kept.dtype), kept[spots])
        self.seen += count * sound
