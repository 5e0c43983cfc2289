"""Weights and configs of dual encoders, from open_clip to transformers and back."""

from typing import Any

from torch import Tensor

from clipsmall.export import clip, siglip
from clipsmall.export.weights import Inexpressible, Tensors, renamed

__all__ = ["Inexpressible", "to_open_clip", "to_transformers"]


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
    tensors, scalars = _apart(tensors)
    text_layers = config["text_cfg"].get("layers", 12)
    if siglip.is_siglip(config):
        made = siglip.to_transformers(config, name)
        pairs = siglip.pairs(made["vision_config"]["num_hidden_layers"], text_layers)
        kept = {key: value.reshape(1) for key, value in scalars.items()}
    else:
        made = clip.to_transformers(config, name)
        pairs = clip.pairs(
            config["vision_cfg"].get("layers", 12), text_layers, config.get("custom_text", False)
        )
        kept = {key: value.reshape(()) for key, value in scalars.items() if key == "logit_scale"}
    found = renamed(tensors, pairs, "transformers", name)
    return made, found | {key: value.clone() for key, value in kept.items()}


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
    is_siglip = config["model_type"] == "siglip"
    read = (SiglipConfig if is_siglip else CLIPConfig).from_dict(config)
    tensors, scalars = _apart(tensors)
    depths = read.vision_config.num_hidden_layers, read.text_config.num_hidden_layers
    made = siglip.to_open_clip(read, name) if is_siglip else clip.to_open_clip(read, name)
    pairs = siglip.pairs(*depths) if is_siglip else clip.pairs(*depths, custom_text=False)
    if "logit_bias" in scalars:
        made["init_logit_bias"] = scalars["logit_bias"].item()
    found = renamed(tensors, pairs, "open_clip", name)
    return made, found | {key: value.reshape(()).clone() for key, value in scalars.items()}


def _apart(tensors: Tensors) -> tuple[Tensors, dict[str, Tensor]]:
    """Towers, and scale and bias, whose shape is () here and (1,) there."""
    scalars = {
        key: tensors[key] for key in ("logit_scale", "logit_bias") if tensors.get(key) is not None
    }
    return {key: value for key, value in tensors.items() if key not in scalars}, scalars
