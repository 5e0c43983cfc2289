"""Counts the memory of tensors made inside a `with`: at the peak, kept for backward, the largest.

Every operation that PyTorch dispatches is seen, those of a backward pass, too, and each storage is
counted once, from its first appearance to its end, however many tensors are views of it. What
existed before is left out. A kernel's own scratch space is not seen: for that there is the
process's peak (tests/bench/losses.py).
"""

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """`with Meter() as meter: objective(e, e)["loss"].backward()`, then look at the numbers
    below.
    """

    def __init__(self) -> None:
        super().__init__()
        # of tensors alive at the same time, the gradients of leaves among them
        self.peak_bytes = 0
        # kept by graphs for their backward: all that was ever packed, each storage once
        self.saved_bytes = 0
        # elements of the largest storage made, in the dtype it was made with
        self.largest = 0
        # alive now; after the `with`: what has outlived it
        self.alive_bytes = 0
        # storages by id, those from before included
        self._known: dict[int, weakref.ref[Any]] = {}
        self._saved = set[int]()
        # ids of storages made inside and alive
        self._own = set[int]()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "Meter":
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._hooks.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for old in tree_leaves((args, kwargs)):
            if isinstance(old, Tensor):
                self._meet(old, made=False)
        result = func(*args, **(kwargs or {}))
        for new in tree_leaves(result):
            if isinstance(new, Tensor):
                self._meet(new, made=True)
        return result

    def _meet(self, tensor: Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size if made else 0))
        if made:
            self._own.add(key)
            self.alive_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
            self.largest = max(self.largest, size // tensor.element_size())

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key)
        self._own.discard(key)
        self._saved.discard(key)
        self.alive_bytes -= size

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) in self._own and id(storage) not in self._saved:
            self._saved.add(id(storage))
            self.saved_bytes += storage.nbytes()
        return tensor
