"""Several objectives at once, by weight."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings


class Combination(nn.Module):
    """L = Σ weight · loss over named objectives; those with a memory keep it here.

    Also known as:
        Multi-task loss, weighted sum of losses, a mix.

    Called with rows and columns, which every part gets.

    Args:
        parts: the weight and the objective of each name.

    Returns:
        `loss` (); each part's loss by its name, and its terms as `name/term`, without gradient;
        `effective_negatives` () the largest of the parts'.

    Examples:
        >>> from clipsmall.objectives.softmax import softmax
        >>> from clipsmall.objectives.spectral import spectral
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> mix = Combination({"softmax": (1.0, softmax), "spectral": (0.1, spectral)})
        >>> round(mix(pairs, pairs)["loss"].item(), 4)  # 0.3408 − 0.1 · 2
        0.1408
    """

    def __init__(self, parts: dict[str, tuple[float, Callable[..., dict[str, Tensor]]]]) -> None:
        super().__init__()
        self.parts = parts
        # those with buffers, so that they are moved and saved
        modules = {}
        for name, (_, part) in parts.items():
            if isinstance(part, nn.Module):
                modules[name] = part
        self.memories = nn.ModuleDict(modules)

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        found = {}
        weighted = []
        for name, (weight, part) in self.parts.items():
            found[name] = part(rows, columns)
            weighted.append(weight * found[name]["loss"])
        losses = {"loss": torch.stack(weighted).sum()}

        # what is reported of each part
        negatives = []
        for name, terms in found.items():
            for term, value in terms.items():
                label = name if term == "loss" else f"{name}/{term}"
                losses[label] = value.detach()
            if "effective_negatives" in terms:
                negatives.append(terms["effective_negatives"])

        if negatives:
            losses["effective_negatives"] = torch.stack(negatives).amax()
        return losses
