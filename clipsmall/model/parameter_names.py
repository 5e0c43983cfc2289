"""Where a parameter is, by its name: in which tower, in which block, or in a projection.

The names are those of transformers, open_clip, timm and our small towers, of which none contradicts
another. With `towers.model.` or any other prefix before them they mean the same.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn

# What lies in the image tower; all else is the text tower.
#   open_clip and small   visual.conv1.weight
#   transformers          vision_model.embeddings.class_embedding, visual_projection.weight
IMAGE = re.compile(r"(^|\.)(visual|vision_model|visual_projection)\.")

# The number of a block; of blocks within blocks, the outermost.
#   transformers          text_model.encoder.layers.3.mlp.fc1.weight      3
#   open_clip             visual.transformer.resblocks.11.ln_1.weight     11
#   BERT in open_clip     text.transformer.encoder.layer.3.output.bias    3
#   timm's ViT            visual.trunk.blocks.3.attn.qkv.weight           3
#   timm's ConvNeXt       visual.trunk.stages.3.blocks.1.mlp.fc1.weight   3
#   ResNet, from 1        visual.layer4.0.conv1.weight                    3
#   small                 blocks.layers.0.norm1.weight                    0
BLOCK = re.compile(r"\.(?:(?:layers?|resblocks|blocks|stages)\.(\d+)|layer([1-4]))\.")

# The map onto the embeddings.
#   transformers          visual_projection.weight, text_projection.weight; SigLIP's text_model.head
#   open_clip             visual.proj, text_projection, text.text_projection.bias
#   timm in open_clip     visual.head.proj.weight
#   small                 head.weight
PROJECTION = re.compile(
    r"(^|\.)"
    r"(visual_projection|text_projection|visual\.(?:head\.)?proj|text\.text_projection"
    r"|text_model\.head|head)"
    r"(\.(weight|bias|bias_vector))?$"
)

# What follows the blocks: last LayerNorm and pooling. What is neither this nor in a block precedes
# the blocks, as embeddings do.
#   transformers          vision_model.post_layernorm.weight, vision_model.head.probe
#   open_clip             ln_final.weight, visual.ln_post.bias, visual.attnpool.q_proj.weight
#   timm                  visual.trunk.norm.weight, visual.trunk.attn_pool.kv.weight
TAIL = re.compile(
    r"(^|\.)"
    r"(ln_final|ln_post|final_layer_norm|post_layernorm|norm|fc_norm|head|attn_pool|attnpool)\b"
)

# the block number of what follows the blocks; larger than any
LAST = 10_000


class Location(NamedTuple):
    """Where one parameter or module is."""

    # "image" or "text"
    tower: str
    # from 0; -1 before the blocks, LAST after them
    block: int
    # whether it is the map onto the embeddings
    projection: bool


def locate(name: str) -> Location:
    """Where a parameter of towers is.

    Args:
        name: its full name; of a module with a "." behind it.
    """
    # of a module with an adapter
    name = name.replace(".base_layer.", ".")
    tower = "image" if IMAGE.search(name) else "text"
    block = BLOCK.search(f".{name}")
    if block is not None:
        from_zero, from_one = block.groups()
        number = int(from_zero) if from_zero else int(from_one) - 1
        return Location(tower, number, False)
    projection = PROJECTION.search(name) is not None
    follows = projection or TAIL.search(name) is not None
    return Location(tower, LAST if follows else -1, projection)


def depths(locations: Iterable[Location]) -> dict[str, int]:
    """How many blocks each tower has, by where its parameters are."""
    found = {"image": 0, "text": 0}
    for here in locations:
        if 0 <= here.block < LAST:
            found[here.tower] = max(found[here.tower], here.block + 1)
    return found


def linear_maps(model: nn.Module, where: Callable[[str], Location] = locate) -> list[str]:
    """Full names of the linear maps inside blocks.

    An attention module of torch's holds its maps as one tensor: it is named in their place.
    """
    fused = [
        name for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)
    ]
    found = []
    for name, part in model.named_modules():
        in_block = 0 <= where(f"{name}.").block < LAST
        in_fused = any(name.startswith(f"{whole}.") for whole in fused)
        if isinstance(part, nn.Linear | nn.MultiheadAttention) and in_block and not in_fused:
            found.append(name)
    return found
