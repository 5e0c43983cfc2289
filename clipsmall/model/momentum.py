"""A copy of the towers that follows them slowly: what targets and queues are made with."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """average ← m · average + (1 − m) · towers after every step, starting as a copy.

    With `steps`, m goes from `momentum` to 1: 1 − m = (1 − momentum)(1 + cos(π step/steps))/2
    (BYOL, Grill et al. 2020, arXiv 2006.07733, §3.2); with 0 it is constant. Floating buffers are
    averaged like parameters (the references copy parameters only, and keep the running statistics
    of a fresh network), those of integers copied.

    Always in evaluation mode: targets have no dropout, and need no batch statistics, which each CPU
    rank would make of its own rows only.
    """

    def __init__(self, towers: nn.Module, momentum: float, steps: int) -> None:
        super().__init__()
        self.towers: Any = copy.deepcopy(towers).requires_grad_(False).eval()
        self.momentum = momentum
        self.steps = steps
        self.step: Tensor
        self.register_buffer("step", torch.tensor(0))

    def train(self, mode: bool = True) -> "MovingAverage":
        super().train(mode)
        self.towers.eval()
        return self

    @torch.no_grad()
    def update(self, towers: nn.Module) -> None:
        # on the device: nothing waits
        share = torch.full_like(self.step, 1 - self.momentum, dtype=torch.float32)
        if self.steps:
            share *= (1 + torch.cos(math.pi * (self.step / self.steps).clamp(max=1))) / 2
        for mine, theirs in zip(self.towers.parameters(), towers.parameters(), strict=True):
            mine.lerp_(theirs, share.to(mine.dtype))
        for kept, new in zip(self.towers.buffers(), towers.buffers(), strict=True):
            # equal ones stay: an attention mask's −inf would become NaN
            if kept.is_floating_point():
                kept.copy_(torch.where(kept == new, kept, kept.lerp(new, share.to(kept.dtype))))
            else:
                kept.copy_(new)
        self.step += 1
