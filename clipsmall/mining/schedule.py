"""Which steps of a run train on mined batches: a pure function of the options."""

from typing import NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """Consecutive steps that belong together: a mined pool and the plain batches around it.

    A *plain* batch is a batch that is trained on as it was read, without mining.
    """

    # the first step of the stretch
    step: int
    # the number of the first batch that the stretch reads
    source: int
    # batches that are read as a pool and mined; 0 = no mining in this stretch
    pool: int
    # mined batches that are trained on
    kept: int
    # plain batches
    plain: int

    @property
    def steps(self) -> int:
        """Number of batches trained on."""
        return self.kept + self.plain

    @property
    def reads(self) -> int:
        """Number of batches read."""
        return self.pool + self.plain


class Schedule(NamedTuple):
    """Where in a run pools are mined.

    Between `start` and `end`, both fractions of the run, pools of `pool` batches are mined. Plain
    batches are added so that `fraction` of the batches trained on there are mined. A pool lies
    within one epoch, so that it has no pair twice; the rest of an epoch is plain.
    """

    # steps of the whole run
    steps: int
    # batches in a pool, and the number of mined batches made from it
    pool: int
    kept: int
    fraction: float
    start: float
    end: float
    # batches in an epoch, after which pairs are repeated
    per_epoch: int

    def stretches(self) -> list[Stretch]:
        """The stretches of the whole run, in order; adjacent plain stretches are merged."""
        stretches = list[Stretch]()
        step = 0
        source = 0
        mined = 0
        plain = 0
        while step < self.steps:
            # number of plain batches that keeps the fraction of mined batches so far at `fraction`
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

            # add one plain batch
            if not stretches or stretches[-1].pool:
                stretches.append(Stretch(step, source, 0, 0, 0))
            stretches[-1] = stretches[-1]._replace(plain=stretches[-1].plain + 1)
            step += 1
            source += 1

        return stretches


def turns(stretch: Stretch, generator: np.random.Generator) -> list[bool]:
    """(steps,) for each step of a mined stretch, whether its batch is mined.

    Half of the plain batches come first, and are trained on while the plan is made. The other half
    is mixed with the mined batches at random.
    """
    lead = stretch.plain // 2

    # True for mined batches, to be shuffled among the remaining plain ones
    is_mined = np.arange(stretch.steps - lead) < stretch.kept
    is_mined = generator.permutation(is_mined)
    return [False] * lead + [bool(each) for each in is_mined]
