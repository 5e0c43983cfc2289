"""How a CUDA device would compute what runs abstractly as if on a CPU, as far as memory differs.

Abstract tensors cannot lie on a GPU where there is none: PyTorch's autograd engine asks the driver for its streams
(2.14: "hasPrimaryContext expects a valid device index"). So they lie on the CPU, and this mode makes the same kernels
be chosen as on CUDA.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clipsmall.planning.meter import HOST, Meter

# what CUDA's autocast computes in float32 and the CPU's does not (docs: "CUDA Ops that can autocast to float32"),
# of what towers are made of; their inputs and results are kept for the backward pass in twice the bytes
WIDE = {torch.layer_norm, torch.group_norm, torch.softmax, torch.log_softmax, torch.norm, torch.exp, torch.log,
        torch.pow, torch.sum, Tensor.softmax, Tensor.log_softmax, Tensor.norm, Tensor.exp, Tensor.log, Tensor.pow,
        Tensor.sum, F.softmax, F.log_softmax, F.softplus, F.normalize, F.cross_entropy}  # fmt: skip


class CudaWays(TorchFunctionMode):
    """Args: meter: is told which tensors would lie in the host's memory."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return lean_attention(*args, **kwargs)
        if func is Tensor.cpu:
            sent = torch.clone(args[0])
            self.meter.label([sent], HOST)
            return sent
        if func is F.dropout:
            return kept_as_bytes(*args, **kwargs)
        if func in WIDE and torch.is_autocast_enabled("cpu") and kwargs.get("dtype") is None:
            args = tuple(widened(each) for each in args)
            kwargs = {name: widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


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
    """The memory-efficient kernel, which a V100 has too: (B, heads, L, E) -> the same; keeps a log sum for each row."""
    qkv = query, key, value
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        qkv = query.to(narrow), key.to(narrow), value.to(narrow)
        attn_mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(narrow)
    if attn_mask is not None:
        bias = attn_mask if attn_mask.dtype != torch.bool else torch.zeros_like(attn_mask, dtype=qkv[0].dtype)
        attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
    attend: Callable[..., Any] = torch.ops.aten._scaled_dot_product_efficient_attention
    made: Tensor = attend(*qkv, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
    return made


def kept_as_bytes(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that remembers a byte an entry; the CPU's keeps a mask of the input's kind."""
    if not training or not p:
        return x
    made: Tensor = torch.native_dropout(x, p, True)[0]
    return made
