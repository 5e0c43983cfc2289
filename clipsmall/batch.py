"""What flows through training: decoded pairs, what the towers make of them, and how far a run has
come.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """A decoded batch of B image-text pairs: this rank's share of the global batch."""

    # (B, 3, H, W) uint8; the towers normalise
    image: Tensor
    # (B, L) int64 token ids
    text: Tensor
    # the pair's stable number in the data set, unique within a global batch: (B,) int64
    index: Tensor  # type: ignore[assignment]
    # (B,) int64, hash of the normalised caption: equal captions are no negatives
    caption_hash: Tensor

    def to(self, device: torch.device, images: bool = True) -> "Pairs":
        """All of it, or all but the images: those of a model that works in chunks travel one by
        one.
        """
        here = Pairs(
            *(
                field if field is self.image else field.to(device, non_blocking=True)
                for field in self
            )
        )
        return here._replace(image=self.image.to(device, non_blocking=True)) if images else here


class Embeddings(NamedTuple):
    """What the towers make of B pairs. As `rows`: my own; as `columns`: those of the whole global
    batch.
    """

    # (B, D), unit length
    image: Tensor
    # (B, D), unit length
    text: Tensor
    index: Tensor  # type: ignore[assignment]  # (B,) int64
    # (B,) int64
    caption_hash: Tensor
    # () positive, already exponentiated; multiplies every cosine
    logit_scale: Tensor
    # () added to every scaled cosine
    logit_bias: Tensor
    # what the objective asked the model for beside; see heads
    extra: Mapping[str, Tensor] = MappingProxyType({})
    # of columns that a queue made: the plain batch's, through which gradients flow
    live: "Embeddings | None" = None
    # of columns: the first so many meet their own row only
    own_only: int = 0


@dataclass
class Progress:
    """How far a run has come. Pairs seen is the unit; an epoch is never inferred from a length."""

    step: int = 0
    pairs: int = 0

    def advance(self, pairs: int) -> None:
        self.step += 1
        self.pairs += pairs

    def state_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class RunContext:
    """What heads and objectives with a memory may know of the run they are built for."""

    # D of the embeddings
    width: int
    # pairs that are compared with one another: a step's over all ranks, or a part of them
    batch_size: int
    # times the objective is called in the whole run
    steps: int
    seed: int = 0
    # to be copied by a head that keeps a moving average of them
    towers: Any = None
    # token ids are below it; 0 = unknown
    vocabulary: int = 0
    # (n,) ascending `index` of all training pairs; None where they are not known (a stream)
    ids: Tensor | None = None
