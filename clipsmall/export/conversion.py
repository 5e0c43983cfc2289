"""Converts configs and weights of dual encoders between open_clip and transformers."""

from typing import Any

from torch import Tensor

from clipsmall.export import clip, siglip
from clipsmall.export.weights import Inexpressible, Tensors, renamed


def to_transformers(
    config: dict[str, Any], tensors: Tensors, name: str
) -> tuple[dict[str, Any], Tensors]:
    """Convert an open_clip model to transformers' `CLIPModel` or `SiglipModel`, bit for bit.

    A CLIPModel has no logit_bias, so it is dropped (a constant, which changes no ranking).

    Args:
        config: open_clip's `model_cfg`.
        tensors: the state dict.
        name: the model's name, for messages.

    Returns:
        The content of config.json and of model.safetensors.

    Raises:
        Inexpressible: (a ValueError) transformers has no such model.
    """
    tensors, scalars = _without_scalars(tensors)
    # 12 is open_clip's default
    text_layers = config["text_cfg"].get("layers", 12)
    if siglip.is_siglip(config):
        made = siglip.siglip_for_transformers(config, name)
        vision_layers = made["vision_config"]["num_hidden_layers"]
        names = siglip.siglip_names(vision_layers, text_layers)
        # SiglipModel's scalars have shape (1,)
        kept = {key: value.reshape(1) for key, value in scalars.items()}
    else:
        made = clip.clip_for_transformers(config, name)
        vision_layers = config["vision_cfg"].get("layers", 12)
        names = clip.clip_names(vision_layers, text_layers, config.get("custom_text", False))
        kept = {key: value.reshape(()) for key, value in scalars.items() if key == "logit_scale"}
    weights = renamed(tensors, names, "transformers", name)
    for key, value in kept.items():
        weights[key] = value.clone()
    return made, weights


def to_open_clip(
    config: dict[str, Any], tensors: Tensors, name: str
) -> tuple[dict[str, Any], Tensors]:
    """Convert transformers' `CLIPModel` or `SiglipModel` to open_clip, bit for bit.

    Args:
        config: the content of config.json; missing fields are transformers' defaults.
        tensors: the state dict; a logit_bias is kept, also for a CLIP.
        name: the model's name, for messages.

    Returns:
        The `model_cfg` of open_clip_config.json and the content of open_clip_model.safetensors.

    Raises:
        Inexpressible: (a ValueError) open_clip has no such model.
    """
    from transformers import CLIPConfig, SiglipConfig

    if config["model_type"] not in ("clip", "siglip"):
        raise Inexpressible(
            f"{name}: a {config['model_type']!r} model; only clip and siglip are converted"
        )
    tensors, scalars = _without_scalars(tensors)
    if config["model_type"] == "siglip":
        read = SiglipConfig.from_dict(config)
        made = siglip.siglip_for_open_clip(read, name)
        names = siglip.siglip_names(
            read.vision_config.num_hidden_layers, read.text_config.num_hidden_layers
        )
    else:
        read = CLIPConfig.from_dict(config)
        made = clip.clip_for_open_clip(read, name)
        names = clip.clip_names(
            read.vision_config.num_hidden_layers,
            read.text_config.num_hidden_layers,
            custom_text=False,
        )
    if "logit_bias" in scalars:
        made["init_logit_bias"] = scalars["logit_bias"].item()
    weights = renamed(tensors, names, "open_clip", name)
    for key, value in scalars.items():
        weights[key] = value.reshape(()).clone()
    return made, weights


def _without_scalars(tensors: Tensors) -> tuple[Tensors, dict[str, Tensor]]:
    """(tensors of the towers, logit_scale and logit_bias)."""
    towers = dict(tensors)
    scalars = {}
    for key in ("logit_scale", "logit_bias"):
        value = towers.pop(key, None)
        if value is not None:
            scalars[key] = value
    return towers, scalars
