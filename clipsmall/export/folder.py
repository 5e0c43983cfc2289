"""A model's folder for transformers and open_clip at once: their files do not overlap."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipsmall.data.preprocess import ImageSpec
from clipsmall.export import Inexpressible, to_open_clip, to_transformers
from clipsmall.export.tokenizer import for_transformers, is_clips
from clipsmall.export.weights import Tensors
from clipsmall.model.towers import Loaded
from clipsmall.storage import atomic


@contextmanager
def complete(target: Path) -> Iterator[Path]:
    """A folder to fill that gets its name when all went well, and is deleted when not.

    Raises:
        ValueError: the name is taken, or cannot be written.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target}: is there already; give --to a new folder")
    try:
        with atomic.new_folder(target) as partial:
            yield partial
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror or error})") from None


def write(loaded: Loaded, scalars: Tensors, name: str, folder: Path) -> tuple[list[str], list[str]]:
    """Config, weights, tokenizer and preprocessing, for each library that has words for the model.

    Args:
        loaded: towers of transformers or open_clip with plain layers: adapters are merged before.
        scalars: logit_scale (its log) and, where it is learned or the model has one, logit_bias.
        name: of the model: in messages, and what open_clip's config calls a HF tokenizer (its hub
            id, if it gets one).
        folder: there, and empty.

    Returns:
        The libraries that load it, and why another does not or not all of it.

    Raises:
        ValueError: towers of our own, which neither library has.
    """
    kind = loaded.description["kind"]
    if kind == "small":
        raise ValueError(
            f"{name}: our small towers are in neither library; share the run's checkpoint instead"
        )
    tensors = {**loaded.towers.model.state_dict(), **scalars}
    convert = _from_transformers if kind == "transformers" else _from_open_clip
    return convert(loaded, tensors, name, folder)


def _from_transformers(
    loaded: Loaded, tensors: Tensors, name: str, folder: Path
) -> tuple[list[str], list[str]]:
    config = loaded.towers.model.config.to_dict()
    notes = []
    own = dict(tensors)
    # whose scalars have an axis
    if config["model_type"] == "siglip":
        own |= {key: tensors[key].reshape(1) for key in ("logit_scale", "logit_bias")}
    elif own.pop("logit_bias", None) is not None:
        notes.append(without_bias(tensors))
    tokenizer = _write_transformers(config, own, loaded, name, folder)
    try:
        theirs, weights = to_open_clip(config, tensors, name)
    except Inexpressible as error:
        return ["transformers"], [*notes, f"For transformers alone: {error}."]
    if not is_clips(tokenizer):
        theirs["text_cfg"]["hf_tokenizer_name"] = name
    _write_open_clip(theirs, weights, loaded.spec, folder)
    return ["transformers", "open_clip"], notes


def _from_open_clip(
    loaded: Loaded, tensors: Tensors, name: str, folder: Path
) -> tuple[list[str], list[str]]:
    loaded.save_tokenizer(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    if "multimodal_cfg" in config:
        raise ValueError(
            f"{name}: a CoCa lost its captioner when it was loaded here; open_clip's needs it"
        )
    if "logit_bias" in tensors:
        config["init_logit_bias"] = tensors["logit_bias"].item()
    _write_open_clip(config, tensors, loaded.spec, folder)
    try:
        theirs, weights = to_transformers(config, tensors, name)
        _write_transformers(theirs, weights, loaded, name, folder)
    except Inexpressible as error:
        return ["open_clip"], [f"For open_clip alone: {error}."]
    bias_lost = "logit_bias" in tensors.keys() - weights.keys()
    return ["transformers", "open_clip"], [without_bias(tensors)] if bias_lost else []


def without_bias(tensors: Tensors) -> str:
    bias = tensors["logit_bias"].item()
    return (
        f"transformers' CLIPModel has no logit_bias: add {bias:.6g} to its logits before a sigmoid. No ranking and no "
        "softmax depends on it; open_clip has it."
    )


def _write_transformers(
    config: dict[str, Any], tensors: Tensors, loaded: Loaded, name: str, folder: Path
) -> Any:
    """config.json, model.safetensors, tokenizer and processor; returns the tokenizer. Raises
    Inexpressible, at once.
    """
    import transformers

    kind = {"clip": "CLIP", "siglip": "Siglip"}[config["model_type"]]
    tokenizer = for_transformers(loaded.tokenize, kind == "CLIP", name)
    made = getattr(transformers, f"{kind}Config").from_dict(config)
    made.architectures = [f"{kind}Model"]
    made.dtype = "float32"
    made.save_pretrained(folder)
    _save(tensors, folder / "model.safetensors")
    images = image_processor(loaded.spec)
    getattr(transformers, f"{kind}Processor")(images, tokenizer).save_pretrained(folder)
    # preprocessor_config.json, for AutoImageProcessor of transformers 4
    images.save_pretrained(folder)
    return tokenizer


def image_processor(spec: ImageSpec) -> Any:
    """transformers' image processor for the same pixels."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    square = {"height": spec.size, "width": spec.size}
    looks = {
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": {"bilinear": 2, "bicubic": 3}[spec.interpolation],
    }
    if spec.resize == "squash":
        return SiglipImageProcessor(size=square, **looks)
    return CLIPImageProcessor(size={"shortest_edge": spec.size}, crop_size=square, **looks)


def _write_open_clip(
    config: dict[str, Any], tensors: Tensors, spec: ImageSpec, folder: Path
) -> None:
    preprocess = {
        "size": spec.size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize,
    }
    both = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(both, indent=2) + "\n")
    _save(tensors, folder / "open_clip_model.safetensors")


def _save(tensors: Tensors, path: Path) -> None:
    # tied weights: each by itself
    plain = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(plain, path, {"format": "pt"})
    # safetensors leaves 0600: nobody else could load what was exported
    path.chmod(0o644)


def family(loaded: Loaded) -> str:
    """clip or siglip; what is neither counts as clip, "" is for our own towers."""
    if loaded.description["kind"] == "transformers":
        return str(loaded.towers.model.config.model_type)
    if loaded.description["kind"] == "small":
        return ""
    trunk = getattr(loaded.towers.model.visual, "trunk", None)
    return "siglip" if getattr(trunk, "global_pool", "") == "map" else "clip"
