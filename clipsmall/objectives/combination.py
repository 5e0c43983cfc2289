"""Several objectives at once, by weight."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings


class Combination(nn.Module):
    """L = Σ weight · loss over named objectives; those with a memory keep it here.

    Called with (rows, columns); returns `loss`, each part's loss by its name, its terms as
    `name/term`, and the most `effective_negatives` that a part tells.
    """

    def __init__(self, parts: dict[str, tuple[float, Callable[..., dict[str, Tensor]]]]) -> None:
        super().__init__()
        self.parts = parts
        self.memories = nn.ModuleDict(
            {name: part for name, (_, part) in parts.items() if isinstance(part, nn.Module)}
        )

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        made = {name: part(rows, columns) for name, (_, part) in self.parts.items()}
        losses = {
            "loss": torch.stack(
                [weight * made[name]["loss"] for name, (weight, _) in self.parts.items()]
            ).sum()
        }
        for name, terms in made.items():
            for term, value in terms.items():
                losses[name if term == "loss" else f"{name}/{term}"] = value.detach()
        if met := [
            terms["effective_negatives"]
            for terms in made.values()
            if "effective_negatives" in terms
        ]:
            losses["effective_negatives"] = torch.stack(met).amax()
        return losses
