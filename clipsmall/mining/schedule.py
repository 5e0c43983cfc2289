"""When a run mines: its steps cut into stretches, a pure function of the settings."""

from typing import NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """A few steps: the batches they read, and what becomes of them."""

    step: int  # the first of it
    source: int  # the first batch it reads
    pool: int  # batches that are scored and dealt out again; 0 = this stretch is not mined
    kept: int  # of them that are played
    plain: int  # further batches, played as they come

    @property
    def steps(self) -> int:
        return self.kept + self.plain

    @property
    def reads(self) -> int:
        return self.pool + self.plain


class Schedule(NamedTuple):
    """Pools of `pool` batches with `plain` others between the shares `start` and `end` of a run; else as it comes.

    A pool lies within one epoch, so that no pair is in it twice; what is left of an epoch is played as it comes.
    """

    steps: int  # of the run
    pool: int
    kept: int
    plain: int
    start: float
    end: float
    per_epoch: int  # batches; pairs that repeat sooner would meet themselves

    def stretches(self) -> list[Stretch]:
        """All of the run, in order; neighbours that are not mined are one."""
        found = list[Stretch]()
        step = source = 0
        whole = Stretch(0, 0, self.pool, self.kept, self.plain)
        while step < self.steps:
            fits = step + whole.steps <= self.steps and source % self.per_epoch + whole.reads <= self.per_epoch
            if fits and self.start * self.steps <= step < self.end * self.steps:
                here = whole._replace(step=step, source=source)
                found.append(here)
            elif found and not found[-1].pool:
                here = Stretch(step, source, 0, 0, 1)
                found[-1] = found[-1]._replace(plain=found[-1].plain + 1)
            else:
                here = Stretch(step, source, 0, 0, 1)
                found.append(here)
            step, source = step + here.steps, source + here.reads
        return found


def turns(stretch: Stretch, generator: np.random.Generator) -> list[bool]:
    """For each step of a mined stretch, whether its batch is a mined one.

    Half of the plain ones come first: they are played while the plan is made. The rest are mixed.
    """
    lead = stretch.plain // 2
    mixed = np.arange(stretch.steps - lead) < stretch.kept
    return [False] * lead + [bool(each) for each in generator.permutation(mixed)]
