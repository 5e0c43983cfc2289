"""How long one query takes among n items: exact search over float16 files, and faiss if installed.

    python -m tests.bench.search [--sizes 100000] [--width 512] [--k 24] [--rounds 20]
                                 [--json OUT.json]

One core; random unit vectors; the files were just written, so they are read from memory. `dense` is
the same product over all rows at once, held in memory as float32.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.search.index import Exact, Faiss

# rows of a shard's file
PART = 10_000
Ask = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def files(folder: Path, count: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for start in range(0, count, PART):
        rows = torch.randn(min(PART, count - start), width, generator=generator)
        np.save(folder / f"{start}.npy", F.normalize(rows, dim=1).half().numpy())
        parts.append(torch.from_numpy(np.load(folder / f"{start}.npy", mmap_mode="c")))
    return parts


def timed(ask: Ask, width: int, k: int, rounds: int) -> dict[str, float]:
    """Milliseconds: median and best by the clock, and the median of this process's own."""
    wall = list[float]()
    own = list[float]()
    for query in F.normalize(torch.randn(rounds + 1, width), dim=1):
        start = time.perf_counter()
        mine = time.process_time()
        ask(query, k)
        wall.append(1e3 * (time.perf_counter() - start))
        own.append(1e3 * (time.process_time() - mine))
    return {"median": median(wall[1:]), "best": min(wall[1:]), "cpu": median(own[1:])}


def dense(whole: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cosines, rows = (whole @ query).topk(k)
    return cosines, rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for count in options.sizes:
        with TemporaryDirectory() as folder:
            parts = files(Path(folder), count, options.width)
            rows = torch.arange(count)
            whole = torch.cat([part.float() for part in parts])
            sides: dict[str, Ask] = {"exact": Exact(parts, rows), "dense": partial(dense, whole)}
            if find_spec("faiss"):
                sides["faiss"] = Faiss(parts, rows)
            for side, ask in sides.items():
                took = timed(ask, options.width, options.k, options.rounds)
                found.append(
                    {
                        "items": count,
                        "width": options.width,
                        "k": options.k,
                        "side": side,
                        "ms": took,
                    }
                )
                numbers = ", ".join(f"{name} {value:.1f} ms" for name, value in took.items())
                print(f"{count:>9,} x {options.width}, {side:>5}: {numbers}", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "results": found}, indent=1)
        )


if __name__ == "__main__":
    main()
