"""Towers by the name a user gives, and from the files of a checkpoint."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from clipsmall.data.preprocess import ImageSpec
from clipsmall.model import lora
from clipsmall.model.towers import TOWERS, Loaded
from clipsmall.model.towers.base import read_json

# keys that a run adds to a description and that must survive a resume
KEPT = ("retrieval", "base", "pretrained", "revision", "largest_scale", "relative_bias", "lora")


def load_towers(name: str, pretrained: str, captions: Callable[[], Iterable[str]]) -> Loaded:
    """Towers by what the user names.

    Args:
        name: a tower JSON (`"kind": "small"`), an open_clip model name or model JSON, a folder, or
            a hub id of transformers; the prefix `open_clip:` or `hf:` resolves ambiguous names.
        pretrained: an open_clip tag, "" for the default (a folder or hub id brings its weights, an
            open_clip name none), "none" for an architecture with fresh weights.
        captions: the training captions, from which small towers learn their vocabulary.

    Raises:
        ValueError: nothing of that name, or a broken description.
    """
    weights = pretrained != "none"
    tag = pretrained if weights else ""
    for kind in TOWERS.values():
        if kind.prefix and name.startswith(kind.prefix):
            return kind.load(name.removeprefix(kind.prefix), tag, weights, captions)
    path = Path(name)
    if (path / "towers.json").exists() or (path / "run.yaml").exists():
        raise ValueError(
            f"{name}: a run or checkpoint of ours; continue it with --resume, or start from its "
            f"export: python -m clipsmall.export {name} --to FOLDER"
        )
    description = read_json(path) if path.suffix == ".json" else None
    for kind in TOWERS.values():
        if kind.recognises(name, description):
            return kind.load(name, tag, weights, captions)
    known = ", no ".join(kind.known_as() for kind in TOWERS.values())
    raise ValueError(f"{name!r} is no {known}")


def rebuild(folder: Path) -> Loaded:
    """The towers and tokenizer of a checkpoint, with fresh weights.

    Args:
        folder: a checkpoint, into which `save_model_files` wrote.
    """
    description = read_json(folder / "towers.json")
    kind = TOWERS.get(description.get("kind", ""))
    if kind is None:
        raise ValueError(
            f"{folder}: holds towers of the kind {description.get('kind')!r}; known kinds are "
            f"{', '.join(TOWERS)}"
        )
    loaded = kind.rebuild(folder, description)
    for key in KEPT:
        if key in description:
            loaded.description[key] = description[key]
    if "lora" in description:
        adapters = description["lora"]
        lora.insert(loaded.towers.adaptable, adapters["targets"], adapters["options"])
    spec = description["spec"]
    # JSON has lists where ImageSpec has tuples
    spec["mean"] = tuple(spec["mean"])
    spec["std"] = tuple(spec["std"])
    loaded.spec = ImageSpec(**spec)
    return loaded


def save_model_files(loaded: Loaded, folder: Path) -> None:
    """Write what `rebuild` needs beside the weights."""
    loaded.save_files(folder)
    content = {
        "kind": loaded.towers.kind,
        **loaded.description,
        "spec": asdict(loaded.spec),
    }
    (folder / "towers.json").write_text(json.dumps(content, indent=2))
