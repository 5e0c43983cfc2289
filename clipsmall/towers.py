"""One dual encoder over any pair of towers: pairs in, unit embeddings, a scale and a bias out."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsmall.batch import Embeddings, Pairs
from clipsmall.preprocess import ImageSpec

MAX_LOG_SCALE = math.log(100.0)  # CLIP's bound: beyond it float32 logits lose the small differences


class DualEncoder(nn.Module):
    """Towers, a temperature and a bias: pairs in, unit embeddings out.

    Args:
        towers: a module with `image(pixels)` and `text(ids)`: normalised (B, 3, H, W) and token ids (B, L) -> (B, D).
        spec: the towers' image size, mean and std.
        logit_scale: the positive factor of the cosines at the start (1/temperature).
        logit_bias: at the start; learned only if `learn_bias`.
    """

    def __init__(
        self, towers: nn.Module, spec: ImageSpec, logit_scale: float, logit_bias: float, learn_bias: bool
    ) -> None:
        super().__init__()
        self.towers: Any = towers
        self.spec = spec
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(logit_bias), requires_grad=learn_bias)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1) * 255, persistent=False)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) unit rows, at least float32."""
        return unit(self.towers.image(torch.sub(pixels, self.mean).div_(self.std)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, L) token ids -> (B, D) unit rows, at least float32."""
        return unit(self.towers.text(ids))

    def forward(self, pairs: Pairs) -> Embeddings:
        return Embeddings(
            image=self.encode_image(pairs.image),
            text=self.encode_text(pairs.text),
            index=pairs.index,
            caption_hash=pairs.caption_hash,
            logit_scale=self.logit_scale.exp(),
            logit_bias=self.logit_bias,
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep 1 ≤ scale ≤ 100. Called after each step: a clamp in forward would kill the gradient at the bound."""
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
