"""Arrangements side by side: how hard their batches are, and what they cost, on synthetic pools.

    python -m tests.bench.mining [--sizes 1280:32 4096:32 8192:256] [--json OUT.json]

Embeddings have 20 topics, a concept for every four pairs, and noise. The paper's spectral
clustering is timed as its authors run it (ARPACK's eigenvectors, k-means, linear assignment) and as
we do (LAPACK's).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans
from sklearn.manifold import spectral_embedding

from clipsmall.mining import Identity, MiningRecipe, ScoredPairs, assign_batches
from clipsmall.mining.scored_pairs import Floats, Ints, one_owner
from clipsmall.mining.spectral import affinity, even_clusters
from clipsmall.mining.weights import batch_losses, softmax_weights

RECIPES = {
    "shuffled": MiningRecipe("shuffled", group=0, guard=0, near=1),
    "chain": MiningRecipe("chain", group=0, guard=0, near=1),
    "chain + 2 sweeps": MiningRecipe("chain", group=0, guard=0, near=1, swaps=2),
    "kmeans": MiningRecipe("kmeans", group=0, guard=0, near=1),
    "kmeans + 2 sweeps": MiningRecipe("kmeans", group=0, guard=0, near=1, swaps=2),
    "shuffled + 5 sweeps": MiningRecipe("shuffled", group=0, guard=0, near=1, swaps=5),
    "spectral": MiningRecipe("spectral", group=0, guard=0, near=1),
    "groups of 4": MiningRecipe("groups", group=4, guard=0, near=1),
    "groups of 4, guard": MiningRecipe("groups", group=4, guard=0.01, near=1),
}


def unit(x: Floats) -> Floats:
    made: Floats = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return made


def clustered(
    pairs: int, scale: float = 10.0, width: int = 128, seed: int = 0
) -> tuple[ScoredPairs, Ints]:
    """Scored pairs, and the concept of each: four pairs share one."""
    made = np.random.default_rng(seed)
    topics = unit(made.normal(size=(20, width)))
    concepts = unit(
        topics[made.integers(20, size=pairs // 4)]
        + 0.5 * unit(made.normal(size=(pairs // 4, width)))
    )
    concept = made.permutation(np.repeat(np.arange(pairs // 4), 4))
    image = unit(concepts[concept] + 0.5 * unit(made.normal(size=(pairs, width))))
    text = unit(image + 0.3 * unit(made.normal(size=(pairs, width))))
    return ScoredPairs(image.astype(np.float32), text.astype(np.float32), scale), concept


def distinct(pairs: int) -> Identity:
    return Identity(np.arange(pairs), np.arange(pairs), np.arange(pairs))


def mined_batches(recipe: MiningRecipe, scored: ScoredPairs, ranks: int = 1) -> Ints:
    """Batches of a pool whose pairs lie on `ranks` ranks by turns."""
    pairs = len(scored.image)
    return assign_batches(
        recipe, scored, distinct(pairs), np.arange(pairs) % ranks, np.random.default_rng(0), ranks
    ).batches


def by_arpack(scored: ScoredPairs, size: int) -> Ints:
    """The paper's pipeline as its authors run it."""
    pairs = len(scored.image)
    graph = affinity(softmax_weights(scored, size), np.zeros((pairs, pairs), dtype=bool))
    vectors = spectral_embedding(
        graph,
        n_components=pairs // size,
        eigen_solver="arpack",
        random_state=0,
        norm_laplacian=True,
        drop_first=False,
    )
    centres = KMeans(pairs // size, random_state=0).fit(vectors).cluster_centers_
    return even_clusters(vectors, one_owner(pairs, size), centres)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["1280:32", "4096:32", "8192:256"], metavar="PAIRS:BATCH"
    )
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, "paper's spectral"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    rows = []
    for size in options.sizes:
        pairs, batch = map(int, size.split(":"))
        scored, concept = clustered(pairs)
        for name in options.only or [*RECIPES, "paper's spectral"]:
            start = time.process_time()
            if name in RECIPES:
                recipe = RECIPES[name]
                batches = mined_batches(
                    MiningRecipe(**{**vars(recipe), "batch_size": batch}), scored
                )
            else:
                batches = by_arpack(scored, batch)
            took = time.process_time() - start
            mates = np.mean(
                [(concept[b][:, None] == concept[b]).sum(axis=1).mean() - 1 for b in batches]
            )
            loss = batch_losses(scored, batches).mean()
            rows.append(
                {
                    "pairs": pairs,
                    "batch": batch,
                    "method": name,
                    "loss": loss,
                    "mates": mates,
                    "seconds": took,
                }
            )
            result = f"loss {loss:.3f}  mates {mates:.2f}  {took:8.2f} s"
            print(f"{pairs:>6} {batch:>4}  {name:<22} {result}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
