"""Counts the FLOPs of an abstract step, and the bytes in use at its peak by label."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from clipsmall.plan.data_dependent import fake_result

# Label of storages in host memory, which are not counted.
HOST = "host"


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation inside `with FakeTensorMode(), Meter() as meter:`, backward passes, too.

    Each storage is counted once, however many views it has, from the operation that creates it
    until it is freed. Its label is the one set at its creation, unless `label` changes it. An
    operation that needs a number, which abstract tensors lack, gets a fake result
    (data_dependent.py).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

        # label of storages created from now on
        self.making = "weights"
        # bytes by label
        self.now = Counter[str]()
        self.peak = Counter[str]()
        self.flops = 0
        # by id of the storage: reference, bytes, label
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        # bytes of all labels but HOST
        self._total = 0
        self._most = 0

    def restart(self) -> None:
        """Reset peak and FLOPs; storages in use stay counted."""
        self.flops = 0
        self._most = 0
        self._update_peak()

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages created inside get this label."""
        before = self.making
        self.making = label
        try:
            yield
        finally:
            self.making = before

    def label(self, tensors: Iterable[Tensor | None], label: str) -> None:
        """Change the label of these tensors' storages."""
        for tensor in tensors:
            if tensor is None:
                continue
            self._register(tensor)
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
            result = fake_result(func, args, kwargs)

        # the gradient of a tensor in host memory is in host memory, too
        on_host = func._opname == "zeros_like" and self._label_of(args[0]) == HOST
        with self.labelled(HOST if on_host else self.making):
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, Tensor):
                    self._register(each)

        # masks that look for unusual values; an ordinary step has none
        if func._opname in ("any", "ne"):
            result.fake_truth = False
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _label_of(self, tensor: Tensor) -> str:
        return self._alive.get(id(tensor.untyped_storage()), (None, 0, ""))[2]

    def _register(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now on, if it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        size = storage.nbytes()
        ref = weakref.ref(storage, lambda _: self._forget(key))
        self._alive[key] = ref, size, self.making
        self._count(self.making, size)

    def _forget(self, key: int) -> None:
        _, size, label = self._alive.pop(key)
        self._count(label, -size)

    def _count(self, label: str, size: int) -> None:
        self.now[label] += size
        if label != HOST:
            self._total += size
            self._update_peak()

    def _update_peak(self) -> None:
        if self._total <= self._most:
            return
        self._most = self._total
        self.peak = Counter()
        for label, size in self.now.items():
            if size and label != HOST:
                self.peak[label] = size


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """PyTorch's own formulas, and those of the CPU's attention, for which it has none."""
    from torch import ops

    return {
        **flop_registry,
        ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }


FLOPS = _flop_formulas()
