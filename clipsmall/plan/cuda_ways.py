"""How a CUDA device would compute what runs abstractly as if on a CPU, as far as memory differs.

Abstract tensors cannot lie on a GPU where there is none: PyTorch's autograd engine asks the driver
for its streams (2.14: "hasPrimaryContext expects a valid device index"). So they lie on the CPU,
and towers find other functions in torch.nn.functional: those that stand for the kernels of CUDA. (A
TorchFunctionMode would not see what is called inside
another function of PyTorch: the attention in nn.MultiheadAttention, or whatever a backward pass
makes anew.)
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.distributed.tiles import TILE
from clipsmall.plan.meter import HOST, Meter

# of what CUDA's autocast computes in float32 and the CPU's does not (PyTorch's list "CUDA Ops that
# can autocast to float32"), those that towers are made of: what they keep for the backward pass has
# twice the bytes
WIDE = ("layer_norm", "group_norm", "softmax", "log_softmax", "normalize")


@contextmanager
def cuda_ways(meter: Meter) -> Iterator[None]:
    """Inside, kernels are chosen as on CUDA, the loss has its tiles, and what is sent to the host
    is not counted.
    """

    def to_host(x: Tensor) -> Tensor:
        with meter.labelled(HOST):
            return torch.clone(x)

    with ExitStack() as inside:
        inside.enter_context(patch.dict(TILE, cpu=TILE["cuda"]))
        inside.enter_context(patch.object(Tensor, "cpu", to_host))
        inside.enter_context(patch.object(F, "scaled_dot_product_attention", lean_attention))
        inside.enter_context(patch.object(F, "dropout", kept_as_bytes))
        for name in WIDE:
            inside.enter_context(patch.object(F, name, in_float32(getattr(F, name))))
        yield


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(widened(each) for each in args)
            kwargs = {name: widened(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return wide


def widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


def lean_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The memory-efficient kernel, which a V100 has too: (B, heads, L, E) -> the same; keeps a log
    sum for each row.
    """
    qkv = query, key, value
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        qkv = query.to(narrow), key.to(narrow), value.to(narrow)
        attn_mask = (
            attn_mask
            if attn_mask is None or attn_mask.dtype == torch.bool
            else attn_mask.to(narrow)
        )
    if attn_mask is not None:
        bias = (
            attn_mask
            if attn_mask.dtype != torch.bool
            else torch.zeros_like(attn_mask, dtype=qkv[0].dtype)
        )
        attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
    attend: Callable[..., Any] = torch.ops.aten._scaled_dot_product_efficient_attention
    made: Tensor = attend(
        *qkv, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return made


def kept_as_bytes(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout that remembers a byte an entry; the CPU's keeps a mask of the input's kind."""
    if not training or not p:
        return x
    made: Tensor = torch.native_dropout(x, p, True)[0]
    return made
