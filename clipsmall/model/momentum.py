"""Moving average of the towers, which makes the targets of BYOL and the keys of MoCo."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """average ← m · average + (1 − m) · towers after every step, starting as a copy.

    Also known as: exponential moving average (EMA), mean teacher, momentum encoder.

    With `steps` above 0, m goes from `momentum` to 1: 1 − m = (1 − momentum)(1 + cos(π step/steps))
    / 2 (BYOL, Grill et al. 2020, arXiv 2006.07733, §3.2); with 0 it is constant. Floating buffers
    are averaged like parameters (the references average parameters only, and keep the running
    statistics of a fresh network), integer buffers are copied.

    The average is always in evaluation mode: targets have no dropout, and need no batch statistics,
    which each CPU rank would compute from its own rows only.

    Args:
        towers: to be copied and followed.
        momentum: m at the start.
        steps: of the run, over which m grows to 1; 0 = m is constant.
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
        """One step towards the towers."""
        # 1 − m, computed on the device, so that the host does not wait
        step_size = torch.full_like(self.step, 1 - self.momentum, dtype=torch.float32)
        if self.steps:
            done = (self.step / self.steps).clamp(max=1)
            step_size *= (1 + torch.cos(math.pi * done)) / 2

        parameters = zip(self.towers.parameters(), towers.parameters(), strict=True)
        for mine, theirs in parameters:
            mine.lerp_(theirs, step_size.to(mine.dtype))

        buffers = zip(self.towers.buffers(), towers.buffers(), strict=True)
        for kept, new in buffers:
            # counters
            if not kept.is_floating_point():
                kept.copy_(new)
                continue
            moved = kept.lerp(new, step_size.to(kept.dtype))
            # equal entries stay: lerp would make NaN of an attention mask's −inf
            is_equal = kept == new
            kept.copy_(torch.where(is_equal, kept, moved))
        self.step += 1
