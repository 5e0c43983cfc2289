"""Objectives: `objective(rows, columns) -> {"loss": Tensor, ...reported terms}`.

`rows` are my rank's embeddings, `columns` everybody's; the loss is the mean over my rows, or the
same on all ranks. An objective knows no rank and no world size. Most are functions; those with a
memory are modules whose buffers, the same on every rank, go into the checkpoint. To add one: write
it, name it here, give it a section in config_objectives.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives.align_uniform import align_uniform
from clipsmall.objectives.barlow import barlow
from clipsmall.objectives.bce import Bce
from clipsmall.objectives.byol import byol
from clipsmall.objectives.combination import Combination
from clipsmall.objectives.dcl import dcl, dclw
from clipsmall.objectives.gcl import Gcl
from clipsmall.objectives.hsic import hsic
from clipsmall.objectives.neighbours import Neighbours
from clipsmall.objectives.sigmoid import sigmoid
from clipsmall.objectives.simsiam import simsiam
from clipsmall.objectives.sinkhorn import sinkhorn
from clipsmall.objectives.sinkhorn_targets import sinkhorn_targets
from clipsmall.objectives.softmax import softmax
from clipsmall.objectives.spectral import spectral
from clipsmall.objectives.superclass import Superclass
from clipsmall.objectives.swav import Swav
from clipsmall.objectives.triplet import VsePlusPlus, triplet
from clipsmall.objectives.vicreg import vicreg

Objective = Callable[[Embeddings, Embeddings], dict[str, Tensor]]


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective, and what it asks of the model.

    `make` is a function of (rows, columns, **options), or a module class of (setting, **options).
    """

    make: Callable[..., Any]
    # of the config, with its options
    section: str
    # name in HEADS -> which options are the head's
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # logit_scale at the start; None: not learned (DDP refuses what gets no gradient)
    scale: float | None = 1 / 0.07
    # where that depends on the options
    learns_scale: Callable[[Mapping[str, Any]], bool] = lambda options: True
    bias: Callable[[int], float] | None = (
        # logit_bias at the start, by the columns; None: not learned
        None
    )
    # False: trains one tower only, a second term
    alone: Callable[[Mapping[str, Any]], bool] = lambda options: True
    # the head that retrieval needs, where the towers' own features do not match: "" = none, None =
    # it matches nothing
    through: Callable[[Mapping[str, Any]], str | None] = lambda options: ""
    # compares with columns that travel, too
    ring: bool = True
    # compares with more columns than the batch, too
    queue: bool = False


def log_odds(columns: int) -> float:
    """Of a true pair among N columns. SigLIP's −10 is the same for N = 22,027."""
    return -math.log(columns - 1)


def predictors(options: Mapping[str, Any]) -> str:
    return "predictors"


def projectors(options: Mapping[str, Any]) -> str:
    return "projectors" if options["widths"] else ""


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "softmax": ObjectiveSpec(softmax, "softmax", queue=True),
    "dcl": ObjectiveSpec(dcl, "dcl", queue=True),
    "dclw": ObjectiveSpec(dclw, "dcl", queue=True),
    "sigmoid": ObjectiveSpec(sigmoid, "sigmoid", scale=10.0, bias=log_odds, queue=True),
    "triplet": ObjectiveSpec(triplet, "triplet", scale=None, queue=True),
    "vse++": ObjectiveSpec(VsePlusPlus, "triplet", scale=None, ring=False, queue=True),
    "spectral": ObjectiveSpec(spectral, "spectral", scale=None, queue=True),
    "align_uniform": ObjectiveSpec(align_uniform, "align_uniform", scale=None),
    "sinkhorn": ObjectiveSpec(sinkhorn, "sinkhorn"),
    "sinkhorn_targets": ObjectiveSpec(
        sinkhorn_targets,
        "sinkhorn_targets",
        heads={"momentum": ("momentum", "schedule"), "soft_scale": ()},
        ring=False,
    ),
    "bce": ObjectiveSpec(Bce, "bce", scale=10.0, bias=lambda columns: 0.0, queue=True),
    "gcl": ObjectiveSpec(
        Gcl,
        "gcl",
        learns_scale=lambda options: options["variant"] in ("fastclip_v0", "fastclip_v3"),
        queue=True,
    ),
    "nn": ObjectiveSpec(Neighbours, "nn", alone=lambda options: options["images"]),
    "simsiam": ObjectiveSpec(
        simsiam, "simsiam", heads={"predictors": ("hidden",)}, scale=None, through=predictors
    ),
    "byol": ObjectiveSpec(
        byol,
        "byol",
        heads={"predictors": ("hidden",), "momentum": ("momentum", "schedule")},
        scale=None,
        through=predictors,
    ),
    "swav": ObjectiveSpec(Swav, "swav", heads={"prototypes": ("prototypes",)}, scale=None),
    "barlow": ObjectiveSpec(
        barlow, "barlow", heads={"projectors": ("widths",)}, scale=None, through=projectors
    ),
    "vicreg": ObjectiveSpec(
        vicreg, "vicreg", heads={"projectors": ("widths",)}, scale=None, through=projectors
    ),
    "hsic": ObjectiveSpec(hsic, "hsic", scale=None),
    "superclass": ObjectiveSpec(
        Superclass,
        "superclass",
        heads={"tokens": ()},
        scale=None,
        alone=lambda options: False,
        through=lambda options: None,
    ),
}

__all__ = ["OBJECTIVES", "Combination", "Objective", "ObjectiveSpec"]
