"""Converts the options of a tower between open_clip's and transformers' names."""

from dataclasses import asdict
from typing import Any

from clipsmall.export.weights import Inexpressible

# Options that do not affect what a trained model computes: dropout, origin of pretrained parts,
# tokenizer, unused ids.
WITHOUT_EFFECT = {
    "patch_dropout",
    "pos_embed_type",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "hf_model_pretrained",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
    "pad_id",
    "eos_id",
}
# Known keys at the top level of a `model_cfg`.
TOP_LEVEL = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
}


def tower_options(
    config: dict[str, Any], side: str, converted: set[str], name: str
) -> dict[str, Any]:
    """All options of one tower of an open_clip `model_cfg`, with defaults filled in.

    Args:
        side: "vision" or "text".
        converted: options that the caller translates; any other must have its default.
        name: the model's name, for messages.

    Raises:
        Inexpressible: an option that transformers does not have.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    unknown = sorted(config.keys() - TOP_LEVEL)
    if unknown:
        raise Inexpressible(
            f"{name}: transformers' CLIP and SigLIP have no {unknown[0]} (CoCa is another model)"
        )
    section = CLIPVisionCfg if side == "vision" else CLIPTextCfg
    given = asdict(section(**config[f"{side}_cfg"]))
    defaults = asdict(section())
    for key, value in given.items():
        if key in converted or key in WITHOUT_EFFECT:
            continue
        if value != defaults[key]:
            raise Inexpressible(
                f"{name}: transformers' CLIP and SigLIP have no {side} tower with {key}={value!r}; "
                "only plain ViTs with CLIP's or SigLIP's own text tower are in both libraries"
            )
    return given


# transformers' hidden_act -> open_clip's quick_gelu and act_kwargs
ACTIVATIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "quick_gelu": (True, {}),
    "gelu": (False, {}),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
}


def activation(quick_gelu: bool, act_kwargs: dict[str, Any] | None, name: str) -> str:
    """transformers' `hidden_act` for open_clip's options. Raises Inexpressible."""
    for hidden_act, (quick, kwargs) in ACTIVATIONS.items():
        if quick == quick_gelu and kwargs == (act_kwargs or {}):
            return hidden_act
    raise Inexpressible(
        f"{name}: transformers has no activation for quick_gelu={quick_gelu}, "
        f"act_kwargs={act_kwargs}"
    )


def open_clip_activation(config: Any, name: str) -> tuple[bool, dict[str, Any]]:
    """open_clip's options for the activation of a transformers tower.

    Returns:
        quick_gelu, which applies to the whole model, and act_kwargs for the tower's section.

    Raises:
        Inexpressible: open_clip has no such activation.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise Inexpressible(f"{name}: open_clip has no activation {config.hidden_act!r}")
    quick, kwargs = ACTIVATIONS[config.hidden_act]
    section = {"act_kwargs": kwargs} if kwargs else {}
    return quick, section


def norm_option(eps: float) -> dict[str, Any]:
    """open_clip's option for this LayerNorm eps; {} for its default, 1e-5."""
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def mlp_ratio(config: Any) -> float:
    """open_clip's `mlp_ratio` for a transformers tower.

    open_clip computes int(width * ratio) rows, which for 4304 / 1152 is one too few; then the ratio
    is for half a row more.
    """
    rows = config.intermediate_size
    width = config.hidden_size
    exact: float = rows / width
    if int(width * exact) == rows:
        return exact
    rounded_up: float = (rows + 0.5) / width
    return rounded_up


def transformers_sizes(tower: dict[str, Any], heads: int, act: str) -> dict[str, Any]:
    """Width, depth, heads, MLP, activation and eps of an open_clip tower, for transformers.

    Args:
        tower: the result of `tower_options`.
    """
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "hidden_act": act,
        "layer_norm_eps": (tower["norm_kwargs"] or {}).get("eps", 1e-5),
    }


def open_clip_text_sizes(text: Any) -> dict[str, Any]:
    """The sizes of a transformers text tower, under the names of open_clip's `text_cfg`."""
    return {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": mlp_ratio(text),
        **norm_option(text.layer_norm_eps),
    }
