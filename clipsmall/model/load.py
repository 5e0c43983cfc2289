"""Towers by the name a user gives, and from the files that a checkpoint keeps."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model import lora
from clipsmall.model.hf import from_transformers
from clipsmall.model.small import SmallConfig, WordTokenizer
from clipsmall.model.towers import Loaded, from_open_clip, small


def load_towers(name: str, pretrained: str, captions: Callable[[], Iterable[str]]) -> Loaded:
    """Towers by what the user names.

    Args:
        name: a tower JSON of ours (`"kind": "small"`), an open_clip model name or model JSON, a
            folder, or a hub id of transformers; `open_clip:` or `hf:` in front decides where it is
            unclear.
        pretrained: an open_clip tag, "" for the default (a folder or hub id brings its weights, an
            open_clip name none), "none" for an architecture with fresh weights.
        captions: the training captions, from which our own towers learn their vocabulary.

    Raises:
        ValueError: nothing of that name, or a broken description.
    """
    weights = pretrained != "none"
    tag = pretrained if weights else ""
    path = Path(name)
    if name.startswith("open_clip:"):
        return from_open_clip(name.removeprefix("open_clip:"), tag, weights)
    if name.startswith("hf:"):
        return from_transformers(name.removeprefix("hf:"), weights)
    if path.suffix == ".json":
        description = _json(path)
        if description.get("kind") != "small":
            if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(description):
                raise ValueError(
                    f'{name}: neither a tower JSON of ours ("kind": "small") nor an open_clip model config '
                    "(embed_dim, vision_cfg, text_cfg)"
                )
            return from_open_clip(name, tag, weights)
        try:
            config = SmallConfig.model_validate(description)
        except ValidationError as error:
            raise ValueError(f"{name}: {error}") from None
        return small(config, WordTokenizer.train(captions(), config.text))
    if (path / "towers.json").exists() or (path / "run.yaml").exists():
        raise ValueError(
            f"{name}: a run or checkpoint of ours; continue it with --resume, or start from its export: "
            f"python -m clipsmall.export {name} --to FOLDER"
        )
    if (path / "open_clip_config.json").exists():
        return from_open_clip(f"local-dir:{name}", tag, weights)
    if path.is_dir():
        return from_transformers(name, weights)
    import open_clip

    if name in open_clip.list_models():
        return from_open_clip(name, tag, weights)
    if "/" in name:
        return from_transformers(name, weights)
    raise ValueError(
        f"{name!r} is no tower JSON, folder, open_clip model or hub id; see open_clip.list_models()"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return found


def rebuild(folder: Path) -> Loaded:
    """The architecture and tokenizer that `save_model_files` wrote into a checkpoint folder, with
    fresh weights.
    """
    description = _json(folder / "towers.json")
    if description["kind"] == "small":
        config = SmallConfig.model_validate(description["config"])
        loaded = small(
            config, WordTokenizer.load(folder / "tokenizer.json", config.text.context_length)
        )
    elif description["kind"] == "open_clip":
        loaded = from_open_clip(f"local-dir:{folder}", "", weights=False)
    else:
        loaded = from_transformers(str(folder), weights=False)
    spec = description["spec"]
    for kept in (
        "retrieval",
        "base",
        "pretrained",
        "revision",
        "largest_scale",
        "relative_bias",
        "lora",
    ):
        if kept in description:
            loaded.description[kept] = description[kept]
    if "lora" in description:
        lora.insert(
            loaded.towers.model, description["lora"]["targets"], description["lora"]["options"]
        )
    loaded.spec = ImageSpec(**{**spec, "mean": tuple(spec["mean"]), "std": tuple(spec["std"])})
    return loaded


def save_model_files(loaded: Loaded, folder: Path) -> None:
    """What `rebuild` needs, beside the weights."""
    loaded.save_tokenizer(folder)
    (folder / "towers.json").write_text(
        json.dumps({**loaded.description, "spec": asdict(loaded.spec)}, indent=2)
    )
