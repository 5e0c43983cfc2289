"""Renames weights between two libraries by a list of name pairs, in either direction."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Inexpressible(ValueError):
    """The other library cannot express the model; the message says why."""


@dataclass(frozen=True)
class NamePair:
    """Tensors of open_clip and of transformers that hold the same weights.

    Several names on one side are concatenated in this order: queries, keys and values, or ("q",
    "kv") in open_clip's attention pooling of SigLIP. `form` says how open_clip's layout differs:
    "transposed", or "batched" (a leading axis of 1).
    """

    open_clip: tuple[str, ...]
    transformers: tuple[str, ...]
    form: str = ""


def name_pair(open_clip: str, transformers: str, form: str = "") -> NamePair:
    """One tensor on each side."""
    return NamePair((open_clip,), (transformers,), form)


def layer_names(open_clip: str, transformers: str) -> Iterator[NamePair]:
    """Weight and bias of a linear layer or LayerNorm."""
    for kind in ("weight", "bias"):
        yield name_pair(f"{open_clip}.{kind}", f"{transformers}.{kind}")


def block_names(
    open_clip: str, transformers: str, layers: dict[str, str], fused: str
) -> Iterator[NamePair]:
    """One transformer block.

    Args:
        open_clip: open_clip's name of the block.
        transformers: transformers' name of the block.
        layers: open_clip's name of a layer in the block -> transformers' name.
        fused: open_clip's prefix of the fused query-key-value "weight" and "bias", such as
            "attn.qkv.".
    """
    for theirs, ours in layers.items():
        yield from layer_names(f"{open_clip}.{theirs}", f"{transformers}.{ours}")
    attention = f"{transformers}.self_attn"
    for kind in ("weight", "bias"):
        thirds = tuple(f"{attention}.{letter}_proj.{kind}" for letter in "qkv")
        yield NamePair((f"{open_clip}.{fused}{kind}",), thirds)


def renamed(tensors: Tensors, names: Iterable[NamePair], to: str, model: str) -> Tensors:
    """`tensors` under the names of the library `to`: copies, bit for bit.

    Args:
        model: the model's name, for messages.

    Raises:
        Inexpressible: a tensor that no pair names, or a missing tensor.
    """
    left = dict(tensors)
    found = {}
    for pair in names:
        if to == "transformers":
            given = pair.open_clip
            wanted = pair.transformers
        else:
            given = pair.transformers
            wanted = pair.open_clip
        missing = [key for key in given if key not in left]
        if missing:
            raise Inexpressible(f"{model}: has no weights {missing[0]}; {to} needs them")
        parts = [left.pop(key) for key in given]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        whole = _converted(whole, pair.form, to)
        pieces = torch.split(whole, _rows(len(whole), len(wanted)))
        for key, piece in zip(wanted, pieces, strict=True):
            found[key] = piece.clone(memory_format=torch.contiguous_format)
    if left:
        extra = ", ".join(sorted(left)[:3])
        raise Inexpressible(f"{model}: {to} has no place for the weights {extra}")
    return found


def _converted(whole: Tensor, form: str, to: str) -> Tensor:
    """Apply `NamePair.form`, or undo it."""
    if form == "transposed":
        return whole.T
    if form == "batched":
        return whole[0] if to == "transformers" else whole[None]
    return whole


def _rows(total: int, parts: int) -> list[int]:
    """How many rows each part gets: all; queries and (keys, values); or queries, keys, values."""
    third = total // 3
    if parts == 1:
        return [total]
    if parts == 2:
        return [third, 2 * third]
    return [third] * 3
