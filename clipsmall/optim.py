"""AdamW without decay where it hurts, warm-up and cosine by pairs seen, and one guarded step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms, biases, logit_scale and logit_bias do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    free = {name for name, p in named if p.ndim <= 1 or name.endswith(("logit_scale", "logit_bias"))}
    return [
        {"params": [p for name, p in named if name not in free], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in free], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    fused = any(p.is_cuda for p in model.parameters())
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=fused)


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Linear from 1/warmup to 1 over `warmup` steps, then half a cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))

    return LambdaLR(optimizer, factor)


def scaled_lr(lr: float, batch_size: int, rule: str) -> float:
    """`none`: lr as given; `sqrt`: lr is for batch 256 and grows with √(B/256), as suits Adam."""
    return lr * math.sqrt(batch_size / 256) if rule == "sqrt" else lr


class NonFiniteError(ValueError):
    """A loss or gradient is not a number; weights were not touched."""


def check_finite(loss: Tensor, grad_norm: Tensor, index: Tensor, scaled: bool) -> None:
    """Stop before the optimizer writes NaN into every weight.

    With fp16's GradScaler (`scaled`) a non-finite gradient is an overflow that the scaler skips; a non-finite loss
    is an error everywhere. The gradient norm is the same on all ranks, so all stop together.

    Raises:
        NonFiniteError: naming the first pairs of my batch.
    """
    if not torch.isfinite(loss) or not (scaled or torch.isfinite(grad_norm)):
        raise NonFiniteError(
            f"loss {loss.item()}, gradient norm {float(grad_norm)}: not finite. Weights are untouched; lower optim.lr "
            f"or optim.clip, or look at the pairs with index {index[:8].tolist()} … of this batch"
        )
