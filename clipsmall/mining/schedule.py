"""Which steps of a run train on mined batches: a pure function of the options."""

from typing import NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """Consecutive steps that belong together: a mined pool and the plain batches around it.

    A *plain* batch is trained on as it was read.
    """

    # the first of its steps
    step: int
    # the number of the first batch it reads
    source: int
    # batches that are read as a pool and mined; 0 = none in this stretch
    pool: int
    # mined batches that are trained on
    kept: int
    # further batches that are read, and trained on as they come
    plain: int

    @property
    def steps(self) -> int:
        """Batches trained on."""
        return self.kept + self.plain

    @property
    def reads(self) -> int:
        """Batches read."""
        return self.pool + self.plain


class Schedule(NamedTuple):
    """Where in a run pools are mined.

    From `start` to `end`, both fractions of the run, pools of `pool` batches are mined, with so
    many plain batches around them that `fraction` of the batches there are mined. A pool lies
    within one epoch, so that no pair is in it twice; what is left of an epoch is plain.
    """

    # of the run
    steps: int
    # batches in a pool, and how many mined batches are made of them
    pool: int
    kept: int
    fraction: float
    start: float
    end: float
    # batches in an epoch, after which pairs come again
    per_epoch: int

    def stretches(self) -> list[Stretch]:
        """All of the run, in order; plain stretches that follow one another are one."""
        stretches = list[Stretch]()
        step = 0
        source = 0
        mined = 0
        plain = 0
        while step < self.steps:
            # so many plain batches that `fraction` holds so far, however few batches a pool gives
            wanted = round((mined + self.kept) * (1 / self.fraction - 1)) - plain
            fits_epoch = source % self.per_epoch + self.pool <= self.per_epoch
            fits_run = step + self.kept + wanted <= self.steps
            in_time = self.start * self.steps <= step < self.end * self.steps
            if fits_epoch and fits_run and in_time:
                stretch = Stretch(step, source, self.pool, self.kept, wanted)
                stretches.append(stretch)
                mined += self.kept
                plain += wanted
                step += stretch.steps
                source += stretch.reads
                continue

            # one more plain batch
            if not stretches or stretches[-1].pool:
                stretches.append(Stretch(step, source, 0, 0, 0))
            stretches[-1] = stretches[-1]._replace(plain=stretches[-1].plain + 1)
            step += 1
            source += 1

        return stretches


def turns(stretch: Stretch, generator: np.random.Generator) -> list[bool]:
    """(steps,) for each step of a mined stretch, whether its batch is a mined one.

    Half of the plain batches come first: they are trained on while the plan is made. The other half
    is mixed with the mined batches.
    """
    lead = stretch.plain // 2

    # True for the mined batches, which are shuffled among the plain ones that are left
    is_mined = np.arange(stretch.steps - lead) < stretch.kept
    is_mined = generator.permutation(is_mined)
    return [False] * lead + [bool(each) for each in is_mined]
