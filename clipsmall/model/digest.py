"""A digest of a model: equal for models that give equal outputs."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def model_digest(
    layers: Iterable[tuple[str, nn.Module]], tensors: dict[str, Tensor], *also: object
) -> str:
    """sha256 of everything that a model's outputs depend on.

    Args:
        layers: modules by name, which include activation functions without weights.
        tensors: weights by name.
        also: anything else that matters, such as preprocessing; its repr is hashed.
    """
    digest = hashlib.sha256(repr(also).encode())
    # class names are hashed, too, so renaming a class changes the digest
    for name, layer in layers:
        kind = type(layer).__name__
        digest.update(f"{name} {kind} {layer.extra_repr()}".encode())
    for name, tensor in sorted(tensors.items()):
        shape = tuple(tensor.shape)
        digest.update(f"{name} {tensor.dtype} {shape}".encode())
        # the raw bytes, whatever the dtype
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
