"""CLIP with a plain ViT: open_clip's `CLIP` and `CustomTextCLIP` <-> transformers' `CLIPModel`."""

from collections.abc import Iterator
from typing import Any

from clipsmall.export import options
from clipsmall.export.tokenizer import VOCABULARY
from clipsmall.export.weights import (
    Inexpressible,
    NamePair,
    block_names,
    layer_names,
    name_pair,
)

# Layers of a block: open_clip's name -> transformers' name.
LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Options of both open_clip towers that transformers has, too.
SHARED = {"width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"}
# This eos_token_id makes transformers pool at the largest id, as in OpenAI's first configs.
LARGEST_ID = 2


def clip_names(vision_layers: int, text_layers: int, custom_text: bool) -> Iterator[NamePair]:
    """Names of all CLIP tensors except logit_scale and logit_bias.

    Args:
        custom_text: whether names of open_clip's text tower begin with "text.".
    """
    text = "text." if custom_text else ""
    yield name_pair("visual.class_embedding", "vision_model.embeddings.class_embedding")
    yield name_pair("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
    yield name_pair(
        "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"
    )
    yield name_pair("visual.proj", "visual_projection.weight", "transposed")
    yield from layer_names("visual.ln_pre", "vision_model.pre_layrnorm")
    yield from layer_names("visual.ln_post", "vision_model.post_layernorm")
    yield name_pair(f"{text}token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield name_pair(
        f"{text}positional_embedding", "text_model.embeddings.position_embedding.weight"
    )
    yield name_pair(f"{text}text_projection", "text_projection.weight", "transposed")
    yield from layer_names(f"{text}ln_final", "text_model.final_layer_norm")
    for i in range(vision_layers):
        theirs = f"visual.transformer.resblocks.{i}"
        yield from block_names(theirs, f"vision_model.encoder.layers.{i}", LAYERS, "attn.in_proj_")
    for i in range(text_layers):
        theirs = f"{text}transformer.resblocks.{i}"
        yield from block_names(theirs, f"text_model.encoder.layers.{i}", LAYERS, "attn.in_proj_")


def clip_for_transformers(config: dict[str, Any], name: str) -> dict[str, Any]:
    """open_clip's `model_cfg` -> the content of a `CLIPConfig`. Raises Inexpressible."""
    if isinstance(config["vision_cfg"].get("layers"), list):
        raise Inexpressible(f"{name}: transformers has no CLIP with a ResNet as image tower")
    for_vision = SHARED | {"head_width", "patch_size", "image_size"}
    for_text = SHARED | {"heads", "context_length", "vocab_size", "pool_type"}
    vision = options.tower_options(config, "vision", for_vision, name)
    text = options.tower_options(config, "text", for_text, name)
    quick = config.get("quick_gelu", False)
    vision_act = options.activation(quick, vision["act_kwargs"], name)
    text_act = options.activation(quick, text["act_kwargs"], name)
    if not all(isinstance(vision[key], int) for key in ("image_size", "patch_size")):
        raise Inexpressible(
            f"{name}: transformers' CLIP takes square images, not {vision['image_size']}"
        )
    eos = _end_id(text, name)
    # the start id is not used, but must be valid
    start = VOCABULARY - 2 if text["vocab_size"] == VOCABULARY else eos
    vision_heads = vision["width"] // vision["head_width"]
    return {
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "vision_config": {
            **options.transformers_sizes(vision, vision_heads, vision_act),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": config["embed_dim"],
        },
        "text_config": {
            **options.transformers_sizes(text, text["heads"], text_act),
            "bos_token_id": start,
            "eos_token_id": eos,
            "pad_token_id": eos,
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "projection_dim": config["embed_dim"],
        },
    }


def _end_id(text: dict[str, Any], name: str) -> int:
    """The eos id that makes transformers pool where open_clip does. Raises Inexpressible."""
    pool = text["pool_type"]
    eos: int = text["eos_id"]
    if pool == "argmax":
        # the largest id of CLIP's own vocabulary is its end mark
        return VOCABULARY - 1 if text["vocab_size"] == VOCABULARY else LARGEST_ID
    if pool == "eos" and eos != LARGEST_ID:
        return eos
    raise Inexpressible(
        f"{name}: transformers' CLIP has no text pooling {pool!r} with eos_id={eos} (it takes 2 "
        "for OpenAI's first configs, which pool at the largest id)"
    )


def clip_for_open_clip(config: Any, name: str) -> dict[str, Any]:
    """A `CLIPConfig` -> open_clip's `model_cfg`. Raises Inexpressible."""
    vision = config.vision_config
    text = config.text_config
    quick, vision_act = options.open_clip_activation(vision, name)
    text_quick, text_act = options.open_clip_activation(text, name)
    if quick != text_quick:
        raise Inexpressible(f"{name}: open_clip has one quick_gelu for both towers")
    square = isinstance(vision.image_size, int) and isinstance(vision.patch_size, int)
    if not square or vision.num_channels != 3:
        raise Inexpressible(
            f"{name}: open_clip takes RGB images, patches here are {vision.patch_size}"
        )
    if not isinstance(text.eos_token_id, int):
        raise Inexpressible(f"{name}: open_clip pools at one id, not at any of {text.eos_token_id}")
    pooling = {"pool_type": "eos", "eos_id": text.eos_token_id}
    if text.eos_token_id in (LARGEST_ID, text.vocab_size - 1):
        # open_clip's default pools at the largest id
        pooling = {}
    return {
        "embed_dim": config.projection_dim,
        **({"quick_gelu": True} if quick else {}),
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": options.mlp_ratio(vision),
            **vision_act,
            **options.norm_option(vision.layer_norm_eps),
        },
        "text_cfg": {
            **options.open_clip_text_sizes(text),
            **pooling,
            **text_act,
        },
    }
