"""From one pool of scored pairs to batches of pairs that are hard for one another.

The steps: which pairs must not share a group (`false_negatives`), an arrangement of the pool in
groups (one module each), exchanges that make groups harder or conflicts fewer (`swaps`), and groups
put together into batches (`combine`).
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

# methods that put pairs together because they are hard for one another
COMPOSING = (
    "groups",
    "chain",
    "kmeans",
    "spectral",
)
# methods that drop pairs; the others use all of them
SELECTIONS = ("osgd", "learnability")


@dataclass(frozen=True)
class MiningRecipe:
    """How a pool is turned into batches.

    Args:
        method: groups, chain, kmeans, spectral, shuffled; osgd, learnability.
        batch_size: B over all ranks.
        group: K pairs of a batch that are hard for one another; 0 = the whole batch.
        weights: softmax or sigmoid, the loss by which pairs are called hard.
        swaps: sweeps of exchanges after the arrangement.
        keep: fraction of the batches that a selection keeps.
        near: cosine of two images, or two captions, from which on they count as duplicates; 1 =
            never.
        guard: fraction of all combinations of two pairs that a COMPOSING method keeps apart, the
            hardest ones, as too hard to be true negatives; 0 = none.
        ratio: fixed threshold in place of the fraction `guard`, see
            `false_negatives.relative_hardness`.
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
        """Pairs of one group."""
        return self.group or self.batch_size

    def batches_kept(self, batches: int) -> int:
        """How many of a pool's batches are trained on."""
        if self.method in SELECTIONS:
            return max(round(self.keep * batches), 1)
        return batches


class BatchAssignment(NamedTuple):
    """The batches made of a pool."""

    # (m, B) places in the pool, none twice
    batches: Ints
    # (m, B) caption hashes of the pairs; copies that had to share a batch are given equal ones, so
    # that losses mask them
    caption_hash: Ints
    # blocked: fraction of the combinations of two pairs that are kept apart; duplicates: fraction
    # of pairs that have one; threshold: relative hardness beyond which they are kept apart;
    # unseparated: combinations that should be apart and are not; pool_loss, mined_loss: mean loss
    # of the pool's batches before and after
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
    """Assign n = m·B pairs to batches, each of which takes B / ranks pairs of every rank.

    Args:
        owner: (n,) rank of each pair, n / ranks each.
        reference: the same pairs as another model sees them; learnability needs it.
    """
    n = len(owner)
    assert n % recipe.batch_size == recipe.batch_size % ranks == 0

    # 1. Which pairs must not share a group: (n, n) bool, symmetric.
    copies = false_negatives.copies(identity)
    duplicates = copies | false_negatives.near_duplicates(scored, recipe.near)

    # a method that only chooses among random batches brings no false negatives together
    composing = recipe.method in COMPOSING
    guard = recipe.guard if composing else 0.0
    ratio = recipe.ratio if composing else None
    suspect, threshold = false_negatives.too_hard_negatives(scored, guard, ratio)
    cannot_link = duplicates | suspect

    # 2. Groups of pairs that are hard for one another.
    quotas = even_quotas(owner, ranks, recipe.batch_size, recipe.size)

    # Computed once, if at all: they would take most of the time of a chain, which needs none.
    weights = cache(lambda: WEIGHTS[recipe.weights](scored, recipe.size))
    arrange = arrangement(recipe, n // recipe.batch_size, weights, reference)
    groups = arrange(scored, quotas, cannot_link, generator)

    # 3. Exchanges: harder groups, then no conflicts in them.
    if recipe.swaps:
        groups = improve_by_swaps(weights(), groups, owner, cannot_link, recipe.swaps, generator)
    if count_conflicts(groups, cannot_link).any():
        groups = separate_conflicts(groups, owner, cannot_link, generator, weights())

    # 4. Batches.
    per_batch = recipe.batch_size // recipe.size
    batches = combine_groups(groups, per_batch, duplicates, generator)

    # as they were read
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
    """The arrangement that the recipe names, with its options filled in.

    Args:
        batches: of the pool.
        weights: computes the (n, n) weights, see `weights`; called only if they are needed.
        reference: the same pairs as another model sees them; learnability needs it.
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

    Copies that had to share a batch are given one hash, and so are all pairs of the batch that have
    the same caption as one of them. Near-duplicates are not merged: merging is transitive and would
    mask half the batch.
    """
    hashes = identity.caption_hash[batches]
    for row, members in zip(hashes, batches, strict=True):
        # each combination of two members once
        inside = copies[np.ix_(members, members)]
        for one, other in np.argwhere(np.triu(inside)):
            row[row == row[other]] = row[one]

    return hashes


def count_unseparated(groups: Ints, cannot_link: Bools, batches: Ints, duplicates: Bools) -> int:
    """Combinations of two pairs that should be apart and are not.

    Duplicates should not share a batch, other cannot-link pairs should not share a group.
    """
    too_hard = cannot_link & ~duplicates
    inside_groups = count_conflicts(groups, too_hard)
    inside_batches = count_conflicts(batches, duplicates)
    return int(inside_groups.sum() + inside_batches.sum())
