"""The options of a tower in open_clip's words, and which of them transformers has words for."""

from dataclasses import asdict
from typing import Any

from clipsmall.export.weights import Inexpressible

# of no effect on what a trained model computes: dropout, where pretrained parts came from,
# tokenizer, unused marks
SILENT = {
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
TOP = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
}


def tower(config: dict[str, Any], side: str, converted: set[str], name: str) -> dict[str, Any]:
    """All options of one tower of an open_clip `model_cfg`, defaults filled in.

    Args:
        side: "vision" or "text".
        converted: options that the caller translates; any other must have its default.

    Raises:
        Inexpressible: an option that transformers does not have.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if odd := sorted(config.keys() - TOP):
        raise Inexpressible(
            f"{name}: transformers' CLIP and SigLIP have no {odd[0]} (CoCa is another model)"
        )
    kind = CLIPVisionCfg if side == "vision" else CLIPTextCfg
    given = asdict(kind(**config[f"{side}_cfg"]))
    plain = asdict(kind())
    for key, value in given.items():
        if key not in converted | SILENT and value != plain[key]:
            raise Inexpressible(
                f"{name}: transformers' CLIP and SigLIP have no {side} tower with {key}={value!r}; "
                "only plain ViTs with CLIP's or SigLIP's own text tower are in both libraries"
            )
    return given


def activation(quick_gelu: bool, act_kwargs: dict[str, Any] | None, name: str) -> str:
    """transformers' `hidden_act` for open_clip's options. Raises Inexpressible."""
    for hidden_act, (quick, kwargs) in ACTIVATIONS.items():
        if quick == quick_gelu and kwargs == (act_kwargs or {}):
            return hidden_act
    raise Inexpressible(
        f"{name}: transformers has no activation for quick_gelu={quick_gelu}, act_kwargs={act_kwargs}"
    )


ACTIVATIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "quick_gelu": (True, {}),
    "gelu": (False, {}),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
}


def hidden_act(config: Any, name: str) -> tuple[bool, dict[str, Any]]:
    """open_clip's (quick_gelu, act_kwargs as part of a tower's config) for a tower of transformers.

    Raises:
        Inexpressible: open_clip has no such activation.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise Inexpressible(f"{name}: open_clip has no activation {config.hidden_act!r}")
    quick, kwargs = ACTIVATIONS[config.hidden_act]
    return quick, {"act_kwargs": kwargs} if kwargs else {}


def norm(eps: float) -> dict[str, Any]:
    """open_clip's option for LayerNorms of this eps; 1e-5 is its default."""
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def ratio(config: Any) -> float:
    """open_clip's `mlp_ratio`, from which it takes int(width * ratio) rows: of 4304/1152 that is
    one too few.
    """
    wanted = config.intermediate_size
    width = config.hidden_size
    exact: float = wanted / width
    return exact if int(width * exact) == wanted else (wanted + 0.5) / width


def sides(given: dict[str, Any], heads: int, act: str) -> dict[str, Any]:
    """What a tower of transformers calls width, depth, heads, MLP, activation and eps of an
    open_clip tower.
    """
    return {
        "hidden_size": given["width"],
        "intermediate_size": int(given["width"] * given["mlp_ratio"]),
        "num_hidden_layers": given["layers"],
        "num_attention_heads": heads,
        "hidden_act": act,
        "layer_norm_eps": (given["norm_kwargs"] or {}).get("eps", 1e-5),
    }


def text_tower(text: Any) -> dict[str, Any]:
    """What open_clip's `text_cfg` says of the sizes of a text tower of transformers."""
    return {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": ratio(text),
        **norm(text.layer_norm_eps),
    }
