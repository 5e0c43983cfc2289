"""When a run mines: its steps cut into stretches, a pure function of the settings."""

from typing import NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """A few steps: the batches they read, and what becomes of them."""

    # the first of it
    step: int
    # the first batch it reads
    source: int
    # batches that are scored and dealt out again; 0 = this stretch is not mined
    pool: int
    # of them that are played
    kept: int
    # further batches, played as they come
    plain: int

    @property
    def steps(self) -> int:
        return self.kept + self.plain

    @property
    def reads(self) -> int:
        return self.pool + self.plain


class Schedule(NamedTuple):
    """Pools of `pool` batches between the shares `start` and `end` of a run, with plain batches
    beside them such that `fraction` of the batches there are mined; else as it comes.

    A pool lies within one epoch, so that no pair is in it twice; what is left of an epoch is played
    as it comes.
    """

    # of the run
    steps: int
    pool: int
    kept: int
    fraction: float
    start: float
    end: float
    # batches; pairs that repeat sooner would meet themselves
    per_epoch: int

    def stretches(self) -> list[Stretch]:
        """All of the run, in order; neighbours that are not mined are one."""
        found = list[Stretch]()
        step = source = mined = plain = 0
        while step < self.steps:
            # so many plain batches that the share is right so far, however few a pool keeps
            beside = round((mined + self.kept) * (1 / self.fraction - 1)) - plain
            fits = (
                source % self.per_epoch + self.pool <= self.per_epoch
                and step + self.kept + beside <= self.steps
            )
            if fits and self.start * self.steps <= step < self.end * self.steps:
                found.append(Stretch(step, source, self.pool, self.kept, beside))
                mined = mined + self.kept
                plain = plain + beside
                step = step + self.kept + beside
                source = source + self.pool + beside
                continue
            if not found or found[-1].pool:
                found.append(Stretch(step, source, 0, 0, 0))
            found[-1] = found[-1]._replace(plain=found[-1].plain + 1)
            step = step + 1
            source = source + 1
        return found


def turns(stretch: Stretch, generator: np.random.Generator) -> list[bool]:
    """For each step of a mined stretch, whether its batch is a mined one.

    Half of the plain ones come first: they are played while the plan is made. The rest are mixed.
    """
    lead = stretch.plain // 2
    mixed = np.arange(stretch.steps - lead) < stretch.kept
    return [False] * lead + [bool(each) for each in generator.permutation(mixed)]
