"""An exported folder, loaded again by the libraries it is for, beside the model it was made of."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.model.hf import HFTokenize, from_transformers
from clipsmall.model.towers import Loaded, from_open_clip

# of a unit vector's coordinates: float32 in another order of operations gives about 1e-7; NaN fails
TOLERANCE = 1e-5
CAPTIONS = ["a photo of a cat", "Two dogs; one of them's asleep!", "", "é 猫 " * 40]


def check(loaded: Loaded, folder: Path, libraries: list[str], name: str) -> dict[str, float]:
    """The largest difference of features for each library.

    Raises:
        ValueError: a library makes another model of the folder.
    """
    found = {}
    for library in libraries:
        theirs = (
            from_transformers(str(folder))
            if library == "transformers"
            else from_open_clip(f"local-dir:{folder}", "")
        )
        found[library] = difference(loaded, theirs)
        if not found[library] <= TOLERANCE or looks(theirs) != looks(loaded):
            raise ValueError(
                f"{name}: {library} would load another model from the exported folder (features differ by "
                f"{found[library]:.1e}, preprocessing {looks(theirs)} for {looks(loaded)}); nothing was written"
            )
    return found


@torch.no_grad()
def difference(ours: Loaded, theirs: Loaded) -> float:
    """The largest difference of unit embeddings, of noise and of a few captions, which each
    tokenizes by itself.
    """
    pixels = torch.randn(
        4, 3, ours.spec.size, ours.spec.size, generator=torch.Generator().manual_seed(0)
    )
    theirs.towers.eval()
    pairs = [(ours.towers.image(pixels), theirs.towers.image(pixels))]
    pairs.append((ours.towers.text(ours.tokenize(CAPTIONS)), text(theirs)))
    return max(
        (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().max().item() for a, b in pairs
    )


def text(loaded: Loaded) -> Tensor:
    """CAPTIONS' features as a user of the library gets them: transformers' tokenizer also tells of
    padding.
    """
    if not isinstance(loaded.tokenize, HFTokenize):
        return loaded.towers.text(loaded.tokenize(CAPTIONS))  # type: ignore[no-any-return]
    tokens = loaded.tokenize.tokenizer(
        CAPTIONS, padding="max_length", truncation=True, return_tensors="pt"
    )
    return loaded.towers.model.get_text_features(**tokens).pooler_output  # type: ignore[no-any-return]


def looks(loaded: Loaded) -> tuple[Any, ...]:
    spec = loaded.spec
    return spec.size, tuple(spec.mean), tuple(spec.std), spec.interpolation, spec.resize
