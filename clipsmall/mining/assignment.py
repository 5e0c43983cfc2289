"""Turns one pool of scored pairs into batches of mutually hard pairs.

The steps: find pairs that must not share a group (`false_negatives`), arrange the pool in groups
(one module per method), swap pairs to make groups harder or to remove conflicts (`swaps`), and
combine groups into batches (`combine`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from clipsmall.mining import false_negatives
from clipsmall.mining.combine import combine_groups, even_quotas
from clipsmall.mining.false_negatives import Identity
from clipsmall.mining.initial_groups import chain_groups, grow_groups, osgd, random_groups
from clipsmall.mining.kmeans import balanced_kmeans
from clipsmall.mining.learnability import learnability
from clipsmall.mining.scored_pairs import Arrangement, Bools, Floats, Ints, ScoredPairs
from clipsmall.mining.spectral import spectral_groups
from clipsmall.mining.swaps import count_conflicts, improve_by_swaps, separate_conflicts
from clipsmall.mining.weights import WEIGHTS, batch_losses

# methods that make groups of mutually hard pairs
COMPOSING = (
    "groups",
    "chain",
    "kmeans",
    "spectral",
)
# methods that select whole batches and drop the other pairs; all other methods use every pair
SELECTIONS = ("osgd", "learnability")


@dataclass(frozen=True)
class MiningRecipe:
    """How a pool is turned into batches.

    Args:
        method: groups, chain, kmeans, spectral, shuffled; osgd, learnability.
        batch_size: B, over all ranks.
        group: number of mutually hard pairs in a group; 0 = the whole batch.
        weights: softmax or sigmoid, the loss that defines hardness.
        swaps: sweeps of swaps after the arrangement.
        keep: fraction of the batches that a selection keeps.
        near: two images, or two captions, with a larger cosine count as duplicates; 1 = none do.
        guard: fraction of all combinations of two pairs that a COMPOSING method keeps apart as
            likely false negatives, the hardest ones; 0 = none.
        ratio: fixed threshold of `false_negatives.relative_hardness` instead of the fraction
            `guard`.
    """

    method: str = "groups"
    batch_size: int = 32
    group: int = 4
    weights: str = "softmax"
    swaps: int = 0
    keep: float = 0.1
    near: float = 0.95
    guard: float = 0.001
    ratio: float | None = None

    @property
    def size(self) -> int:
        """Number of pairs in a group."""
        return self.group or self.batch_size

    def batches_kept(self, batches: int) -> int:
        """Number of batches of a pool that are trained on."""
        if self.method in SELECTIONS:
            return max(round(self.keep * batches), 1)
        return batches


class BatchAssignment(NamedTuple):
    """The batches made from a pool."""

    # (m, B) places in the pool, none twice
    batches: Ints
    # (m, B) caption hashes of the pairs; copies in one batch get equal hashes, so that losses mask
    # them
    caption_hash: Ints
    # blocked: fraction of the combinations of two pairs that must not share a group; duplicates:
    # fraction of pairs with a duplicate; threshold: relative hardness above which two pairs must
    # not share a group; unseparated: number of such combinations that still do; pool_loss,
    # mined_loss: mean loss of the batches before and after mining
    numbers: dict[str, float]


def assign_batches(
    recipe: MiningRecipe,
    scored: ScoredPairs,
    identity: Identity,
    owner: Ints,
    generator: np.random.Generator,
    ranks: int = 1,
    reference: ScoredPairs | None = None,
) -> BatchAssignment:
    """Assign n = m·B pairs to m batches, each with B / ranks pairs of every rank.

    Args:
        owner: (n,) the rank that holds each pair, n / ranks pairs each.
        reference: the same pairs, embedded by the reference model; for learnability only.
    """
    n = len(owner)
    assert n % recipe.batch_size == recipe.batch_size % ranks == 0

    # 1. Which pairs must not share a group: (n, n) bool, symmetric.
    copies = false_negatives.copies(identity)
    duplicates = copies | false_negatives.near_duplicates(scored, recipe.near)

    # methods that select among random batches do not bring false negatives together
    composing = recipe.method in COMPOSING
    guard = recipe.guard if composing else 0.0
    ratio = recipe.ratio if composing else None
    suspect, threshold = false_negatives.too_hard_negatives(scored, guard, ratio)
    cannot_link = duplicates | suspect

    # 2. Groups of mutually hard pairs.
    quotas = even_quotas(owner, ranks, recipe.batch_size, recipe.size)

    # Computed only if needed: the method chain does without, and would spend most time on them.
    weights = cache(lambda: WEIGHTS[recipe.weights](scored, recipe.size))
    arrange = arrangement(recipe, n // recipe.batch_size, weights, reference)
    groups = arrange(scored, quotas, cannot_link, generator)

    # 3. Swaps: make groups harder, then remove conflicts.
    if recipe.swaps:
        groups = improve_by_swaps(weights(), groups, owner, cannot_link, recipe.swaps, generator)
    if count_conflicts(groups, cannot_link).any():
        groups = separate_conflicts(groups, owner, cannot_link, generator, weights())

    # 4. Batches.
    per_batch = recipe.batch_size // recipe.size
    batches = combine_groups(groups, per_batch, duplicates, generator)

    # the batches in the order of reading
    pool_batches = np.arange(n).reshape(-1, recipe.batch_size)
    numbers = {
        "blocked": float(cannot_link.sum()) / max(n * (n - 1), 1),
        "duplicates": float(duplicates.any(axis=1).mean()),
        "threshold": threshold,
        "unseparated": float(count_unseparated(groups, cannot_link, batches, duplicates)),
        "pool_loss": float(batch_losses(scored, pool_batches, recipe.weights).mean()),
        "mined_loss": float(batch_losses(scored, batches, recipe.weights).mean()),
    }
    return BatchAssignment(batches, hashes_for_masks(identity, batches, copies), numbers)


def arrangement(
    recipe: MiningRecipe,
    batches: int,
    weights: Callable[[], Floats],
    reference: ScoredPairs | None,
) -> Arrangement:
    """The function for the recipe's method, with its options filled in.

    Args:
        batches: number of batches in the pool.
        weights: computes the (n, n) weights, see `weights`; called only if they are needed.
        reference: the same pairs, embedded by the reference model; for learnability only.
    """
    keep = recipe.batches_kept(batches)
    kind = recipe.weights
    match recipe.method:
        case "groups":
            return partial(grow_groups, weights=weights())
        case "chain":
            return chain_groups
        case "kmeans":
            return partial(balanced_kmeans, weights=weights())
        case "spectral":
            return partial(spectral_groups, weights=weights())
        case "osgd":
            return partial(osgd, keep=keep, kind=kind)
        case "learnability":
            assert reference is not None
            return partial(learnability, keep=keep, kind=kind, reference=reference)
        case "shuffled":
            return random_groups

    raise ValueError(f"mining.method={recipe.method}: no such method")


def hashes_for_masks(identity: Identity, batches: Ints, copies: Bools) -> Ints:
    """(m, B) caption hashes by which the losses mask false negatives.

    Copies in one batch get the same hash, and so do all pairs of the batch with the same caption as
    one of them. Near-duplicates are not merged: merging is transitive and would mask half the
    batch.
    """
    hashes = identity.caption_hash[batches]
    for row, members in zip(hashes, batches, strict=True):
        # every combination of two members, once
        inside = copies[np.ix_(members, members)]
        for one, other in np.argwhere(np.triu(inside)):
            row[row == row[other]] = row[one]

    return hashes


def count_unseparated(groups: Ints, cannot_link: Bools, batches: Ints, duplicates: Bools) -> int:
    """Number of combinations of two pairs that should be separated but are not.

    Duplicates should not share a batch; other cannot-link pairs should not share a group.
    """
    too_hard = cannot_link & ~duplicates
    inside_groups = count_conflicts(groups, too_hard)
    inside_batches = count_conflicts(batches, duplicates)
    return int(inside_groups.sum() + inside_batches.sum())
