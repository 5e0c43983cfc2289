"""SigLIP: open_clip's `CustomTextCLIP` over a ViT of timm <-> transformers' `SiglipModel`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clipsmall.export import clip, options
from clipsmall.export.weights import (
    Inexpressible,
    NamePair,
    block_names,
    layer_names,
    name_pair,
)

# Layers of an image-tower block: timm's name -> transformers' name.
LAYERS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# open_clip's options for SigLIP's text tower: bidirectional attention, pooling at the last token,
# a projection with bias.
TEXT = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}


def is_siglip(config: dict[str, Any]) -> bool:
    """Whether an open_clip `model_cfg` has SigLIP's image tower, which pools by attention."""
    vision = config["vision_cfg"]
    return "siglip" in (vision.get("timm_model_name") or "") and vision.get("timm_pool") == "map"


def siglip_names(vision_layers: int, text_layers: int) -> Iterator[NamePair]:
    """Names of all SigLIP tensors except logit_scale and logit_bias."""
    trunk = "visual.trunk"
    pool = "visual.trunk.attn_pool"
    head = "vision_model.head"
    yield from layer_names(f"{trunk}.patch_embed.proj", "vision_model.embeddings.patch_embedding")
    yield name_pair(
        f"{trunk}.pos_embed", "vision_model.embeddings.position_embedding.weight", "batched"
    )
    yield from layer_names(f"{trunk}.norm", "vision_model.post_layernorm")
    yield name_pair(f"{pool}.latent", f"{head}.probe")
    for kind in ("weight", "bias"):
        yield NamePair(
            (f"{pool}.q.{kind}", f"{pool}.kv.{kind}"), (f"{head}.attention.in_proj_{kind}",)
        )
    yield from layer_names(f"{pool}.proj", f"{head}.attention.out_proj")
    yield from layer_names(f"{pool}.norm", f"{head}.layernorm")
    yield from layer_names(f"{pool}.mlp.fc1", f"{head}.mlp.fc1")
    yield from layer_names(f"{pool}.mlp.fc2", f"{head}.mlp.fc2")
    for i in range(vision_layers):
        yield from block_names(
            f"{trunk}.blocks.{i}", f"vision_model.encoder.layers.{i}", LAYERS, "attn.qkv."
        )
    yield name_pair("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield name_pair("text.positional_embedding", "text_model.embeddings.position_embedding.weight")
    yield from layer_names("text.ln_final", "text_model.final_layer_norm")
    yield from layer_names("text.text_projection", "text_model.head")
    for i in range(text_layers):
        theirs = f"text.transformer.resblocks.{i}"
        ours = f"text_model.encoder.layers.{i}"
        yield from block_names(theirs, ours, clip.LAYERS, "attn.in_proj_")


def trunk_config(timm_name: str, name: str) -> dict[str, Any]:
    """transformers' `vision_config` for a timm image tower; no weights are created.

    Raises:
        Inexpressible: timm has no such model, or it is not a plain ViT with attention pooling.
    """
    import timm

    try:
        with torch.device("meta"):
            trunk: Any = timm.create_model(timm_name, num_classes=0)
        block = trunk.blocks[0]
        act = block.mlp.act
        kind = type(act).__name__
        if not isinstance(act, nn.GELU) and kind not in ("GELU", "GELUTanh"):
            raise AttributeError(f"its activation is {kind}")
        tanh = getattr(act, "approximate", "tanh" if kind == "GELUTanh" else "none")
        return {
            "image_size": trunk.patch_embed.img_size[0],
            "patch_size": trunk.patch_embed.patch_size[0],
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            "hidden_act": "gelu_pytorch_tanh" if tanh == "tanh" else "gelu",
            "layer_norm_eps": trunk.norm.eps,
        }
    except (RuntimeError, AttributeError) as error:
        raise Inexpressible(
            f"{name}: timm's {timm_name} is no image tower of SigLIP's kind ({error})"
        ) from None


def siglip_for_transformers(config: dict[str, Any], name: str) -> dict[str, Any]:
    """open_clip's `model_cfg` -> the content of a `SiglipConfig`. Raises Inexpressible."""
    for_vision = {"timm_model_name", "timm_pool", "timm_proj", "image_size"}
    for_text = clip.SHARED | {"heads", "context_length", "vocab_size"} | set(TEXT)
    vision = options.tower_options(config, "vision", for_vision, name)
    text = options.tower_options(config, "text", for_text, name)
    found = {key: text[key] for key in TEXT} | {"timm_proj": vision["timm_proj"]}
    if found != {**TEXT, "timm_proj": "none"}:
        raise Inexpressible(
            f"{name}: towers unlike SigLIP's ({found}); transformers has {TEXT}, timm_proj 'none'"
        )
    act = options.activation(config.get("quick_gelu", False), text["act_kwargs"], name)
    return {
        "model_type": "siglip",
        "vision_config": trunk_config(vision["timm_model_name"], name),
        "text_config": {
            **options.transformers_sizes(text, text["heads"], act),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "projection_size": config["embed_dim"],
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
    }


def siglip_for_open_clip(config: Any, name: str) -> dict[str, Any]:
    """A `SiglipConfig` -> open_clip's `model_cfg`. Raises Inexpressible."""
    vision = config.vision_config
    text = config.text_config
    quick, text_act = options.open_clip_activation(text, name)
    if not vision.vision_use_head or text.projection_size != vision.hidden_size:
        raise Inexpressible(
            f"{name}: open_clip's SigLIP pools by attention, to the width of the projected text"
        )
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        **({"quick_gelu": True} if quick else {}),
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": timm_name(vision, name),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **options.open_clip_text_sizes(text),
            **TEXT,
            **text_act,
        },
    }


def timm_name(vision: Any, name: str) -> str:
    """The timm model that computes the same as a transformers image tower.

    open_clip configs can only name a timm model, not describe one.

    Raises:
        Inexpressible: there is none; the message says how the nearest differs.
    """
    import timm

    nearest = ""
    differences: dict[str, Any] = {}
    for candidate in timm.list_models(f"vit_*_patch{vision.patch_size}_siglip_{vision.image_size}"):
        found = trunk_config(candidate, name)
        differs = {key: value for key, value in found.items() if getattr(vision, key) != value}
        if not differs:
            return str(candidate)
        if not nearest or len(differs) <= len(differences):
            nearest = candidate
            differences = differs
    hint = ""
    if nearest:
        asked = ", ".join(f"{key}={getattr(vision, key)!r}" for key in differences)
        hint = f"; timm's {nearest} would be nearest, but not with {asked}"
    raise Inexpressible(
        f"{name}: open_clip names its SigLIP image towers by timm's models, and timm has none of "
        f"this size (patch {vision.patch_size}, image {vision.image_size}){hint}"
    )
