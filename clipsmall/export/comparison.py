"""Checks an exported folder: loads it with each library and compares features with the model's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.model.towers import Loaded
from clipsmall.model.towers.open_clip_towers import load_open_clip
from clipsmall.model.towers.transformers_towers import load_transformers

# Largest difference of a unit vector's coordinate; reordered float32 sums give about 1e-7.
TOLERANCE = 1e-5
CAPTIONS = ["a photo of a cat", "Two dogs; one of them's asleep!", "", "é 猫 " * 40]


def compare_exported(
    loaded: Loaded, folder: Path, libraries: list[str], name: str
) -> dict[str, float]:
    """Load the folder with each library, and compare features with those of `loaded`.

    Returns:
        library -> largest difference of a feature.

    Raises:
        ValueError: a library loads another model from the folder.
    """
    found = {}
    for library in libraries:
        load, text_features = LIBRARIES[library]
        exported = load(folder)
        off = _difference(loaded, exported, text_features)
        ours = _preprocessing(loaded)
        theirs = _preprocessing(exported)
        if not off <= TOLERANCE or theirs != ours:
            raise ValueError(
                f"{name}: {library} would load another model from the exported folder (features "
                f"differ by {off:.1e}, preprocessing {theirs} for {ours}); nothing was written"
            )
        found[library] = off
    return found


@torch.no_grad()
def _difference(
    loaded: Loaded, exported: Loaded, text_features: Callable[[Loaded], Tensor]
) -> float:
    """The largest difference of unit embeddings, for noise images and for CAPTIONS.

    Each side uses its own tokenizer.
    """
    size = loaded.spec.size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    exported.towers.eval()
    image = _unit_difference(loaded.towers.image(pixels), exported.towers.image(pixels))
    text = _unit_difference(_tokenized_features(loaded), text_features(exported))
    return max(image, text)


def _unit_difference(ours: Tensor, theirs: Tensor) -> float:
    return (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).abs().max().item()


def _tokenized_features(loaded: Loaded) -> Tensor:
    """The features of CAPTIONS, as clipsmall and users of open_clip compute them."""
    return loaded.towers.text(loaded.tokenize(CAPTIONS))


def _masked_features(loaded: Loaded) -> Tensor:
    """The features of CAPTIONS as users of transformers compute them.

    Unlike clipsmall, their tokenizer may return an attention mask for padding.
    """
    tokenize: Any = loaded.tokenize
    model: Any = loaded.towers.model
    tokens = tokenize.tokenizer(
        CAPTIONS, padding="max_length", truncation=True, return_tensors="pt"
    )
    features: Tensor = model.get_text_features(**tokens).pooler_output
    return features


# Library -> (how it loads a folder, how its users compute text features).
LIBRARIES: dict[str, tuple[Callable[[Path], Loaded], Callable[[Loaded], Tensor]]] = {
    "transformers": (lambda folder: load_transformers(str(folder)), _masked_features),
    "open_clip": (lambda folder: load_open_clip(f"local-dir:{folder}", ""), _tokenized_features),
}


def _preprocessing(loaded: Loaded) -> tuple[Any, ...]:
    """Everything that an image's pixels depend on."""
    spec = loaded.spec
    return spec.size, tuple(spec.mean), tuple(spec.std), spec.interpolation, spec.resize
