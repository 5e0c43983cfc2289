"""Where towers come from: our small ones, open_clip, or a HF CLIP or SigLIP; each with tokenizer and preprocessing."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clipsmall.preprocess import ImageSpec
from clipsmall.small_towers import SmallConfig, SmallTowers, WordTokenizer


@dataclass
class Loaded:
    """Towers with all that belongs to them."""

    towers: nn.Module
    spec: ImageSpec
    tokenize: Callable[[list[str]], Tensor]
    logit_scale: float | None  # what the weights were trained with; None = fresh
    logit_bias: float | None
    description: dict[str, Any]  # JSON from which `rebuild` makes the same architecture
    save_tokenizer: Callable[[Path], None]


# ---- ours ------------------------------------------------------------------------------------------------------


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


# ---- open_clip -------------------------------------------------------------------------------------------------


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
    """Scale and bias of a library's model. They are removed there: DDP refuses parameters that nothing uses."""
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
        model = open_clip.create_model(
            name,
            pretrained=pretrained or None,
            load_weights=weights,
            require_pretrained=not fresh,
            pretrained_text=weights,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a wrong value in a model JSON surfaces as anything
        reason = str(error).split(" Available: ")[0]
        raise ValueError(f"open_clip cannot make model {given!r} with pretrained={pretrained!r}: {reason}") from None
    found = open_clip.get_model_preprocess_cfg(model)
    size = found["size"] if isinstance(found["size"], int) else found["size"][0]
    resize = {"shortest": "shortest", "squash": "squash"}.get(found["resize_mode"])
    if resize is None:
        raise ValueError(
            f"open_clip model {given!r} resizes by {found['resize_mode']!r}; shortest and squash are supported"
        )
    spec = ImageSpec(size, tuple(found["mean"]), tuple(found["std"]), found["interpolation"], resize)  # type: ignore[arg-type]
    config = _open_clip_config(name)
    scale, bias = taken_over(model, fresh)

    def save(folder: Path) -> None:
        both = {"model_cfg": config, "preprocess_cfg": dict(found)}
        (folder / "open_clip_config.json").write_text(json.dumps(both, indent=2))
        if hasattr(tokenizer, "save_pretrained"):  # of transformers; open_clip brings the others itself
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


def _open_clip_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        text = (Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text()
        local: dict[str, Any] = json.loads(text)["model_cfg"]
        return local
    named: dict[str, Any] = open_clip.get_model_config(name)
    return named


# ---- transformers ----------------------------------------------------------------------------------------------


class HFTowers(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    def text(self, ids: Tensor) -> Tensor:
        # no attention mask: CLIP is causal and pools before its padding, SigLIP was trained with padding in sight
        features: Tensor = self.model.get_text_features(input_ids=ids).pooler_output
        return features


def from_transformers(name: str, weights: bool = True) -> Loaded:
    """A HF `CLIPModel` or `SiglipModel` from a folder or the hub, in float32, with its tokenizer and processor.

    Raises:
        ValueError: not there, not a CLIP or SigLIP, or preprocessing we do not speak.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in ("clip", "siglip"):
            raise ValueError(f"{name}: a {config.model_type!r} model; only clip and siglip are dual encoders we know")
        if weights:
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
        else:
            model = AutoModel.from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name}: neither a folder nor a hub id that transformers can load ({error})") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of missing files
        raise ValueError(f"{name}: has no tokenizer (tokenizer.json)")
    length = config.text_config.max_position_embeddings

    def tokenize(captions: list[str]) -> Tensor:
        ids: Tensor = tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return ids

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
        config.save_pretrained(folder)

    scale, bias = taken_over(model, fresh=not weights)
    return Loaded(
        towers=HFTowers(model),
        spec=_hf_image_spec(name, processor.to_dict()),
        tokenize=tokenize,
        logit_scale=scale,
        logit_bias=bias,
        description={"kind": "transformers"},
        save_tokenizer=save,
    )


def _hf_image_spec(name: str, processor: dict[str, Any]) -> ImageSpec:
    size, crop = dict(processor["size"]), dict(processor.get("crop_size") or {})
    edge = size.get("shortest_edge")
    side = edge or size.get("height")
    interpolation = {2: "bilinear", 3: "bicubic"}.get(int(processor["resample"]))
    square = crop.get("height") == crop.get("width") == edge if edge else size.get("height") == size.get("width")
    if side is None or interpolation is None or not square:
        raise ValueError(
            f"{name}: preprocessing with size {size}, crop {crop}, resample {processor['resample']} is not supported"
        )
    steps = ["do_resize", "do_rescale", "do_normalize", *(["do_center_crop"] if edge else [])]
    off = [step for step in steps if not processor[step]]
    if off or abs(processor["rescale_factor"] * 255 - 1) > 1e-6:
        raise ValueError(f"{name}: preprocessing without {', '.join(off) or 'rescaling by 1/255'} is not supported")
    mean, std = processor["image_mean"], processor["image_std"]
    return ImageSpec(side, tuple(mean), tuple(std), interpolation, "shortest" if edge else "squash")  # type: ignore[arg-type]
