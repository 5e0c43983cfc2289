"""Where a parameter of a dual encoder stands: in which tower, in which block, in a projection."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

IMAGE = re.compile(r"(^|\.)(visual|vision_model|visual_projection)\.")
# transformers' layers, open_clip's resblocks, timm's blocks and stages, a ResNet's layer1 … layer4;
# the outermost
BLOCK = re.compile(r"\.(?:(?:layers?|resblocks|blocks|stages)\.(\d+)|layer([1-4]))\.")
PROJECTION = re.compile(
    r"(^|\.)(visual_projection|text_projection|visual\.(?:head\.)?proj|text\.text_projection|text_model\.head|head)"
    r"(\.(weight|bias|bias_vector))?$"
)
# what follows the blocks; all else outside them precedes them
TAIL = re.compile(
    r"(^|\.)(ln_final|ln_post|final_layer_norm|post_layernorm|norm|fc_norm|head|attn_pool|attnpool)\b"
)


class Place(NamedTuple):
    """Of one parameter or module."""

    # image or text
    tower: str
    # from 0; -1 = before the blocks, LAST = after them
    block: int
    # the map onto the embeddings
    projection: bool


LAST = 10_000


def place(name: str) -> Place:
    """Where a parameter of towers stands, by its full name (of transformers, open_clip, timm, or
    our small towers).
    """
    # of a module with an adapter
    name = name.replace(".base_layer.", ".")
    tower = "image" if IMAGE.search(name) else "text"
    if found := BLOCK.search(f".{name}"):
        return Place(tower, int(found[1]) if found[1] else int(found[2]) - 1, False)
    projection = PROJECTION.search(name) is not None
    return Place(tower, LAST if projection or TAIL.search(name) else -1, projection)


def depths(names: Iterable[str]) -> dict[str, int]:
    """Blocks of each tower, of which `names` are the parameters."""
    found = {"image": 0, "text": 0}
    for here in map(place, names):
        if 0 <= here.block < LAST:
            found[here.tower] = max(found[here.tower], here.block + 1)
    return found


def linear_maps(model: nn.Module) -> list[str]:
    """Full names of the linear maps inside blocks; of an attention module that holds its maps as
    one, its own.
    """
    fused = [
        name for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)
    ]
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | nn.MultiheadAttention)
        and 0 <= place(f"{name}.").block < LAST
        and not any(name.startswith(f"{whole}.") for whole in fused)
    ]
