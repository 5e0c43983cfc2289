"""Plans from scores: all pairs of a data set routed to windows of similar ones, each window dealt
out as batches.
"""

import math
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from clipsmall.data import Catalog
from clipsmall.data.scores import Scores
from clipsmall.mining import Identity, MiningRecipe, assign_batches
from clipsmall.mining.scored_pairs import Floats, Ints, select_scored
from clipsmall.mining.weights import batch_losses

# pairs that the centres are learned from
FITTED = 100_000
# pairs compared with the centres at a time
CHUNK = 65_536
# pairs that a mean loss is taken over, in whole batches
MEASURED = 65_536


def plan_batches(
    catalog: Catalog, table: Scores, recipe: MiningRecipe, fraction: float, window: int, seed: int
) -> tuple[Ints, dict[str, float]]:
    """Batches for all scored pairs but those few that fill none; a pair is in one batch at most.

    Hard groups are looked for in windows, and batches put together from the groups of all windows
    at random: whole batches out of one window would be harder than their groups, the more so the
    larger the data set. Copies in different groups meet as often as in random batches.

    All pairs are mined; `fraction` of the batches, picked at random, stay as they are, and the
    pairs of the others are shuffled into random batches. So hard partners are looked for among all
    pairs, whatever the fraction.

    Args:
        window: pairs that are mined together, at most; memory grows with its square.

    Returns:
        (m, B) pairs' numbers in the catalog, and what is to be told: the share of blocked pairs of
        pairs, how many of those had to stay together, the mean losses of mined and of random
        batches.

    Raises:
        ValueError: numbers that do not fit together, or fewer pairs than a batch.
    """
    size = recipe.batch_size
    generator = np.random.default_rng(seed)
    check_plan_sizes(len(table.row), recipe, fraction, window)
    places = np.sort(generator.permutation(len(table.row))[: len(table.row) // size * size])
    index = catalog.index[table.row]
    captions = catalog.caption_hash[table.row]
    identity = Identity(index, captions, table.image_hash)
    groups_only = replace(recipe, batch_size=recipe.size)
    groups = list[Ints]()
    blocked = 0.0
    together = 0.0
    windows = routed(table, places, window // recipe.size, recipe.size, generator)
    for part in tqdm(windows, desc="mining", unit="window", disable=None):
        owner = np.zeros(len(part), np.int64)
        dealt = assign_batches(
            groups_only, select_scored(table, part), identity.take(part), owner, generator
        )
        groups.append(part[dealt.batches])
        blocked += dealt.numbers["blocked"] / len(windows)
        together += dealt.numbers["unseparated"]
    mined = generator.permutation(np.concatenate(groups)).reshape(-1, size)
    kept = max(round(fraction * len(mined)), 1)
    others = generator.permutation(mined[kept:].reshape(-1)).reshape(-1, size)
    some = max(MEASURED // size, 1)
    chance = generator.permutation(places)[: some * size].reshape(-1, size)
    numbers = {
        "mined_batches": kept,
        "mined_loss": mean_loss(table, mined[: min(kept, some)], recipe.weights),
        "random_loss": mean_loss(table, chance, recipe.weights),
        "blocked": blocked,
        "unseparated": together,
    }
    return index[generator.permutation(np.concatenate([mined[:kept], others]))], numbers


def check_plan_sizes(pairs: int, recipe: MiningRecipe, fraction: float, window: int) -> None:
    size = recipe.batch_size
    if size < 2 or size > pairs:
        raise ValueError(
            f"--batch_size={size}: must be at least 2, and at most the {pairs} scored pairs"
        )
    if not 0 < fraction <= 1:
        raise ValueError(
            f"--fraction={fraction}: must be above 0 and at most 1; without mining, train without a plan"
        )
    if not 0 <= recipe.group <= size or size % recipe.size or recipe.size < 2:
        raise ValueError(
            f"--group={recipe.group}: must be 0, or 2 to --batch_size={size} and divide it"
        )
    if window < recipe.size:
        raise ValueError(f"--window={window}: must hold at least one group of {recipe.size}")
    if not (0 <= recipe.guard < 1 and 0 < recipe.near <= 1):
        raise ValueError(
            f"--guard={recipe.guard} must be in [0, 1), --near={recipe.near} in (0, 1]"
        )


def mean_loss(table: Scores, batches: Ints, kind: str) -> float:
    return float(
        np.mean(
            [
                batch_losses(select_scored(table, batch), np.arange(len(batch))[None], kind)
                for batch in batches
            ]
        )
    )


def routed(
    table: Scores, places: Ints, most: int, size: int, generator: np.random.Generator
) -> list[Ints]:
    """Places cut into windows of pairs alike, so that hard partners meet: equally many groups each
    (or one more).

    Balanced k-means on [image; text]: centres from scikit-learn's MiniBatchKMeans on a sample, then
    `seated`.

    Args:
        places: whole groups of them.
        most: groups a window.
        size: of a group.
    """
    groups = len(places) // size
    count = math.ceil(groups / most)
    if count == 1:
        return [places]
    from sklearn.cluster import MiniBatchKMeans

    sample = table.features(generator.permutation(places)[:FITTED])
    fitted = MiniBatchKMeans(
        count, batch_size=4096, n_init=1, random_state=int(generator.integers(2**31))
    ).fit(sample)
    seats = size * (groups // count + (np.arange(count) < groups % count))
    window = seated(table, places, fitted.cluster_centers_, seats)
    return [places[window == number] for number in range(count)]


def seated(table: Scores, places: Ints, centres: Floats, seats: Ints) -> Ints:
    """(n,) a window for each place, exactly full: all ask for the nearest centre with seats left,
    the nearest of them get one, the others ask again."""
    assert seats.sum() == len(places)
    window = np.full(len(places), -1)
    left = np.arange(len(places))
    seats = seats.copy()
    while len(left):
        open_ = np.flatnonzero(seats)
        nearest = np.empty(len(left), np.int64)
        distance = np.empty(len(left))
        for start in range(0, len(left), CHUNK):
            here = slice(start, start + CHUNK)
            # squared distance less the pair's own square, which is 2 for all
            apart = (centres[open_] ** 2).sum(axis=1) - 2 * table.features(
                places[left[here]]
            ) @ centres[open_].T
            nearest[here], distance[here] = open_[apart.argmin(axis=1)], apart.min(axis=1)
        order = np.lexsort((distance, nearest))
        asked = np.bincount(nearest, minlength=len(seats))
        turn = np.arange(len(left)) - (np.cumsum(asked) - asked)[nearest[order]]
        served = order[turn < seats[nearest[order]]]
        window[left[served]] = nearest[served]
        seats -= np.bincount(nearest[served], minlength=len(seats))
        left = np.delete(left, served)
    return window
