"""Where towers come from, each with tokenizer and preprocessing: our small ones, or open_clip (HF:
hf_towers).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.small import SmallConfig, SmallTowers, WordTokenizer


@dataclass
class Loaded:
    """Towers with all that belongs to them."""

    # a module with image(pixels) and text(ids)
    towers: Any
    spec: ImageSpec
    tokenize: Callable[[list[str]], Tensor]
    # what the weights were trained with; None = fresh
    logit_scale: float | None
    logit_bias: float | None
    # JSON from which `rebuild` makes the same architecture
    description: dict[str, Any]
    save_tokenizer: Callable[[Path], None]
    # blocks make their activations anew
    checkpointed: bool = False


# ---- ours
# ------------------------------------------------------------------------------------------------------


def small(config: SmallConfig, tokenizer: WordTokenizer) -> Loaded:
    image = config.image

    def save(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")

    return Loaded(
        towers=SmallTowers(config),
        spec=ImageSpec(image.size, image.mean, image.std),
        tokenize=tokenizer,
        logit_scale=None,
        logit_bias=None,
        description={"kind": "small", "config": config.model_dump(mode="json")},
        save_tokenizer=save,
    )


# ---- open_clip
# -------------------------------------------------------------------------------------------------


class OpenClipTowers(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    def text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids)
        return features


def taken_over(model: Any, fresh: bool) -> tuple[float | None, float | None]:
    """Scale and bias of a library's model. They are removed there: DDP refuses parameters that
    nothing uses.
    """
    scale = model.logit_scale.exp().item()
    bias = model.logit_bias.item() if getattr(model, "logit_bias", None) is not None else None
    for name in ("logit_scale", "logit_bias"):
        if isinstance(getattr(model, name, None), nn.Parameter):
            delattr(model, name)
    return (None, None) if fresh else (scale, bias)


def from_open_clip(name: str, pretrained: str, weights: bool = True) -> Loaded:
    """An open_clip model by name, by a model JSON, or by `local-dir:FOLDER`.

    Args:
        pretrained: a weight tag or file of open_clip, "" for none.
        weights: False builds the architecture alone, to load our own weights into.

    Raises:
        ValueError: no such model or weights.
    """
    import open_clip

    given = name
    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    fresh = not weights or (not pretrained and not name.startswith(("local-dir:", "hf-hub:")))
    try:
        _refuse_code(given, _open_clip_config(name) or {})
        model = open_clip.create_model(
            name,
            pretrained=pretrained or None,
            load_weights=weights,
            require_pretrained=not fresh,
            pretrained_text=weights,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        # a wrong value in a model JSON surfaces as anything
        reason = str(error).split(" Available: ")[0]
        raise ValueError(
            f"open_clip cannot make model {given!r} with pretrained={pretrained!r}: {reason}"
        ) from None
    found = open_clip.get_model_preprocess_cfg(model)
    spec = _open_clip_spec(given, found)
    config = _open_clip_config(name)
    scale, bias = taken_over(model, fresh)
    if getattr(model, "text_decoder", None) is not None:
        model.text_decoder = (
            # CoCa's captioner: no contrastive loss trains it, and DDP refuses idle parameters
            None
        )

    def save(folder: Path) -> None:
        both = {"model_cfg": config, "preprocess_cfg": dict(found)}
        (folder / "open_clip_config.json").write_text(json.dumps(both, indent=2))
        # of transformers; open_clip brings the others itself
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)

    return Loaded(
        towers=OpenClipTowers(model),
        spec=spec,
        tokenize=tokenizer,
        logit_scale=scale,
        logit_bias=bias,
        description={"kind": "open_clip"},
        save_tokenizer=save,
    )


def _refuse_code(name: str, config: dict[str, Any]) -> None:
    """open_clip hands a model's own tokenizer_kwargs on to transformers, which would run code that
    lies beside it.
    """
    if "trust_remote_code" in json.dumps(config):
        raise ValueError(
            f"{name}: its config asks for trust_remote_code; no code of a model is run here"
        )


def _open_clip_spec(name: str, found: dict[str, Any]) -> ImageSpec:
    size = found["size"] if isinstance(found["size"], int) else found["size"][0]
    if found["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(
            f"open_clip model {name!r} resizes by {found['resize_mode']!r}; we do shortest and squash"
        )
    return ImageSpec(
        size,
        tuple(found["mean"]),
        tuple(found["std"]),
        found["interpolation"],
        resize=found["resize_mode"],
    )


def _open_clip_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        text = (Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text()
        local: dict[str, Any] = json.loads(text)["model_cfg"]
        return local
    named: dict[str, Any] = open_clip.get_model_config(name)
    return named
