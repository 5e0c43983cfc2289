"""Makes abstract CPU tensors use as much memory as CUDA's kernels would, by patching functions.

Without a GPU, abstract tensors cannot be on "cuda": PyTorch's autograd engine asks the driver for
its streams (2.14: "hasPrimaryContext expects a valid device index"). So they are on the CPU, and
functions of torch.nn.functional are replaced by ones that keep what CUDA's kernels keep. (A
TorchFunctionMode would miss calls from inside other PyTorch functions: the attention in
nn.MultiheadAttention, or what a backward pass recomputes.)
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.distributed.similarity import TILE
from clipsmall.plan.meter import HOST, Meter

# Functions that autocast computes in float32 on CUDA but not on the CPU (PyTorch's list "CUDA Ops
# that can autocast to float32"): what they save for the backward pass takes twice the bytes.
FLOAT32_ON_CUDA = ("layer_norm", "group_norm", "softmax", "log_softmax", "normalize")


@contextmanager
def as_on_cuda(meter: Meter) -> Iterator[None]:
    """Inside, kernels and the loss's tile size are those of CUDA.

    A tensor copied to the host by `.cpu()` is not counted.
    """

    def to_host(x: Tensor) -> Tensor:
        with meter.labelled(HOST):
            return torch.clone(x)

    attention = memory_efficient_attention
    with ExitStack() as inside:
        inside.enter_context(patch.dict(TILE, cpu=TILE["cuda"]))
        inside.enter_context(patch.object(Tensor, "cpu", to_host))
        inside.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        inside.enter_context(patch.object(F, "dropout", dropout_with_byte_mask))
        for name in FLOAT32_ON_CUDA:
            inside.enter_context(patch.object(F, name, in_float32(getattr(F, name))))
        yield


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with its half-precision arguments converted to float32, under autocast."""

    @wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(half_to_float32(each) for each in args)
            kwargs = {name: half_to_float32(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return wide


def half_to_float32(x: Any) -> Any:
    """A half-precision tensor in float32; anything else as it is."""
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """CUDA's memory-efficient attention (also on V100): (B, heads, L, E) -> the same.

    For the backward pass it keeps one log-sum-exp per row, not the attention matrix.
    """
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        query = query.to(narrow)
        key = key.to(narrow)
        value = value.to(narrow)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(narrow)

    if attn_mask is not None:
        # the kernel takes an additive bias, so a boolean mask is converted
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])

    attend: Callable[..., Any] = torch.ops.aten._scaled_dot_product_efficient_attention
    keep_log_sums = torch.is_grad_enabled()
    made: Tensor = attend(
        query, key, value, attn_mask, keep_log_sums, dropout_p, is_causal, scale=scale
    )[0]
    return made


def dropout_with_byte_mask(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout that keeps one byte per entry, as on CUDA; the CPU keeps a mask in x's dtype."""
    if not training or not p:
        return x
    made: Tensor = torch.native_dropout(x, p, True)[0]
    return made
