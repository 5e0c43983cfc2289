"""The data types of training: decoded pairs, their embeddings, and a run's progress."""

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
    # (B,) int64, hash of the normalised caption; pairs with equal captions are no negatives
    caption_hash: Tensor

    def to(self, device: torch.device, images: bool = True) -> "Pairs":
        """A copy on the device.

        Args:
            device: the target device.
            images: False leaves the images where they are, for a model that encodes a batch in
                chunks and moves the images chunk by chunk.
        """
        return Pairs(
            image=self.image.to(device, non_blocking=True) if images else self.image,
            text=self.text.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            caption_hash=self.caption_hash.to(device, non_blocking=True),
        )


class Embeddings(NamedTuple):
    """Unit embeddings of image-text pairs, with logit scale, logit bias and the heads' outputs.

    Objectives are called with two of these, `objective(rows, columns)`:

    - **rows** are *local*: the b pairs of this rank. The loss on a rank is the mean over its rows.
    - **columns** are *gathered*: all N pairs that a row is compared with. These are the global
      batch (the pairs of all ranks) and, with a queue, pairs of earlier steps as well.

    In a single process the positive of row i is column i. With several ranks it is the column with
    the same `index` as the row, so no objective needs to know a rank or the number of ranks.
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
    # further outputs of the model's heads, by name
    extra: Mapping[str, Tensor] = MappingProxyType({})
    # set on columns when there is a queue: the batch's own columns, which carry gradients
    live: "Embeddings | None" = None
    # set on columns: the first `own_only` of them serve as positives only, never as negatives
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
            image: (B, D) image features; they are normalised here.
            text: (B, D) text features; row i belongs to image i.
            logit_scale: the cosines are multiplied by it.
            logit_bias: added to the scaled cosines.
            extra: outputs of an objective's heads, by name.
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
    """How far a run has come, in steps and in samples (pairs) seen.

    The length of a run and its schedules are counted in pairs seen, not in epochs.
    """

    step: int = 0
    pairs: int = 0

    def advance(self, pairs: int) -> None:
        """Count one step over `pairs` pairs."""
        self.step += 1
        self.pairs += pairs

    def state_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class RunContext:
    """Facts about the run, given to heads and to stateful objectives when they are built."""

    # D, the width of the embeddings
    width: int
    # pairs compared with one another: the global batch, or one part of it under `accumulate`
    batch_size: int
    # number of calls of the objective in the whole run
    steps: int
    seed: int = 0
    # the model's towers, which a head with a moving average copies
    towers: Any = None
    # size of the vocabulary: every token id is smaller; 0 = unknown
    vocabulary: int = 0
    # (n,) `index` of all training pairs, ascending; None for streamed data
    ids: Tensor | None = None
