"""One dual encoder over any pair of towers: pairs in, unit embeddings, a scale and a bias out."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsmall.batch import Embeddings, Pairs
from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.chunks import in_chunks

# CLIP's bound: beyond it float32 logits lose the small differences
MAX_LOG_SCALE = math.log(100.0)


class DualEncoder(nn.Module):
    """Towers, a temperature and a bias: pairs in, unit embeddings out.

    Args:
        towers: a module with `image(pixels)` and `text(ids)`: normalised (B, 3, H, W) and token ids
            (B, L) -> (B, D).
        spec: the towers' image size, mean and std.
        logit_scale: the positive factor of the cosines at the start (1/temperature).
        logit_bias: at the start; learned only if `learn_bias`.
        heads: what the objective asks for beside, by name.
        through: the head in `heads` through which this model retrieves ("" = plainly): see
            `encode_image`.
        largest_scale: which a scale that is learned never passes: CLIP's 100, or where weights came
            with a larger one.
        chunk_size: pairs that go through the towers at a time; 0 = all. Never changes a result.
    """

    def __init__(
        self,
        towers: nn.Module,
        spec: ImageSpec,
        logit_scale: float,
        logit_bias: float,
        learn_bias: bool,
        learn_scale: bool = True,
        heads: Mapping[str, nn.Module] | None = None,
        through: str = "",
        chunk_size: int = 0,
        largest_scale: float = 100.0,
    ) -> None:
        super().__init__()
        self.towers: Any = towers
        self.spec = spec
        self.heads: Any = nn.ModuleDict(heads)
        self.through = through
        self.chunk_size = chunk_size
        self.largest_log_scale = math.log(largest_scale)
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(logit_scale)), requires_grad=learn_scale
        )
        self.logit_bias = nn.Parameter(torch.tensor(logit_bias), requires_grad=learn_bias)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1) * 255, persistent=False)

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> what the image tower takes."""
        return torch.sub(pixels, self.mean).div_(self.std)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> unit rows, at least float32, to be compared with `encode_text`: (B,
        D), or what the head that the model retrieves through makes of it."""
        image = self.image_outputs(pixels, self.towers)
        return self.heads[self.through].retrieve_image(image) if self.through else unit(image)

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, L) token ids -> unit rows as of `encode_image`."""
        text = self.text_outputs(ids, self.towers)
        return self.heads[self.through].retrieve_text(text) if self.through else unit(text)

    def outputs(self, pairs: Pairs, towers: Any) -> tuple[Tensor, Tensor]:
        """(B, D) and (B, D), not normalised: what `towers` (ours, or an average of them) make of
        the pairs.
        """
        device = self.mean.device
        image = in_chunks(
            lambda pixels: self.image_outputs(pixels, towers), pairs.image, self.chunk_size, device
        )
        return image, in_chunks(
            lambda ids: self.text_outputs(ids, towers), pairs.text, self.chunk_size, device
        )

    def image_outputs(self, pixels: Tensor, towers: Any) -> Tensor:
        """(B, D), not normalised. Features that a frozen tower made beforehand, (B, D), are it
        already.
        """
        image: Tensor = pixels if _made(pixels) else towers.image(self.normalised(pixels))
        return image

    def text_outputs(self, ids: Tensor, towers: Any) -> Tensor:
        """The same for token ids, (B, L)."""
        text: Tensor = ids if _made(ids) else towers.text(ids)
        return text

    def forward(self, pairs: Pairs) -> Embeddings:
        image, text = self.outputs(pairs, self.towers)
        extra: dict[str, Tensor] = {}
        for head in self.heads.values():
            extra |= head(pairs, image, text, partial(self.outputs, pairs))
        return Embeddings(
            image=unit(image),
            text=unit(text),
            index=pairs.index,
            caption_hash=pairs.caption_hash,
            logit_scale=self.logit_scale.exp(),
            logit_bias=self.logit_bias,
            extra=extra,
        )

    def train(self, mode: bool = True) -> "DualEncoder":
        """Frozen parts stay in evaluation mode: what is not trained has no dropout, and no batch
        statistics.
        """
        super().train(mode)
        for part in self.towers.modules():
            if mode and frozen(part):
                part.eval()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        """What an optimizer step is followed by: the scale's bounds, and what the heads do."""
        self.clamp_logit_scale()
        for head in self.heads.values():
            head.after_step(self.towers)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep 1 ≤ scale ≤ 100, if it is learned. Called after each step: a clamp in forward would
        kill the gradient at the bound."""
        if self.logit_scale.requires_grad:
            self.logit_scale.clamp_(0.0, self.largest_log_scale)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _made(given: Tensor) -> bool:
    return given.ndim == 2 and given.is_floating_point()


def frozen(part: nn.Module) -> bool:
    """Whether it has parameters, and none of them trains."""
    trains = [parameter.requires_grad for parameter in part.parameters()]
    return bool(trains) and not any(trains)
