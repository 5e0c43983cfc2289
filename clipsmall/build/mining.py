"""Builds the batches of a run: in the order of the data, or mined."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from clipsmall.batch import Pairs, Progress
from clipsmall.build.data import ReadBatches, TrainingData
from clipsmall.config.schema import MiningSection
from clipsmall.data import Catalog, LoadedBatch
from clipsmall.data.scores import all_scores
from clipsmall.distributed import world
from clipsmall.mining import SELECTIONS, Identity, MiningRecipe, ScoredPairs
from clipsmall.mining.online import MinedBatches, PoolView
from clipsmall.mining.schedule import Schedule, Stretch
from clipsmall.mining.scored_pairs import select_scored
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.towers import Loaded

# group size of the method `groups` with mining.group=auto; measured in
# docs/pages/guides/mining.md
GROUP = 4


class PlainBatches:
    """The run's batches after `progress`, in the order of the data.

    `progress` is read when iteration starts, because a resumed run has not loaded it before.
    """

    def __init__(self, read: ReadBatches, progress: Progress, steps: int) -> None:
        self.read = read
        self.progress = progress
        self.steps = steps

    def __iter__(self) -> Iterator[LoadedBatch]:
        return iter(self.read(range(self.progress.step, self.steps)))


def batches(
    mining: MiningSection,
    data: TrainingData,
    loaded: Loaded,
    encoder: DualEncoder,
    accelerator: Accelerator,
    progress: Progress,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    objective_weights: str,
) -> Iterable[LoadedBatch]:
    """This rank's slices of the run's batches after `progress`.

    Args:
        batch_size: pairs per step, over all ranks.
        steps: number of steps of the whole run.
        objective_weights: `softmax` or `sigmoid`, how the run's objective weights negatives.

    Raises:
        ValueError: the group size does not fit the method or the batch, the run is too short for
            a pool, or the method needs scores and there are none.
    """
    on_gpu = accelerator.device.type == "cuda"
    if mining.method == "none":
        return PlainBatches(data.reader(loaded, pin=on_gpu), progress, steps)
    recipe = mining_recipe(mining, batch_size, objective_weights)
    stretches = mined_stretches(mining, recipe, steps, data.per_epoch)
    score = partial(
        score_pairs,
        encoder,
        accelerator,
        # as many pairs at a time as in training
        encoder.chunk_size or batch_size // world.size(),
        bool(loaded.description.get("relative_bias")),
    )
    reference = None
    if recipe.method == "learnability":
        reference = reference_scores(mining.reference, data.catalog)
    return MinedBatches(
        # a pool stays in ordinary memory; its batches are pinned when they are returned
        data.reader(loaded, pin=False, hash_images=True),
        stretches,
        score,
        recipe,
        seed,
        progress,
        # after a restart, a stream does not deliver the pairs of a saved plan again
        keep_plans=data.catalog is not None,
        reference=reference,
        pin=on_gpu,
    )


def fixed_mining_options(mining: MiningSection) -> tuple[str, ...]:
    """Options that a resumed run with mining cannot change, in addition to those of every run.

    Pools are placed at fractions of the run's length, so a mined run cannot be made longer.
    """
    return ("mining.method",) if mining.method == "none" else ("mining", "optim.pairs")


def mining_recipe(mining: MiningSection, batch_size: int, objective_weights: str) -> MiningRecipe:
    """How pools are turned into batches, with the `auto` options resolved.

    Raises:
        ValueError: a group size is set for a method that selects whole batches.
    """
    group = group_size(mining, batch_size)
    if group and mining.method in SELECTIONS:
        raise ValueError(
            f"mining.group={group}: {mining.method} selects whole batches; leave it at auto"
        )
    return MiningRecipe(
        method=mining.method,
        batch_size=batch_size,
        group=group,
        weights=objective_weights if mining.weights == "auto" else mining.weights,
        swaps=mining.swaps,
        keep=mining.keep,
        near=mining.near,
        guard=mining.guard,
        ratio=None if mining.ratio == "auto" else mining.ratio,
    )


def group_size(mining: MiningSection, batch_size: int) -> int:
    """Number of pairs in a group; 0 = the whole batch is one group."""
    if mining.group != "auto":
        return mining.group
    if mining.method != "groups":
        return 0
    # a batch is cut into equal groups; they are smaller if GROUP does not divide the batch
    for size in (GROUP, 3, 2):
        if batch_size % size == 0:
            return size
    return 0


def mined_stretches(
    mining: MiningSection, recipe: MiningRecipe, steps: int, per_epoch: int
) -> list[Stretch]:
    """When the run mines, with pools of about `mining.pool` pairs, in whole batches.

    Raises:
        ValueError: not one pool fits into the run.
    """
    # a selection must be able to drop a batch; other methods move pairs between two batches
    least = math.ceil(1 / mining.keep) if recipe.method in SELECTIONS else 2
    pool = max(mining.pool // recipe.batch_size, least)
    plan = Schedule(
        steps,
        pool,
        recipe.batches_kept(pool),
        mining.fraction,
        mining.start,
        mining.end,
        per_epoch,
    )
    stretches = plan.stretches()
    if not any(stretch.pool for stretch in stretches):
        raise ValueError(
            f"mining: not one pool of {plan.pool} batches ({plan.kept} of them trained on), with "
            f"the plain batches that mining.fraction={plan.fraction} asks for, fits between the "
            f"fractions {plan.start} and {plan.end} of {plan.steps} steps and into an epoch of "
            f"{plan.per_epoch} batches: take a smaller mining.pool, a larger mining.fraction, or "
            "a longer run"
        )
    return stretches


def reference_scores(folder: str, catalog: Catalog | None) -> Callable[[Identity], ScoredPairs]:
    """A function that looks up the reference model's embeddings of pairs, by their numbers.

    Args:
        folder: folder of the score sidecars; "" = next to the shards.

    Raises:
        ValueError: the data is streamed (no pair numbers), or a shard or a pair has no scores.
    """
    if catalog is None:
        raise ValueError(
            "mining.method=learnability looks scores up by a pair's number, "
            "which streamed pairs do not have"
        )
    scores = all_scores(catalog, Path(folder) if folder else None)
    if missing := len(catalog) - len(scores.row):
        raise ValueError(
            f"{missing} of {len(catalog)} pairs have no scores, as their images could not be read: "
            "run data_tools.check_shards --decode, which leaves such pairs out"
        )
    numbers = catalog.index[scores.row]
    order = np.argsort(numbers)

    def find(identity: Identity) -> ScoredPairs:
        rows = order[np.searchsorted(numbers, identity.index, sorter=order)]
        assert (numbers[rows] == identity.index).all()
        return select_scored(scores, rows)

    return find


@torch.no_grad()
def score_pairs(
    encoder: DualEncoder,
    accelerator: Accelerator,
    rows: int,
    relative_bias: bool,
    pairs: Pairs,
) -> PoolView:
    """Embed pairs with the current weights, in eval mode and in the run's precision.

    The model's mode is restored afterwards, and no random numbers are drawn.

    Args:
        rows: pairs encoded at a time.
        relative_bias: whether logit_bias is in units of logit_scale.
    """
    training = encoder.training
    encoder.eval()
    device = accelerator.device

    def encode(tower: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        parts = [tower(part.to(device)).float() for part in torch.split(inputs, rows)]
        return torch.cat(parts)

    with accelerator.autocast():
        image = encode(encoder.encode_image, pairs.image)
        text = encode(encoder.encode_text, pairs.text)
    encoder.train(training)
    scale = encoder.logit_scale.exp()
    bias = encoder.logit_bias.detach()
    if relative_bias:
        bias = bias * scale
    return PoolView(image, text, scale, bias)
