"""Naive gradient accumulation: a batch cut into parts that are compared within themselves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings


class Accumulated(nn.Module):
    """The mean of an objective over `parts` parts of the batch, as accumulated gradients give it.

    A baseline, and what not to do: B/parts − 1 negatives in place of B − 1 (chunked towers give all
    of them). Computed in one step, so that nothing else in a run knows of it. Pair i of the global
    batch is in part i mod parts: the same parts on any number of ranks. An objective with a memory
    is called once per part, one after another.

    Called with rows and columns.

    Args:
        objective: of (rows, columns).
        parts: how many; divides a rank's pairs.

    Returns:
        What the objective returns, its mean over the parts.

    Examples:
        >>> from clipsmall.objectives.softmax import softmax
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> Accumulated(softmax, parts=2)(pairs, pairs)["effective_negatives"].item()
        1.0
    """

    def __init__(
        self, objective: Callable[[Embeddings, Embeddings], dict[str, Tensor]], parts: int
    ) -> None:
        super().__init__()
        self.objective = objective
        self.parts = parts

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        found = []
        for k in range(self.parts):
            some_rows = every_nth(rows, k, self.parts)
            some_columns = every_nth(columns, k, self.parts)
            terms = self.objective(some_rows, some_columns)
            found.append(terms)

        # report the mean of every term
        means = {}
        for name in found[0]:
            of_parts = [terms[name] for terms in found]
            means[name] = torch.stack(of_parts).mean()
        return means


def every_nth(pairs: Embeddings, first: int, n: int) -> Embeddings:
    """Every n-th pair from `first` on."""
    some = slice(first, None, n)
    # contiguous, because collectives require it
    return pairs._replace(
        image=pairs.image[some].contiguous(),
        text=pairs.text[some].contiguous(),
        index=pairs.index[some].contiguous(),
        caption_hash=pairs.caption_hash[some].contiguous(),
    )
