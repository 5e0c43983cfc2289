"""A pool: the pairs of several global batches, each rank its own slices, and one order of them
all.
"""

import torch
from torch import Tensor

from clipsmall.batch import Pairs
from clipsmall.data import LoadedBatch, Skips
from clipsmall.distributed import world
from clipsmall.mining.scored import Ints


class Pool:
    """m global batches of B pairs; a *place* is batch · B + slot, on any number of ranks. In host
    memory.

    Args:
        read: my B / W pairs of each batch.
        pin: make batches that travel to a GPU beside its work.
    """

    def __init__(self, read: list[LoadedBatch], pin: bool = False) -> None:
        self.batches = len(read)
        self.local = len(read[0].image_hash)
        self.pin = pin
        self.pairs = Pairs(
            *(torch.cat(fields) for fields in zip(*(batch.pairs for batch in read), strict=True))
        )
        self.image_hash = torch.cat([batch.image_hash for batch in read])
        self.skips = Skips()
        for batch in read:
            self.skips.merge(batch.skips)

    @property
    def owner(self) -> Ints:
        """(m·B,) the rank that holds each place."""
        slots = torch.arange(self.batches * self.local * world.size()) % (self.local * world.size())
        return (slots // self.local).numpy()

    def in_order(self, gathered: Tensor) -> Tensor:
        """(W·m·b, ...) in rank order -> the same by place."""
        apart = gathered.reshape(world.size(), self.batches, self.local, *gathered.shape[1:])
        return apart.transpose(0, 1).flatten(0, 2)

    def take(self, places: Tensor, caption_hash: Tensor) -> LoadedBatch:
        """My pairs of those places, with the caption hashes that the plan has for them."""
        batch = places // (self.local * world.size())
        slot = places % (self.local * world.size())
        mine = slot // self.local == world.rank()
        assert mine.sum() == self.local, "a mined batch takes equally many pairs of every rank"
        rows = (batch * self.local + slot % self.local)[mine]
        pairs = Pairs(*(field[rows] for field in self.pairs))._replace(
            caption_hash=caption_hash[mine]
        )
        if self.pin:
            pairs = Pairs(*(field.pin_memory() for field in pairs))
        return LoadedBatch(pairs, Skips(), self.image_hash[rows])
