"""What an operation would say whose answer depends on numbers: abstract tensors have none, so it is
planned.

Always the ordinary step: losses are finite, nothing overflows, queues are full, no two pairs or
captions are alike, and a mask lets everything through, unless it looks for what differs (`said`,
see Meter): nothing does.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, ops

# any counter that is asked: pairs a queue has seen
MANY = 2**40


def answer(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation that FakeTensorMode refuses, as DataDependentOutput or
    DynamicOutputShape.
    """
    aten = ops.aten
    x = args[0]
    match func._overloadpacket:
        case aten._local_scalar_dense | aten.item:
            return (
                getattr(x, "said", True)
                if x.dtype == torch.bool
                else 1.0
                if x.dtype.is_floating_point
                else MANY
            )
        case aten.equal:
            return False
        case aten._unique2 | aten.unique_dim | aten.unique_consecutive:
            return (
                torch.empty_like(x),
                torch.empty_like(x, dtype=torch.int64),
                torch.empty_like(x, dtype=torch.int64),
            )
        case aten.bincount:
            return torch.empty(max(kwargs.get("minlength", 0), *args[2:], 1), dtype=torch.int64)
        case aten.nonzero:
            return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)
        case aten.masked_select:
            return x.new_empty(x.numel())
        case aten.index:
            return x[tuple(_places(index) for index in args[1])]
    raise NotImplementedError(
        f"planning: {func} depends on numbers; give it an answer in clipsmall/planning/answers.py"
    )


def _places(index: Tensor | None) -> Any:
    if index is None:
        return slice(None)
    return (
        torch.arange(len(index) * getattr(index, "said", True))
        if index.dtype == torch.bool
        else index
    )
