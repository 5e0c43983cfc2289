"""The same weights under two names: a list of pairs, read from left to right or from right to
left.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Inexpressible(ValueError):
    """A model that the other library has no words for; the message names it and the reason."""


@dataclass(frozen=True)
class NamePair:
    """Tensors of open_clip and of transformers with the same rows, in this order.

    Several tensors of a side are parts of one: queries, keys and values stand in thirds, and
    open_clip's pool of SigLIP has ("q", "kv"). `form` is what open_clip does to them: "transposed",
    or "batched" (a leading axis of 1).
    """

    open_clip: tuple[str, ...]
    transformers: tuple[str, ...]
    form: str = ""


def pair(open_clip: str, transformers: str, form: str = "") -> NamePair:
    return NamePair((open_clip,), (transformers,), form)


def layer(open_clip: str, transformers: str) -> Iterator[NamePair]:
    """Weight and bias of a linear layer or LayerNorm."""
    for kind in ("weight", "bias"):
        yield pair(f"{open_clip}.{kind}", f"{transformers}.{kind}")


def block(
    open_clip: str, transformers: str, names: dict[str, str], fused: str
) -> Iterator[NamePair]:
    """One transformer block.

    Args:
        names: open_clip's name of a layer -> that of transformers.
        fused: open_clip's queries, keys and values in one, as "attn.qkv." before "weight" and
            "bias".
    """
    for theirs, name in names.items():
        yield from layer(f"{open_clip}.{theirs}", f"{transformers}.{name}")
    for kind in ("weight", "bias"):
        thirds = tuple(f"{transformers}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
        yield NamePair((f"{open_clip}.{fused}{kind}",), thirds)


def renamed(tensors: Tensors, pairs: Iterable[NamePair], to: str, name: str) -> Tensors:
    """`tensors` under the names of the library `to`: copies, bit for bit.

    Raises:
        Inexpressible: a tensor that no pair names, or one missing.
    """
    left = dict(tensors)
    found = {}
    for each in pairs:
        sides = (each.open_clip, each.transformers)
        given, wanted = sides if to == "transformers" else sides[::-1]
        if missing := [key for key in given if key not in left]:
            raise Inexpressible(f"{name}: has no weights {missing[0]}; {to} needs them")
        parts = [left.pop(key) for key in given]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if each.form == "transposed":
            whole = whole.T
        elif each.form == "batched":
            whole = whole[0] if to == "transformers" else whole[None]
        third = len(whole) // 3
        sizes = {1: [len(whole)], 2: [third, 2 * third], 3: [third] * 3}[len(wanted)]
        for key, part in zip(wanted, torch.split(whole, sizes), strict=True):
            found[key] = part.clone(memory_format=torch.contiguous_format)
    if left:
        raise Inexpressible(
            f"{name}: {to} has no place for the weights {', '.join(sorted(left)[:3])}"
        )
    return found
