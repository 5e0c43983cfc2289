"""Fake results for data-dependent operations, which FakeTensor cannot evaluate.

The results are those of an ordinary step: losses are finite, nothing overflows, queues are full,
and all pairs and captions differ. A mask is all True, except one that looks for unusual values
(`fake_truth`, set by Meter), which is all False.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, ops

# The value of every counter, such as the number of pairs a queue has seen.
MANY = 2**40


def fake_result(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation that FakeTensorMode refuses.

    It refuses with DataDependentOutput (a Python number) or DynamicOutputShape (a tensor whose
    shape depends on numbers).
    """
    aten = ops.aten
    x = args[0]
    match func._overloadpacket:
        case aten._local_scalar_dense | aten.item:
            if x.dtype == torch.bool:
                return getattr(x, "fake_truth", True)
            return 1.0 if x.dtype.is_floating_point else MANY
        case aten.equal:
            return False
        case aten._unique2 | aten.unique_dim | aten.unique_consecutive:
            inverse = torch.empty_like(x, dtype=torch.int64)
            counts = torch.empty_like(x, dtype=torch.int64)
            return torch.empty_like(x), inverse, counts
        case aten.bincount:
            length = max(kwargs.get("minlength", 0), *args[2:], 1)
            return torch.empty(length, dtype=torch.int64)
        case aten.nonzero:
            return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)
        case aten.masked_select:
            return x.new_empty(x.numel())
        case aten.index:
            return x[tuple(_index_of_known_length(index) for index in args[1])]

    raise NotImplementedError(
        f"planning: {func} depends on numbers; give it a fake result in "
        "clipsmall/plan/data_dependent.py"
    )


def _index_of_known_length(index: Tensor | None) -> Any:
    """An index with a known number of rows: a mask selects all rows, or none."""
    if index is None:
        return slice(None)
    if index.dtype != torch.bool:
        return index
    length = len(index) if getattr(index, "fake_truth", True) else 0
    return torch.arange(length)
