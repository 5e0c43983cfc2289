"""Objectives, the losses: `objective(rows, columns) -> {"loss": Tensor, ...reported terms}`.

`rows` are local, my rank's embeddings; `columns` are gathered, everybody's. The loss is the mean
over my rows, or the same on all ranks; an objective knows no rank and no number of ranks. Most are
functions; those with a memory are modules whose buffers, the same on every rank, go into the
checkpoint.

To add one: write a file like `spectral.py` (the function, its options in its signature, a `SPEC`)
and name it in `OBJECTIVES`. Config, `--help`, builders and tests read the rest from there; what it
should compute is stated once more, densely, in `tests/dense.py`.
"""

from collections.abc import Callable

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives import (
    align_uniform,
    barlow,
    bce,
    byol,
    dcl,
    dclw,
    gcl,
    hsic,
    neighbours,
    sigmoid,
    simsiam,
    sinkhorn,
    sinkhorn_targets,
    softmax,
    spectral,
    superclass,
    swav,
    triplet,
    vicreg,
    vse,
)
from clipsmall.objectives.combination import Combination
from clipsmall.objectives.queued import QUEUES, QueueSpec, queue_sections
from clipsmall.objectives.spec import ObjectiveSpec, sections_of

Objective = Callable[[Embeddings, Embeddings], dict[str, Tensor]]

OBJECTIVES: dict[str, ObjectiveSpec] = {
    "softmax": softmax.SPEC,
    "dcl": dcl.SPEC,
    "dclw": dclw.SPEC,
    "sigmoid": sigmoid.SPEC,
    "triplet": triplet.SPEC,
    "vse++": vse.SPEC,
    "spectral": spectral.SPEC,
    "align_uniform": align_uniform.SPEC,
    "sinkhorn": sinkhorn.SPEC,
    "sinkhorn_targets": sinkhorn_targets.SPEC,
    "bce": bce.SPEC,
    "gcl": gcl.SPEC,
    "nn": neighbours.SPEC,
    "simsiam": simsiam.SPEC,
    "byol": byol.SPEC,
    "swav": swav.SPEC,
    "barlow": barlow.SPEC,
    "vicreg": vicreg.SPEC,
    "hsic": hsic.SPEC,
    "superclass": superclass.SPEC,
}

# the config's sections by name: one of every objective's `section`, then one of every queue
SECTIONS = sections_of(OBJECTIVES) | queue_sections()

__all__ = [
    "OBJECTIVES",
    "QUEUES",
    "SECTIONS",
    "Combination",
    "Objective",
    "ObjectiveSpec",
    "QueueSpec",
]
