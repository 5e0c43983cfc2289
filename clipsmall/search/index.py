"""The k best of many rows, exactly: a matrix product chunk by chunk over files that stay on
disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsmall.evaluation.top_k import scores

# rows: at D = 512 their float32 copy, 4 MiB, stays in the cache; of 16,384 it takes seven times as
# long
CHUNK = 2048

Index = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def chunks(parts: list[Tensor], rows: Tensor) -> Iterator[Tensor]:
    """Some rows, ascending, of all parts laid end to end: (at most CHUNK, D) at a time."""
    start = 0
    for part in parts:
        low, high = torch.searchsorted(rows, torch.tensor([start, start + len(part)])).tolist()
        for here in torch.split(rows[low:high] - start, CHUNK) if low < high else ():
            first = int(here[0])
            last = int(here[-1])
            yield part[first : last + 1] if last - first < len(here) else part[here]
        start += len(part)


def _check(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"k={k}: there are {count:,} to choose from; ask for 1 to {count}")


@dataclass
class Exact:
    """Compares with every row; equal cosines come in the order of their rows.

    Args:
        parts: (n_i, D) unit rows each, float16 or float32, mapped from files: none of them is
            copied whole.
        rows: (m,) which of all rows are searched, ascending.
    """

    parts: list[Tensor]
    rows: Tensor

    def __call__(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(D,) unit query -> (k,) cosines, best first, and their rows among all.

        Takes 4 bytes of memory a row. Float32 products rank the rows up to their rounding error, at
        most D · 2⁻²³ of a difference; whatever is that near to the k best is compared once more in
        float64.

        Raises:
            ValueError: k below 1 or above m; features or a query that are not finite.
        """
        _check(k, len(self.rows))
        rough = torch.cat([part.float() @ query for part in chunks(self.parts, self.rows)])
        if not rough.isfinite().all():
            raise ValueError(
                f"{int((~rough.isfinite()).sum())} of {len(rough)} cosines are not finite: the model has diverged, or "
                "the embeddings are broken; delete their folder and embed anew"
            )
        near = self.rows[rough >= rough.topk(k).values[-1] - len(query) * 2.0**-22]
        cosines = torch.cat([scores(query[None], part)[0] for part in chunks(self.parts, near)])
        best = cosines.sort(descending=True, stable=True).indices[:k]
        return cosines[best], near[best]


class Faiss:
    """faiss's IndexFlatIP: as exact in float32, 4 D bytes of memory a row; equal cosines come in
    any order.

    Raises:
        ValueError: faiss is not installed.
    """

    def __init__(self, parts: list[Tensor], rows: Tensor) -> None:
        try:
            import faiss
        except ImportError:
            raise ValueError(
                "--index=faiss: it is not installed; pip install faiss-cpu, or search exactly"
            ) from None
        self.rows = rows
        self.index: Any = faiss.IndexFlatIP(parts[0].shape[1])
        for part in chunks(parts, rows):
            self.index.add(part.float().numpy())

    def __call__(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `Exact`'s."""
        _check(k, len(self.rows))
        cosines, places = self.index.search(query[None].numpy(), k)
        return torch.from_numpy(cosines[0]), self.rows[torch.from_numpy(places[0])]


INDEXES: dict[str, Callable[[list[Tensor], Tensor], Index]] = {"exact": Exact, "faiss": Faiss}
