"""Towers of open_clip's models, with their tokenizer and preprocessing."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.towers.base import LibraryTowers, Loaded, take_scale_and_bias

# the keys of a model JSON of open_clip
CONFIG_KEYS = {"embed_dim", "vision_cfg", "text_cfg"}
# what open_clip itself writes before a folder's and a hub repository's name
LOCAL = "local-dir:"
HUB = "hf-hub:"


class OpenClipTowers(LibraryTowers):
    """`CLIP`, `CustomTextCLIP` or `CoCa` (without its captioner) of open_clip."""

    kind = "open_clip"
    prefix = "open_clip:"

    def image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    def text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids)
        return features

    @classmethod
    def recognises(cls, name: str, description: dict[str, Any] | None) -> bool:
        if description is not None:
            return set(description) >= CONFIG_KEYS
        if Path(name).is_dir():
            return _is_model_folder(name)
        import open_clip

        return name in open_clip.list_models()

    @classmethod
    def known_as(cls) -> str:
        keys = "embed_dim, vision_cfg, text_cfg"
        return f"open_clip model (see open_clip.list_models()), model config ({keys}) or folder"

    @classmethod
    def load(
        cls, name: str, tag: str, weights: bool, captions: Callable[[], Iterable[str]]
    ) -> Loaded:
        return load_open_clip(cls.name_in_library(name), tag, weights)

    @classmethod
    def rebuild(cls, folder: Path, description: dict[str, Any]) -> Loaded:
        return load_open_clip(f"{LOCAL}{folder}", "", weights=False)

    @classmethod
    def name_in_library(cls, name: str) -> str:
        name = super().name_in_library(name)
        return f"{LOCAL}{name}" if _is_model_folder(name) else name

    def checkpoint_activations(self) -> None:
        self.model.set_grad_checkpointing(True)

    @property
    def family(self) -> str:
        """As timm pools the image: only SigLIP pools by attention ("map")."""
        trunk = getattr(self.model.visual, "trunk", None)
        return "siglip" if getattr(trunk, "global_pool", "") == "map" else "clip"


def _is_model_folder(name: str) -> bool:
    return (Path(name) / "open_clip_config.json").exists()


def load_open_clip(name: str, tag: str, weights: bool = True) -> Loaded:
    """An open_clip model by name, by a model JSON, or by `local-dir:FOLDER`.

    Args:
        tag: a weight tag or file of open_clip, "" for none.
        weights: False builds the architecture alone, to load our own weights into.

    Raises:
        ValueError: no such model or weights.
    """
    import open_clip

    given = name
    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    fresh = not weights or (not tag and not name.startswith((LOCAL, HUB)))
    try:
        _refuse_code(given, _model_config(name) or {})
        model = open_clip.create_model(
            name,
            pretrained=tag or None,
            load_weights=weights,
            require_pretrained=not fresh,
            pretrained_text=weights,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        # a wrong value in a model JSON surfaces as any exception
        reason = str(error).split(" Available: ")[0]
        raise ValueError(
            f"open_clip cannot make model {given!r} with pretrained={tag!r}: {reason}"
        ) from None
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    spec = _image_spec(given, preprocessing)
    config = _model_config(name)
    scale, bias = take_scale_and_bias(model, fresh)
    if getattr(model, "text_decoder", None) is not None:
        # CoCa's captioner: no contrastive loss trains it, and DDP refuses parameters without a
        # gradient
        model.text_decoder = None

    def save(folder: Path) -> None:
        both = {"model_cfg": config, "preprocess_cfg": dict(preprocessing)}
        (folder / "open_clip_config.json").write_text(json.dumps(both, indent=2))
        # tokenizers of transformers; open_clip brings its own itself
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)

    return Loaded(
        towers=OpenClipTowers(model),
        spec=spec,
        tokenize=tokenizer,
        logit_scale=scale,
        logit_bias=bias,
        description={},
        save_files=save,
    )


def _refuse_code(name: str, config: dict[str, Any]) -> None:
    """Raise ValueError if the config would make transformers run code that lies beside the model.

    open_clip hands a model's tokenizer_kwargs on to transformers.
    """
    if "trust_remote_code" in json.dumps(config):
        raise ValueError(
            f"{name}: its config asks for trust_remote_code; no code of a model is run here"
        )


def _image_spec(name: str, preprocessing: dict[str, Any]) -> ImageSpec:
    """open_clip's `preprocess_cfg` in our words. Raises ValueError for what we cannot do."""
    size = preprocessing["size"]
    resize = preprocessing["resize_mode"]
    if resize not in ("shortest", "squash"):
        raise ValueError(
            f"open_clip model {name!r} resizes by {resize!r}; we do shortest and squash"
        )
    return ImageSpec(
        size if isinstance(size, int) else size[0],
        tuple(preprocessing["mean"]),
        tuple(preprocessing["std"]),
        preprocessing["interpolation"],
        resize=resize,
    )


def _model_config(name: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of a model or folder."""
    import open_clip

    if name.startswith(LOCAL):
        text = (Path(name.removeprefix(LOCAL)) / "open_clip_config.json").read_text()
        local: dict[str, Any] = json.loads(text)["model_cfg"]
        return local
    named: dict[str, Any] = open_clip.get_model_config(name)
    return named
