"""The trained model: two towers, logit_scale, logit_bias, and heads."""

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

# CLIP's bound of the scale; above it, float32 logits lose small differences
MAX_LOG_SCALE = math.log(100.0)


class DualEncoder(nn.Module):
    """Towers, a temperature and a bias: pairs in, unit embeddings out.

    Args:
        towers: a module with `image(pixels)` and `text(ids)`: normalised (B, 3, H, W) and token ids
            (B, L) -> (B, D); see `Towers`.
        spec: the towers' image size, mean and std.
        logit_scale: initial scale, 1/temperature.
        logit_bias: initial bias.
        learn_bias: whether the bias trains.
        learn_scale: whether the scale trains.
        heads: further modules that the objective needs, by name.
        retrieval_head: the head in `heads` whose outputs are used for retrieval and zero-shot
            classification; "" = the towers' own outputs.
        chunk_size: pairs encoded at a time; 0 = all. Does not change results.
        largest_scale: upper bound of a trained scale: CLIP's 100, or more if the pretrained weights
            have a larger scale.
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
        retrieval_head: str = "",
        chunk_size: int = 0,
        largest_scale: float = 100.0,
    ) -> None:
        super().__init__()
        self.towers: Any = towers
        self.spec = spec
        self.heads: Any = nn.ModuleDict(heads)
        self.retrieval_head = retrieval_head
        self.chunk_size = chunk_size
        self.largest_log_scale = math.log(largest_scale)
        log_scale = torch.tensor(math.log(logit_scale))
        self.logit_scale = nn.Parameter(log_scale, requires_grad=learn_scale)
        self.logit_bias = nn.Parameter(torch.tensor(logit_bias), requires_grad=learn_bias)
        # mean and std for pixels from 0 to 255
        mean = torch.tensor(spec.mean).view(3, 1, 1) * 255
        std = torch.tensor(spec.std).view(3, 1, 1) * 255
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise pixels (B, 3, H, W), uint8, for the image tower."""
        return torch.sub(pixels, self.mean).div_(self.std)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit embeddings of images, comparable with those of `encode_text`.

        Args:
            pixels: (B, 3, H, W) uint8.

        Returns:
            (B, D), at least float32; with a retrieval head, the embeddings that it returns.
        """
        image = self.image_outputs(pixels, self.towers)
        if self.retrieval_head:
            head_rows: Tensor = self.heads[self.retrieval_head].retrieve_image(image)
            return head_rows
        return unit(image)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Unit embeddings of token ids (B, L), comparable with those of `encode_image`."""
        text = self.text_outputs(ids, self.towers)
        if self.retrieval_head:
            head_rows: Tensor = self.heads[self.retrieval_head].retrieve_text(text)
            return head_rows
        return unit(text)

    def outputs(self, pairs: Pairs, towers: Any) -> tuple[Tensor, Tensor]:
        """Tower outputs for images and texts, in chunks: (B, D) and (B, D), not normalised.

        Args:
            towers: this model's towers, or a moving average of them.
        """
        device = self.mean.device
        image_tower = partial(self.image_outputs, towers=towers)
        text_tower = partial(self.text_outputs, towers=towers)
        image = in_chunks(image_tower, pairs.image, self.chunk_size, device)
        text = in_chunks(text_tower, pairs.text, self.chunk_size, device)
        return image, text

    def image_outputs(self, pixels: Tensor, towers: Any) -> Tensor:
        """(B, D) from images (B, 3, H, W) or cached features (B, D); not normalised."""
        if _is_features(pixels):
            return pixels
        image: Tensor = towers.image(self.normalised(pixels))
        return image

    def text_outputs(self, ids: Tensor, towers: Any) -> Tensor:
        """(B, D) from token ids (B, L) or cached features (B, D); not normalised."""
        if _is_features(ids):
            return ids
        text: Tensor = towers.text(ids)
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
        """As in any module, but frozen parts of the towers stay in evaluation mode.

        So frozen parts use no dropout and no batch statistics.
        """
        super().train(mode)
        for part in self.towers.modules():
            if mode and frozen(part):
                part.eval()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after each optimizer step: clamps the scale and updates the heads."""
        self.clamp_logit_scale()
        for head in self.heads.values():
            head.after_step(self.towers)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the scale to 1 ≤ scale ≤ `largest_scale`, if it trains.

        Done after each step, because a clamp in `forward` would have gradient 0 at the bound.
        """
        if self.logit_scale.requires_grad:
            self.logit_scale.clamp_(0.0, self.largest_log_scale)


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, at least float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _is_features(given: Tensor) -> bool:
    """Whether a batch holds cached features of a frozen tower, not pixels or token ids."""
    return given.ndim == 2 and given.is_floating_point()


def frozen(part: nn.Module) -> bool:
    """Whether a module has parameters, but none that train."""
    trains = [parameter.requires_grad for parameter in part.parameters()]
    return bool(trains) and not any(trains)
