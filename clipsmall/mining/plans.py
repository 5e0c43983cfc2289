"""Plans made from scores before training: windows of similar pairs, mined into batches."""

import math
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from clipsmall.data import Catalog
from clipsmall.data.scores import Scores
from clipsmall.mining import Identity, MiningRecipe, assign_batches
from clipsmall.mining.scored_pairs import Floats, Ints, select_scored
from clipsmall.mining.weights import batch_losses

# number of pairs from which the centres are learned
FITTED = 100_000
# number of pairs compared with the centres at a time
CHUNK = 65_536
# number of pairs over which a mean loss is computed, in whole batches
MEASURED = 65_536


def plan_batches(
    catalog: Catalog, table: Scores, recipe: MiningRecipe, fraction: float, window: int, seed: int
) -> tuple[Ints, dict[str, float]]:
    """Batches of all scored pairs, except a few that do not fill a batch; each pair is used once.

    Hard groups are mined within windows of similar pairs, and each batch combines random groups of
    all windows. If a whole batch came from one window, pairs of different groups would be hard
    negatives, too, the more so the larger the data set. Copies in different groups share a batch as
    often as in random batches.

    All pairs are mined. Then `fraction` of the batches, chosen at random, are kept, and the pairs
    of the others are shuffled into random batches. So hard negatives are searched among all pairs,
    whatever the fraction.

    Args:
        window: largest number of pairs mined together; memory grows with its square.

    Returns:
        (m, B) numbers of pairs in the catalog, and numbers for the report: the fraction of
        combinations of two pairs that must not share a group (`blocked`), how many still do
        (`unseparated`), and the mean losses of mined and of random batches.

    Raises:
        ValueError: sizes that do not fit together, or fewer pairs than a batch.
    """
    size = recipe.batch_size
    generator = np.random.default_rng(seed)
    check_plan_sizes(len(table.row), recipe, fraction, window)
    # pairs that do not fill a batch are left out, at random
    whole = len(table.row) // size * size
    places = np.sort(generator.permutation(len(table.row))[:whole])
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
    batches = generator.permutation(np.concatenate([mined[:kept], others]))
    return index[batches], numbers


def check_plan_sizes(pairs: int, recipe: MiningRecipe, fraction: float, window: int) -> None:
    size = recipe.batch_size
    if size < 2 or size > pairs:
        raise ValueError(
            f"--batch_size={size}: must be at least 2, and at most the {pairs} scored pairs"
        )
    if not 0 < fraction <= 1:
        raise ValueError(
            f"--fraction={fraction}: must be above 0 and at most 1; "
            "without mining, train without a plan"
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
    """Mean loss over batches (m, B) of places in the table."""
    losses = []
    for batch in batches:
        own = np.arange(len(batch))[None]
        losses.append(batch_losses(select_scored(table, batch), own, kind))
    return float(np.mean(losses))


def routed(
    table: Scores, places: Ints, most: int, size: int, generator: np.random.Generator
) -> list[Ints]:
    """Divide pairs into windows of similar pairs, with equally many groups each (or one more).

    Balanced k-means on [image; text]: the centres come from scikit-learn's MiniBatchKMeans on a
    sample, the assignment from `seated`.

    Args:
        places: places of the pairs; their number is a multiple of `size`.
        most: largest number of groups in a window.
        size: number of pairs in a group.
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
    """(n,) the window of each of n pairs, such that every window is exactly full.

    In each round, every unassigned pair asks for the nearest centre with free seats, and each
    centre takes the nearest of the pairs that ask.
    """
    assert seats.sum() == len(places)
    window = np.full(len(places), -1)
    waiting = np.arange(len(places))
    seats = seats.copy()
    while len(waiting):
        open_centres = np.flatnonzero(seats)
        nearest = np.empty(len(waiting), np.int64)
        distance = np.empty(len(waiting))
        squares = (centres[open_centres] ** 2).sum(axis=1)
        for start in range(0, len(waiting), CHUNK):
            here = slice(start, start + CHUNK)
            features = table.features(places[waiting[here]])
            # squared distance minus the pair's squared norm, which is 2 for all pairs
            apart = squares - 2 * features @ centres[open_centres].T
            nearest[here] = open_centres[apart.argmin(axis=1)]
            distance[here] = apart.min(axis=1)
        # sort by centre, then by distance to it
        order = np.lexsort((distance, nearest))
        centre = nearest[order]
        asked = np.bincount(nearest, minlength=len(seats))
        first_of_centre = np.cumsum(asked) - asked
        turn = np.arange(len(waiting)) - first_of_centre[centre]
        served = order[turn < seats[centre]]
        window[waiting[served]] = nearest[served]
        seats -= np.bincount(nearest[served], minlength=len(seats))
        waiting = np.delete(waiting, served)
    return window
