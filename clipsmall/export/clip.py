"""CLIP with a plain ViT: open_clip's `CLIP` and `CustomTextCLIP` <-> transformers' `CLIPModel`."""

from collections.abc import Iterator
from typing import Any

from clipsmall.export import options
from clipsmall.export.tokenizer import VOCABULARY
from clipsmall.export.weights import Inexpressible, NamePair, block, layer, pair

LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SHARED = {"width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"}
LARGEST_ID = (
    # transformers' mark of OpenAI's first configs: pool at the largest id, not at this one
    2
)


def clip_names(vision_layers: int, text_layers: int, custom_text: bool) -> Iterator[NamePair]:
    """Every tensor but scale and bias. `custom_text`: open_clip's text tower lies under "text."."""
    text = "text." if custom_text else ""
    yield pair("visual.class_embedding", "vision_model.embeddings.class_embedding")
    yield pair("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
    yield pair("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight")
    yield pair("visual.proj", "visual_projection.weight", "transposed")
    yield from layer("visual.ln_pre", "vision_model.pre_layrnorm")
    yield from layer("visual.ln_post", "vision_model.post_layernorm")
    yield pair(f"{text}token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield pair(f"{text}positional_embedding", "text_model.embeddings.position_embedding.weight")
    yield pair(f"{text}text_projection", "text_projection.weight", "transposed")
    yield from layer(f"{text}ln_final", "text_model.final_layer_norm")
    for theirs, name, depth in (
        ("visual.", "vision_model", vision_layers),
        (text, "text_model", text_layers),
    ):
        for i in range(depth):
            yield from block(
                f"{theirs}transformer.resblocks.{i}",
                f"{name}.encoder.layers.{i}",
                LAYERS,
                "attn.in_proj_",
            )


def clip_for_transformers(config: dict[str, Any], name: str) -> dict[str, Any]:
    """open_clip's `model_cfg` -> the content of a `CLIPConfig`. Raises Inexpressible."""
    if isinstance(config["vision_cfg"].get("layers"), list):
        raise Inexpressible(f"{name}: transformers has no CLIP with a ResNet as image tower")
    vision = options.tower(
        config, "vision", SHARED | {"head_width", "patch_size", "image_size"}, name
    )
    converted = SHARED | {"heads", "context_length", "vocab_size", "pool_type"}
    text = options.tower(config, "text", converted, name)
    quick = config.get("quick_gelu", False)
    acts = [options.activation(quick, given["act_kwargs"], name) for given in (vision, text)]
    if not all(isinstance(vision[key], int) for key in ("image_size", "patch_size")):
        raise Inexpressible(
            f"{name}: transformers' CLIP takes square images, not {vision['image_size']}"
        )
    if text["pool_type"] == "argmax":
        eos = VOCABULARY - 1 if text["vocab_size"] == VOCABULARY else LARGEST_ID
    elif text["pool_type"] == "eos" and text["eos_id"] != LARGEST_ID:
        eos = text["eos_id"]
    else:
        raise Inexpressible(
            f"{name}: transformers' CLIP has no text pooling {text['pool_type']!r} with eos_id={text['eos_id']} "
            "(it takes 2 for OpenAI's first configs, which pool at the largest id)"
        )
    # looked at by nobody, but must be an id
    start = VOCABULARY - 2 if text["vocab_size"] == VOCABULARY else eos
    marks = {"bos_token_id": start, "eos_token_id": eos, "pad_token_id": eos}
    return {
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "vision_config": {
            **options.sides(vision, vision["width"] // vision["head_width"], acts[0]),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": config["embed_dim"],
        },
        "text_config": {
            **options.sides(text, text["heads"], acts[1]),
            **marks,
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "projection_dim": config["embed_dim"],
        },
    }


def clip_for_open_clip(config: Any, name: str) -> dict[str, Any]:
    """A `CLIPConfig` -> open_clip's `model_cfg`. Raises Inexpressible."""
    vision = config.vision_config
    text = config.text_config
    (quick, vision_act), (text_quick, text_act) = (
        options.hidden_act(each, name) for each in (vision, text)
    )
    if quick != text_quick:
        raise Inexpressible(f"{name}: open_clip has one quick_gelu for both towers")
    if (
        not all(isinstance(size, int) for size in (vision.image_size, vision.patch_size))
        or vision.num_channels != 3
    ):
        raise Inexpressible(
            f"{name}: open_clip takes RGB images, patches here are {vision.patch_size}"
        )
    if not isinstance(text.eos_token_id, int):
        raise Inexpressible(f"{name}: open_clip pools at one id, not at any of {text.eos_token_id}")
    at_largest = text.eos_token_id in (LARGEST_ID, text.vocab_size - 1)
    return {
        "embed_dim": config.projection_dim,
        **({"quick_gelu": True} if quick else {}),
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": options.ratio(vision),
            **vision_act,
            **options.norm(vision.layer_norm_eps),
        },
        "text_cfg": {
            **options.text_tower(text),
            **({} if at_largest else {"pool_type": "eos", "eos_id": text.eos_token_id}),
            **text_act,
        },
    }
