"""Makes the CPU's memory use that of CUDA, by putting other functions in place of its kernels.

Abstract tensors cannot lie on a GPU where there is none: PyTorch's autograd engine asks the driver
for its streams (2.14: "hasPrimaryContext expects a valid device index"). So they lie on the CPU,
and towers find other functions in torch.nn.functional: those that stand for the kernels of CUDA. (A
TorchFunctionMode would not see what is called inside another function of PyTorch: the attention in
nn.MultiheadAttention, or what a backward pass computes again.)
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

# Functions of towers that CUDA's autocast computes in float32 and the CPU's does not (PyTorch's
# list "CUDA Ops that can autocast to float32"): what they keep for the backward pass has twice the
# bytes.
FLOAT32_ON_CUDA = ("layer_norm", "group_norm", "softmax", "log_softmax", "normalize")


@contextmanager
def as_on_cuda(meter: Meter) -> Iterator[None]:
    """Inside, kernels are chosen as on CUDA, the loss has CUDA's tiles, `.cpu()` leaves the device.

    What is copied to the host is not counted.
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
    """CUDA's memory-efficient kernel, which a V100 has, too: (B, heads, L, E) -> the same.

    For the backward pass it keeps a log sum for each row, not the matrix.
    """
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        query = query.to(narrow)
        key = key.to(narrow)
        value = value.to(narrow)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(narrow)

    if attn_mask is not None:
        # the kernel adds a bias; a boolean mask becomes one
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
    """Dropout that keeps a byte for each entry, as CUDA's; the CPU's keeps a mask in x's dtype."""
    if not training or not p:
        return x
    made: Tensor = torch.native_dropout(x, p, True)[0]
    return made
