"""Writes one folder that both transformers and open_clip load; their files do not overlap."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipsmall.data.preprocess import ImageSpec
from clipsmall.export.conversion import to_open_clip, to_transformers
from clipsmall.export.tokenizer import (
    is_clip_tokenizer,
    prepared_for_transformers,
    transformers_tokenizer_of,
)
from clipsmall.export.weights import Inexpressible, Tensors
from clipsmall.model.towers import Loaded
from clipsmall.storage import atomic

# (libraries that load the folder, notes for the card on what another library lacks)
Written = tuple[list[str], list[str]]


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `target` on success and deleted on an error.

    Raises:
        ValueError: `target` exists or is not writable.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target}: is there already; give --to a new folder")
    try:
        with atomic.new_folder(target) as partial:
            yield partial
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror or error})") from None


def write_model(loaded: Loaded, scalars: Tensors, name: str, folder: Path) -> Written:
    """Write config, weights, tokenizer and preprocessing for each library that has such a model.

    Args:
        loaded: towers of transformers or open_clip, with adapters already merged.
        scalars: logit_scale (its log) and, if it is learned or the model has one, logit_bias.
        name: the model's name (its hub id, if it gets one): for messages, and for a Hugging Face
            tokenizer in open_clip's config.
        folder: an existing, empty folder.

    Returns:
        See `Written`.

    Raises:
        ValueError: towers that neither library has.
    """
    kind = loaded.towers.kind
    write = WRITERS.get(kind)
    if write is None:
        raise ValueError(
            f"{name}: {kind} towers are in neither library; share the run's checkpoint instead"
        )
    model: Any = loaded.towers.model
    return write(loaded, {**model.state_dict(), **scalars}, name, folder)


def _write_from_transformers(loaded: Loaded, tensors: Tensors, name: str, folder: Path) -> Written:
    """Write a transformers model as it is, and converted for open_clip."""
    model: Any = loaded.towers.model
    tokenize: Any = loaded.tokenize
    config = model.config.to_dict()
    notes = []
    own = dict(tensors)
    if config["model_type"] == "siglip":
        # SiglipModel's scalars have shape (1,)
        for key in ("logit_scale", "logit_bias"):
            own[key] = tensors[key].reshape(1)
    elif own.pop("logit_bias", None) is not None:
        notes.append(_bias_note(tensors))
    # SigLIP was trained without an attention mask
    has_mask = config["model_type"] == "clip"
    tokenizer = prepared_for_transformers(tokenize.tokenizer, tokenize.length, has_mask)
    _write_transformers(config, own, tokenizer, loaded.spec, folder)
    try:
        converted, weights = to_open_clip(config, tensors, name)
    except Inexpressible as error:
        return ["transformers"], [*notes, f"For transformers alone: {error}."]
    # open_clip has CLIP's tokenizer built in, and loads any other by name
    if not is_clip_tokenizer(tokenizer):
        converted["text_cfg"]["hf_tokenizer_name"] = name
    _write_open_clip(converted, weights, loaded.spec, folder)
    return ["transformers", "open_clip"], notes


def _write_from_open_clip(loaded: Loaded, tensors: Tensors, name: str, folder: Path) -> Written:
    """Write an open_clip model as it is, and converted for transformers."""
    loaded.save_files(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    if "multimodal_cfg" in config:
        raise ValueError(
            f"{name}: a CoCa lost its captioner when it was loaded here; open_clip's needs it"
        )
    if "logit_bias" in tensors:
        config["init_logit_bias"] = tensors["logit_bias"].item()
    _write_open_clip(config, tensors, loaded.spec, folder)
    try:
        converted, weights = to_transformers(config, tensors, name)
        has_mask = converted["model_type"] == "clip"
        theirs, length = transformers_tokenizer_of(loaded.tokenize, name)
        tokenizer = prepared_for_transformers(theirs, length, has_mask)
        _write_transformers(converted, weights, tokenizer, loaded.spec, folder)
    except Inexpressible as error:
        return ["open_clip"], [f"For open_clip alone: {error}."]
    lost_bias = "logit_bias" in tensors.keys() - weights.keys()
    return ["transformers", "open_clip"], [_bias_note(tensors)] if lost_bias else []


# kind of towers -> writer
WRITERS: dict[str, Callable[[Loaded, Tensors, str, Path], Written]] = {
    "transformers": _write_from_transformers,
    "open_clip": _write_from_open_clip,
}


def _bias_note(tensors: Tensors) -> str:
    bias = tensors["logit_bias"].item()
    return (
        f"transformers' CLIPModel has no logit_bias: add {bias:.6g} to its logits before a "
        "sigmoid. No ranking and no softmax depends on it; open_clip has it."
    )


def _write_transformers(
    config: dict[str, Any], tensors: Tensors, tokenizer: Any, spec: ImageSpec, folder: Path
) -> None:
    """Write config.json, model.safetensors, tokenizer and processor."""
    import transformers

    family = {"clip": "CLIP", "siglip": "Siglip"}[config["model_type"]]
    made = getattr(transformers, f"{family}Config").from_dict(config)
    made.architectures = [f"{family}Model"]
    made.dtype = "float32"
    made.save_pretrained(folder)
    _save_tensors(tensors, folder / "model.safetensors")
    images = image_processor(spec)
    getattr(transformers, f"{family}Processor")(images, tokenizer).save_pretrained(folder)
    # preprocessor_config.json, for AutoImageProcessor of transformers 4
    images.save_pretrained(folder)


def image_processor(spec: ImageSpec) -> Any:
    """The transformers image processor that gives the same pixels."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    square = {"height": spec.size, "width": spec.size}
    pixels = {
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": {"bilinear": 2, "bicubic": 3}[spec.interpolation],
    }
    if spec.resize == "squash":
        return SiglipImageProcessor(size=square, **pixels)
    return CLIPImageProcessor(size={"shortest_edge": spec.size}, crop_size=square, **pixels)


def _write_open_clip(
    config: dict[str, Any], tensors: Tensors, spec: ImageSpec, folder: Path
) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors."""
    preprocess = {
        "size": spec.size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize,
    }
    both = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(both, indent=2) + "\n")
    _save_tensors(tensors, folder / "open_clip_model.safetensors")


def _save_tensors(tensors: Tensors, path: Path) -> None:
    # copy, as safetensors refuses tied weights, which share memory
    plain = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(plain, path, {"format": "pt"})
    # safetensors writes with mode 0600, so that other users could not load the model
    path.chmod(0o644)
