"""One pool of scored pairs, dealt out as batches: weights, guard, arrangement, swaps,
combination.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from clipsmall.mining import false_negatives
from clipsmall.mining.combine import combined, even_quotas
from clipsmall.mining.false_negatives import Identity
from clipsmall.mining.initial_groups import chain, grown, osgd, shuffled
from clipsmall.mining.kmeans import balanced_kmeans
from clipsmall.mining.learnability import learnability
from clipsmall.mining.scored import Arrangement, Bools, Floats, Ints, Scored
from clipsmall.mining.spectral import spectral
from clipsmall.mining.swaps import conflicts, separated, swapped
from clipsmall.mining.weights import WEIGHTS, batch_losses

# they put together what is hard for one another
COMPOSING = (
    "groups",
    "chain",
    "kmeans",
    "spectral",
)
# they drop pairs; the others deal all of them
SELECTIONS = ("osgd", "learnability")


@dataclass(frozen=True)
class MiningRecipe:
    """How a pool is dealt out.

    Args:
        method: groups, chain, kmeans, spectral, shuffled; osgd, learnability.
        batch_size: B over all ranks.
        group: K pairs of a batch that are hard for one another; 0 = the whole batch.
        weights: softmax or sigmoid, what hard means.
        swaps: sweeps of exchanges after the arrangement.
        keep: share of the batches that a selection keeps.
        near: cosine of two images, or two captions, from which on they count as duplicates; 1 =
            never.
        guard: share of all pairs of pairs kept apart by a COMPOSING method, as too hard to be true
            negatives; 0 = none.
        ratio: fixed threshold of the guard in place of a share, see `false_negatives.relative_hardness`.
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
        """Of the groups that are made hard."""
        return self.group or self.batch_size

    def kept(self, batches: int) -> int:
        """How many of a pool's batches are played."""
        return max(round(self.keep * batches), 1) if self.method in SELECTIONS else batches


class Dealt(NamedTuple):
    """A pool dealt out."""

    # (m, B) places in the pool, none twice
    batches: Ints
    # (m, B) the pairs', with those of copies that had to stay together made equal: losses mask them
    caption_hash: Ints
    # blocked and duplicate shares, threshold, losses before and after
    numbers: dict[str, float]


def deal(
    recipe: MiningRecipe,
    scored: Scored,
    identity: Identity,
    owner: Ints,
    generator: np.random.Generator,
    ranks: int = 1,
    reference: Scored | None = None,
) -> Dealt:
    """Deal n = m·B pairs out as batches, B / ranks of every rank in each.

    Args:
        owner: (n,) rank of each pair, n / ranks each.
        reference: the same pairs as another model sees them; learnability needs it.
    """
    n = len(owner)
    assert n % recipe.batch_size == recipe.batch_size % ranks == 0
    copies = false_negatives.copies(identity)
    twins = copies | false_negatives.near_duplicates(scored, recipe.near)
    # a method that only chooses among random batches brings no false negatives together
    guard, ratio = (recipe.guard, recipe.ratio) if recipe.method in COMPOSING else (0.0, None)
    suspect, limit = false_negatives.too_hard(scored, guard, ratio)
    cannot = twins | suspect
    quotas = even_quotas(owner, ranks, recipe.batch_size, recipe.size)
    # once, if at all: they would be most of the time of a chain, which needs none
    weights = cache(lambda: WEIGHTS[recipe.weights](scored, recipe.size))
    groups = arrangement(recipe, n // recipe.batch_size, weights, reference)(
        scored, quotas, cannot, generator
    )
    if recipe.swaps:
        groups = swapped(weights(), groups, owner, cannot, recipe.swaps, generator)
    if conflicts(groups, cannot).any():
        groups = separated(groups, owner, cannot, generator, weights())
    batches = combined(groups, recipe.batch_size // recipe.size, twins, generator)
    numbers = {
        "blocked": float(cannot.sum()) / max(n * (n - 1), 1),
        "duplicates": float(twins.any(axis=1).mean()),
        "threshold": limit,
        "unseparated": float(together(groups, cannot, batches, twins)),
        "pool_loss": float(
            batch_losses(scored, np.arange(n).reshape(-1, recipe.batch_size), recipe.weights).mean()
        ),
        "mined_loss": float(batch_losses(scored, batches, recipe.weights).mean()),
    }
    return Dealt(batches, joined(identity, batches, copies), numbers)


def arrangement(
    recipe: MiningRecipe, batches: int, weights: Callable[[], Floats], reference: Scored | None
) -> Arrangement:
    """The one that the recipe names, with what it needs beside a pool of so many batches."""
    keep = recipe.kept(batches)
    kind = recipe.weights
    match recipe.method:
        case "groups":
            return partial(grown, weights=weights())
        case "chain":
            return chain
        case "kmeans":
            return partial(balanced_kmeans, weights=weights())
        case "spectral":
            return partial(spectral, weights=weights())
        case "osgd":
            return partial(osgd, keep=keep, kind=kind)
        case "learnability":
            assert reference is not None
            return partial(learnability, keep=keep, kind=kind, reference=reference)
        case "shuffled":
            return shuffled
    raise ValueError(f"mining.method={recipe.method}: no such method")


def joined(identity: Identity, batches: Ints, copies: Bools) -> Ints:
    """(m, B) caption hashes for the losses' masks: the pairs' own, but one for copies that had to
    stay together, and for all that share a caption with them. Only copies: what is merely alike
    would chain half a batch together."""
    hashes = identity.caption_hash[batches]
    for row, members in zip(hashes, batches, strict=True):
        for one, other in np.argwhere(np.triu(copies[np.ix_(members, members)])):
            row[row == row[other]] = row[one]
    return hashes


def together(groups: Ints, cannot: Bools, batches: Ints, twins: Bools) -> int:
    """Pairs of pairs that may not meet and do: in one group by any rule, in one batch as copies or
    near duplicates.
    """
    inside = conflicts(groups, cannot & ~twins).sum()
    return int(inside + conflicts(batches, twins).sum())
