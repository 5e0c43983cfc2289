"""Towers of a HF `CLIPModel` or `SiglipModel`, with its own tokenizer and preprocessing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.towers.base import LibraryTowers, Loaded, take_scale_and_bias

# stated, or transformers would ask whoever sits at the terminal
NO_FOREIGN_CODE = {"trust_remote_code": False}
# Pillow's numbers for resampling, as processors state them
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


@dataclass
class HFTokenize:
    """A HF tokenizer that always pads to its model's length, as SigLIP was trained.

    A class, so that it can be sent to loader processes that are spawned, not forked.
    """

    tokenizer: Any
    length: int

    def __call__(self, captions: list[str]) -> Tensor:
        ids: Tensor = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).input_ids
        return ids


class HFTowers(LibraryTowers):
    """The two towers of a `CLIPModel` or `SiglipModel`."""

    kind = "transformers"
    prefix = "hf:"

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    def text(self, ids: Tensor) -> Tensor:
        # no attention mask: CLIP is causal and pools before its padding, SigLIP was trained with
        # its padding in sight
        features: Tensor = self.model.get_text_features(input_ids=ids).pooler_output
        return features

    @classmethod
    def recognises(cls, name: str, description: dict[str, Any] | None) -> bool:
        return description is None and (Path(name).is_dir() or "/" in name)

    @classmethod
    def known_as(cls) -> str:
        return "folder or hub id of transformers"

    @classmethod
    def load(
        cls, name: str, tag: str, weights: bool, captions: Callable[[], Iterable[str]]
    ) -> Loaded:
        return load_transformers(name, weights)

    @classmethod
    def rebuild(cls, folder: Path, description: dict[str, Any]) -> Loaded:
        return load_transformers(str(folder), weights=False)

    @property
    def attention(self) -> str:
        return str(self.model.config._attn_implementation)

    def set_attention(self, way: str) -> None:
        self.model.set_attn_implementation(way)

    def checkpoint_activations(self) -> None:
        # transformers 5.23 renamed it
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        if enable is None:
            enable = self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    @property
    def family(self) -> str:
        return str(self.model.config.model_type)


def load_transformers(name: str, weights: bool = True) -> Loaded:
    """A HF `CLIPModel` or `SiglipModel` from a folder or the hub, in float32.

    Args:
        weights: False builds the architecture alone.

    Raises:
        ValueError: not there, not a CLIP or SigLIP, or preprocessing that we cannot do.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, **NO_FOREIGN_CODE)
        if config.model_type not in ("clip", "siglip"):
            raise ValueError(
                f"{name}: a {config.model_type!r} model; only clip and siglip are dual encoders "
                "we know"
            )
        model = _model(name, config, weights)
        tokenizer = AutoTokenizer.from_pretrained(name, **NO_FOREIGN_CODE)
        processor = AutoImageProcessor.from_pretrained(name, **NO_FOREIGN_CODE)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name}: neither a folder nor a hub id that transformers can load ({error})"
        ) from None
    # without its files transformers makes a tokenizer that knows its special tokens only
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{name}: has no tokenizer (tokenizer.json)")

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
        config.save_pretrained(folder)

    scale, bias = take_scale_and_bias(model, fresh=not weights)
    return Loaded(
        towers=HFTowers(model),
        spec=_image_spec(name, processor.to_dict()),
        tokenize=HFTokenize(tokenizer, config.text_config.max_position_embeddings),
        logit_scale=scale,
        logit_bias=bias,
        description={"revision": getattr(config, "_commit_hash", None)},
        save_files=save,
    )


def _model(name: str, config: Any, weights: bool) -> Any:
    """The library's model. Raises ValueError if its files lack some of its weights."""
    from transformers import AutoModel

    if not weights:
        return AutoModel.from_config(config, dtype=torch.float32)
    model, report = AutoModel.from_pretrained(
        name, output_loading_info=True, dtype=torch.float32, **NO_FOREIGN_CODE
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name}: its files lack {len(missing)} of the model's weights ({missing[0]} …), it "
            "would be random"
        )
    return model


def _image_spec(name: str, processor: dict[str, Any]) -> ImageSpec:
    """An image processor's options in our words.

    CLIP's resize the shortest edge and crop the middle, SigLIP's squash to a square.

    Raises:
        ValueError: a processor that does something else.
    """
    size = dict(processor["size"])
    crop = dict(processor.get("crop_size") or {})
    steps = ["do_resize", "do_rescale", "do_normalize"]
    edge = size.get("shortest_edge")
    if edge:
        side = edge
        square = crop.get("height") == crop.get("width") == edge
        steps.append("do_center_crop")
    else:
        side = size.get("height")
        square = size.get("height") == size.get("width")
    interpolation = INTERPOLATIONS.get(int(processor["resample"]))
    if side is None or interpolation is None or not square:
        raise ValueError(
            f"{name}: preprocessing with size {size}, crop {crop}, resample "
            f"{processor['resample']} is not supported"
        )
    off = [step for step in steps if not processor[step]]
    if off or abs(processor["rescale_factor"] * 255 - 1) > 1e-6:
        missing = ", ".join(off) or "rescaling by 1/255"
        raise ValueError(f"{name}: preprocessing without {missing} is not supported")
    return ImageSpec(
        side,
        tuple(processor["image_mean"]),
        tuple(processor["image_std"]),
        interpolation,  # type: ignore[arg-type]
        "shortest" if edge else "squash",
    )
