"""Exact top-k search: matrix products over chunks of memory-mapped embeddings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsmall.evaluation.top_k import scores

# Rows per product: at D = 512 their float32 copy of 4 MiB stays in the cache, while 16,384 rows
# would take seven times as long.
CHUNK = 2048

# (D,) query, k -> (k,) cosines, best first, and (k,) rows
Index = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def row_chunks(parts: list[Tensor], rows: Tensor) -> Iterator[Tensor]:
    """Selected rows of the concatenated parts, at most CHUNK at a time, as (n, D).

    Args:
        rows: (m,) rows to select, ascending.
    """
    start = 0
    for part in parts:
        end = start + len(part)
        low, high = torch.searchsorted(rows, torch.tensor([start, end])).tolist()
        # `split` of an empty tensor gives one empty chunk
        if low < high:
            for here in torch.split(rows[low:high] - start, CHUNK):
                first = int(here[0])
                last = int(here[-1])
                without_gaps = last - first < len(here)
                # without gaps, a slice avoids a copy
                yield part[first : last + 1] if without_gaps else part[here]

        start = end


def _check_k(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"k={k}: there are {count:,} to choose from; ask for 1 to {count}")


@dataclass
class Exact:
    """Compares the query with every row; equal cosines keep the order of their rows.

    Args:
        parts: (n_i, D) unit rows each, float16 or float32, memory-mapped: no part is copied whole.
        rows: (m,) the rows to search, ascending.
    """

    parts: list[Tensor]
    rows: Tensor

    def __call__(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(D,) unit query -> (k,) cosines, best first, and (k,) rows.

        Takes 4 bytes of memory per row. Float32 cosines are computed first; their rounding error is
        at most D · 2⁻²³. All rows that may be among the k best despite it are compared again in
        float64.

        Raises:
            ValueError: k below 1 or above m; features or a query that are not finite.
        """
        _check_k(k, len(self.rows))
        rough = torch.cat([part.float() @ query for part in row_chunks(self.parts, self.rows)])
        finite = rough.isfinite()
        if not finite.all():
            raise ValueError(
                f"{int((~finite).sum())} of {len(rough)} cosines are not finite: the model has "
                "diverged, or the embeddings are broken; delete their folder and embed again"
            )

        # twice the rounding error, as both cosines of a comparison are rounded
        rounding = len(query) * 2.0**-22
        kth = rough.topk(k).values[-1]

        near = self.rows[rough >= kth - rounding]

        exact = []
        for part in row_chunks(self.parts, near):
            exact.append(scores(query[None], part)[0])

        cosines = torch.cat(exact)
        # stable: equal cosines stay in the order of their rows
        best = cosines.sort(descending=True, stable=True).indices[:k]
        return cosines[best], near[best]


class Faiss:
    """faiss's IndexFlatIP: exact in float32, with 4 D bytes of memory per row.

    Equal cosines come in any order.

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
        for part in row_chunks(parts, rows):
            self.index.add(part.float().numpy())

    def __call__(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same as `Exact.__call__`."""
        _check_k(k, len(self.rows))

        # faiss takes a batch of queries
        cosines, positions = self.index.search(query[None].numpy(), k)
        best = torch.from_numpy(positions[0])
        return torch.from_numpy(cosines[0]), self.rows[best]


INDEXES: dict[str, Callable[[list[Tensor], Tensor], Index]] = {"exact": Exact, "faiss": Faiss}
