"""Naive gradient accumulation: a batch cut into parts that are compared within themselves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings


class Accumulated(nn.Module):
    """The mean of an objective over `parts` parts of the batch: what accumulating the gradients of
    small batches does.

    A baseline, and what not to do: B/parts − 1 negatives instead of B − 1 (chunked towers give all
    of them). Made in one step, so that nothing else in a run knows of it. Pair i of the global
    batch is in part i mod parts: the same parts on any number of ranks. An objective with a memory
    is called once a part, one after another.
    """

    def __init__(
        self, objective: Callable[[Embeddings, Embeddings], dict[str, Tensor]], parts: int
    ) -> None:
        super().__init__()
        self.objective = objective
        self.parts = parts

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        made = [
            self.objective(part(rows, k, self.parts), part(columns, k, self.parts))
            for k in range(self.parts)
        ]
        return {name: torch.stack([each[name] for each in made]).mean() for name in made[0]}


def part(pairs: Embeddings, k: int, parts: int) -> Embeddings:
    """Every `parts`-th pair from the k-th on."""
    fields = {
        name: getattr(pairs, name)[k::parts].contiguous()
        for name in ("image", "text", "index", "caption_hash")
    }
    return pairs._replace(**fields)
