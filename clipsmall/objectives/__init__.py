"""Objectives: `objective(rows, columns) -> {"loss": Tensor, ...reported terms}`.

`rows` are my rank's embeddings, `columns` everybody's; the loss is the mean over my rows. An objective knows no
rank and no world size: adding one is writing such a function and naming it here.
"""

from collections.abc import Callable

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives.sigmoid import sigmoid
from clipsmall.objectives.sinkhorn import sinkhorn
from clipsmall.objectives.softmax import softmax

Objective = Callable[[Embeddings, Embeddings], dict[str, Tensor]]

OBJECTIVES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sinkhorn": sinkhorn,
}
USES_BIAS = {"sigmoid"}  # elsewhere logit_bias is frozen: DDP refuses parameters that get no gradient

__all__ = ["OBJECTIVES", "USES_BIAS", "Objective", "sigmoid", "sinkhorn", "softmax"]
