"""What flows through training: decoded pairs, their embeddings, and the progress of a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """A decoded batch of B image-text pairs: this rank's part of the global batch."""

    # (B, 3, H, W) uint8; the towers normalise
    image: Tensor
    # (B, L) int64 token ids
    text: Tensor
    # (B,) int64, the pair's stable number in the data set, unique within a global batch
    index: Tensor  # type: ignore[assignment]
    # (B,) int64, hash of the normalised caption: pairs with equal captions are no negatives
    caption_hash: Tensor

    def to(self, device: torch.device, images: bool = True) -> "Pairs":
        """A copy on the device.

        Args:
            device: where to.
            images: False leaves the images where they are: a model that works in chunks moves them
                chunk by chunk.
        """
        return Pairs(
            image=self.image.to(device, non_blocking=True) if images else self.image,
            text=self.text.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            caption_hash=self.caption_hash.to(device, non_blocking=True),
        )


class Embeddings(NamedTuple):
    """What the towers make of pairs: unit embeddings, scale, bias, and the heads' outputs.

    Objectives are called with two of these, `objective(rows, columns)`:

    - **rows** are *local*: the b pairs of this rank, over which its loss is a mean.
    - **columns** are *gathered*: all N pairs that a row is compared with, the global batch of all
      ranks, and with a queue those of former steps, too.

    Row i of one process is column i as well; with more ranks `index` says which column is a row's
    own pair, its positive. So no objective needs to know a rank or the number of ranks.
    """

    # (B, D), unit length
    image: Tensor
    # (B, D), unit length
    text: Tensor
    # (B,) int64, see Pairs
    index: Tensor  # type: ignore[assignment]
    # (B,) int64, see Pairs
    caption_hash: Tensor
    # () positive, already exponentiated (1/temperature); multiplies every cosine
    logit_scale: Tensor
    # () added to every scaled cosine
    logit_bias: Tensor
    # entries by name, which the model's heads deliver
    extra: Mapping[str, Tensor] = MappingProxyType({})
    # columns with a queue: the columns of the batch alone, through which gradients flow
    live: "Embeddings | None" = None
    # columns: the first `own_only` are used as positives, never as negatives
    own_only: int = 0

    @classmethod
    def of(
        cls,
        image: Tensor,
        text: Tensor,
        logit_scale: float = 1 / 0.07,
        logit_bias: float = 0.0,
        **extra: Tensor,
    ) -> "Embeddings":
        """Embeddings of different pairs with different captions, for a single process.

        Args:
            image: (B, D) image features, of any length: they are normalised.
            text: (B, D) text features; row i belongs to image i.
            logit_scale: factor of the cosines.
            logit_bias: added to the scaled cosines.
            extra: what the heads of an objective deliver.
        """
        numbers = torch.arange(len(image), device=image.device)
        return cls(
            image=F.normalize(image, dim=-1),
            text=F.normalize(text, dim=-1),
            index=numbers,
            caption_hash=numbers,
            logit_scale=torch.tensor(logit_scale, device=image.device),
            logit_bias=torch.tensor(logit_bias, device=image.device),
            extra=extra,
        )


@dataclass
class Progress:
    """How far a run has come, in steps and in pairs seen.

    Pairs seen are the unit of everything; an epoch is never inferred from a length.
    """

    step: int = 0
    pairs: int = 0

    def advance(self, pairs: int) -> None:
        """One step, over so many pairs."""
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
    # how often the objective is called in the whole run
    steps: int
    seed: int = 0
    # the model's, to be copied by a head that keeps a moving average of them
    towers: Any = None
    # token ids are below it; 0 = unknown
    vocabulary: int = 0
    # (n,) ascending `index` of all training pairs; None where they are not known (a stream)
    ids: Tensor | None = None
