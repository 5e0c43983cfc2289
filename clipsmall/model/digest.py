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
    # names of classes count, too: a class that is renamed gives another digest
    for name, layer in layers:
        kind = type(layer).__name__
        digest.update(f"{name} {kind} {layer.extra_repr()}".encode())
    for name, tensor in sorted(tensors.items()):
        shape = tuple(tensor.shape)
        digest.update(f"{name} {tensor.dtype} {shape}".encode())
        # the bytes as they are, of any dtype
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
