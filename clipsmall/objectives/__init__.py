"""Objectives, the losses: `objective(rows, columns) -> {"loss": Tensor, ...reported terms}`.

`rows` are local, this rank's embeddings; `columns` are gathered, those of all ranks. The loss is
the mean over local rows, or the same on all ranks; no objective depends on the rank or the number
of ranks. Most objectives are functions. Those with state are modules, whose buffers are the same on
every rank and are saved in checkpoints.

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
