"""A digest of a model: equal for models that give equal outputs."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def model_digest(
    layers: Iterable[tuple[str, nn.Module]], tensors: dict[str, Tensor], *also: object
) -> str:
    """sha256 of all that a model's outputs depend on.

    Args:
        layers: modules by name: activation functions have no weights, but matter.
        tensors: weights by name.
        also: what else matters, such as preprocessing; taken by its repr.
    """
    digest = hashlib.sha256(repr(also).encode())
    for name, layer in layers:
        digest.update(f"{name} {type(layer).__name__} {layer.extra_repr()}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        as_bytes = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(as_bytes.numpy().tobytes())
    return digest.hexdigest()
