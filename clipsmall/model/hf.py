"""The towers of a HF `CLIPModel` or `SiglipModel`, with its own tokenizer and preprocessing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.towers import Loaded, taken_over

# unset, transformers asks who sits at a terminal
OUR_CODE = {"trust_remote_code": False}


@dataclass
class HFTokenize:
    """A HF tokenizer, always padded to its model's length (SigLIP was trained so). A class, so that
    it can be sent to loader processes that are spawned, not forked."""

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


class HFTowers(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    def text(self, ids: Tensor) -> Tensor:
        # no attention mask: CLIP is causal and pools before its padding, SigLIP was trained with
        # padding in sight
        features: Tensor = self.model.get_text_features(input_ids=ids).pooler_output
        return features


def from_transformers(name: str, weights: bool = True) -> Loaded:
    """A HF `CLIPModel` or `SiglipModel` from a folder or the hub, in float32, with its tokenizer
    and processor.

    Raises:
        ValueError: not there, not a CLIP or SigLIP, or preprocessing we do not speak.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, **OUR_CODE)
        if config.model_type not in ("clip", "siglip"):
            raise ValueError(
                f"{name}: a {config.model_type!r} model; only clip and siglip are dual encoders we know"
            )
        if weights:
            model, found = AutoModel.from_pretrained(
                name, output_loading_info=True, dtype=torch.float32, **OUR_CODE
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(
                    f"{name}: its files lack {len(missing)} of the model's weights ({missing[0]} …), it would be random"
                )
        else:
            model = AutoModel.from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name, **OUR_CODE)
        processor = AutoImageProcessor.from_pretrained(name, **OUR_CODE)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name}: neither a folder nor a hub id that transformers can load ({error})"
        ) from None
    # what transformers makes of missing files
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{name}: has no tokenizer (tokenizer.json)")

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
        config.save_pretrained(folder)

    scale, bias = taken_over(model, fresh=not weights)
    return Loaded(
        towers=HFTowers(model),
        spec=_hf_image_spec(name, processor.to_dict()),
        tokenize=HFTokenize(tokenizer, config.text_config.max_position_embeddings),
        logit_scale=scale,
        logit_bias=bias,
        description={"kind": "transformers", "revision": getattr(config, "_commit_hash", None)},
        save_tokenizer=save,
    )


def _hf_image_spec(name: str, processor: dict[str, Any]) -> ImageSpec:
    size = dict(processor["size"])
    crop = dict(processor.get("crop_size") or {})
    edge = size.get("shortest_edge")
    side = edge or size.get("height")
    interpolation = {2: "bilinear", 3: "bicubic"}.get(int(processor["resample"]))
    square = (
        crop.get("height") == crop.get("width") == edge
        if edge
        else size.get("height") == size.get("width")
    )
    if side is None or interpolation is None or not square:
        raise ValueError(
            f"{name}: preprocessing with size {size}, crop {crop}, resample {processor['resample']} is not supported"
        )
    steps = ["do_resize", "do_rescale", "do_normalize", *(["do_center_crop"] if edge else [])]
    off = [step for step in steps if not processor[step]]
    if off or abs(processor["rescale_factor"] * 255 - 1) > 1e-6:
        raise ValueError(
            f"{name}: preprocessing without {', '.join(off) or 'rescaling by 1/255'} is not supported"
        )
    mean = processor["image_mean"]
    std = processor["image_std"]
    return ImageSpec(side, tuple(mean), tuple(std), interpolation, "shortest" if edge else "squash")  # type: ignore[arg-type]
