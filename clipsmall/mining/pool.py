"""A pool: the pairs of several global batches, of which each rank holds its own slices."""

import torch
from torch import Tensor

from clipsmall.batch import Pairs
from clipsmall.data import LoadedBatch, Skips
from clipsmall.distributed import world
from clipsmall.mining.scored_pairs import Ints


class Pool:
    """m global batches of B pairs, in host memory; this rank holds b = B / W pairs of each.

    The *place* of a pair is batch · B + slot, whatever the number of ranks.

    Args:
        read: this rank's B / W pairs of each batch.
        pin: `take` returns pinned memory, so that copying to a GPU overlaps with computing.
    """

    def __init__(self, read: list[LoadedBatch], pin: bool = False) -> None:
        self.batches = len(read)
        self.local = len(read[0].image_hash)
        self.pin = pin
        fields = zip(*[batch.pairs for batch in read], strict=True)
        self.pairs = Pairs(*map(torch.cat, fields))
        self.image_hash = torch.cat([batch.image_hash for batch in read])
        self.skips = Skips()
        for batch in read:
            self.skips.merge(batch.skips)

    @property
    def owner(self) -> Ints:
        """(m·B,) the rank that holds each place."""
        batch_size = self.local * world.size()
        places = torch.arange(self.batches * batch_size)
        slots = places % batch_size
        return (slots // self.local).numpy()

    def in_order(self, gathered: Tensor) -> Tensor:
        """Sort gathered rows (W·m·b, ...) from rank order into the order of places."""
        apart = gathered.reshape(world.size(), self.batches, self.local, *gathered.shape[1:])
        return apart.transpose(0, 1).flatten(0, 2)

    def take(self, places: Tensor, caption_hash: Tensor) -> LoadedBatch:
        """This rank's pairs of a mined batch.

        Args:
            places: (B,) places of the batch's pairs.
            caption_hash: (B,) caption hashes of these pairs, from the plan.
        """
        batch_size = self.local * world.size()
        batch = places // batch_size
        slot = places % batch_size
        mine = slot // self.local == world.rank()
        assert mine.sum() == self.local, "a mined batch takes equally many pairs of every rank"

        # rows of self.pairs
        rows = (batch * self.local + slot % self.local)[mine]
        pairs = Pairs(*(field[rows] for field in self.pairs))
        pairs = pairs._replace(caption_hash=caption_hash[mine])
        if self.pin:
            pairs = Pairs(*(field.pin_memory() for field in pairs))
        return LoadedBatch(pairs, Skips(), self.image_hash[rows])
