"""Configs and weights of dual encoders, from open_clip to transformers and back."""

from typing import Any

from torch import Tensor

from clipsmall.export import clip, siglip
from clipsmall.export.weights import Inexpressible, Tensors, renamed


def to_transformers(
    config: dict[str, Any], tensors: Tensors, name: str
) -> tuple[dict[str, Any], Tensors]:
    """An open_clip model as a `CLIPModel` or `SiglipModel` of transformers; no number changes.

    A CLIPModel has no logit_bias: it is left out (a constant; no ranking depends on it).

    Args:
        config: open_clip's `model_cfg`.
        tensors: its state dict.
        name: of the model, for messages.

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
        # both scalars, with an axis
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
    """A `CLIPModel` or `SiglipModel` of transformers as a model of open_clip; no number changes.

    Args:
        config: the content of config.json; what it leaves out is transformers' default.
        tensors: its state dict; a logit_bias beside a CLIP's weights comes along.
        name: of the model, for messages.

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
    """The towers' tensors; and scale and bias, of shape () in open_clip, (1,) in SiglipModel."""
    towers = dict(tensors)
    scalars = {}
    for key in ("logit_scale", "logit_bias"):
        value = towers.pop(key, None)
        if value is not None:
            scalars[key] = value
    return towers, scalars
