"""Counts one abstract step: bytes of live storages by what they are, at the moment when they are
most, and FLOPs.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from clipsmall.plan.answers import answer

# label of storages that lie in the host's memory, and are not counted
HOST = "host"
LABELS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "pixels",
    "loss",
    "memory",
    "averaged towers",
)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`with FakeTensorMode(), Meter() as meter:` sees every operation, those of a backward pass,
    too.

    Each storage is counted once, from the operation that makes it to its end, however many tensors
    look into it, under the label that is set at the time, until it is given another. Whatever asks
    for a number that no abstract tensor has gets a planned answer (answers.py).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # label of what is made from now on
        self.making = "weights"
        # bytes
        self.now = Counter[str]()
        self.peak = Counter[str]()
        self.flops = 0
        # by id of the storage
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._total = self._most = 0

    def restart(self) -> None:
        """From here on the peak and the FLOPs are counted anew."""
        self.flops = 0
        self._most = 0
        self._look()

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        before = self.making
        self.making = label
        try:
            yield
        finally:
            self.making = before

    def label(self, tensors: Iterable[Tensor | None], label: str) -> None:
        """These are something else than what was being made."""
        for tensor in tensors:
            if tensor is not None:
                self._meet(tensor)
                key = id(tensor.untyped_storage())
                ref, size, old = self._alive[key]
                self._alive[key] = ref, size, label
                self._count(old, -size)
                self._count(label, size)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            result = answer(func, args, kwargs)
        like = func._opname == "zeros_like" and self._label_of(args[0]) == HOST
        with self.labelled(HOST if like else self.making):
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, Tensor):
                    self._meet(each)
        # they ask for what is odd
        if func._opname in ("any", "ne"):
            result.said = False
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _label_of(self, tensor: Tensor) -> str:
        return self._alive.get(id(tensor.untyped_storage()), (None, 0, ""))[2]

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), size, self.making
            self._count(self.making, size)

    def _forget(self, key: int) -> None:
        _, size, label = self._alive.pop(key)
        self._count(label, -size)

    def _count(self, label: str, size: int) -> None:
        self.now[label] += size
        if label != HOST:
            self._total += size
            self._look()

    def _look(self) -> None:
        if self._total > self._most:
            self._most, self.peak = (
                self._total,
                Counter({k: n for k, n in self.now.items() if n and k != HOST}),
            )


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


def _named() -> dict[Any, Callable[..., int]]:
    """PyTorch's own formulas, and the CPU's attention, for which it has none."""
    from torch import ops

    return {
        **flop_registry,
        ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }


FLOPS = _named()
