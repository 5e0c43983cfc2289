"""Config -> the batches of a run: as they come, or mined."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from clipsmall.batch import Pairs, Progress
from clipsmall.build.data import Read, TrainingData
from clipsmall.config import Config
from clipsmall.data import Catalog, LoadedBatch
from clipsmall.data.scores import all_scores
from clipsmall.distributed import world
from clipsmall.mining import SELECTIONS, Identity, MiningRecipe, ScoredPairs
from clipsmall.mining.online import MinedBatches, PoolView
from clipsmall.mining.schedule import Schedule
from clipsmall.mining.scored_pairs import select_scored
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.towers import Loaded

# hard pairs in a batch of the default method: see README, Mining
GROUP = 4


class Remaining:
    """The batches after `progress`, which is read when iteration starts, to the last one."""

    def __init__(self, read: Read, progress: Progress, steps: int) -> None:
        self.read = read
        self.progress = progress
        self.steps = steps

    def __iter__(self) -> Iterator[LoadedBatch]:
        return iter(self.read(range(self.progress.step, self.steps)))


def batches(
    config: Config,
    data: TrainingData,
    loaded: Loaded,
    progress: Progress,
    accelerator: Accelerator,
    encoder: DualEncoder,
) -> Iterable[LoadedBatch]:
    """The run's batches after `progress`, which is read when iteration starts."""
    pin = accelerator.device.type == "cuda"
    if config.mining.method == "none":
        return Remaining(data.reader(loaded, pin), progress, config.steps)
    made = recipe(config)
    plan = schedule(config, made, data.per_epoch)
    stretches = plan.stretches()
    if not any(stretch.pool for stretch in stretches):
        raise ValueError(
            f"mining: no pool of {plan.pool} batches, {plan.kept} of them played, and the plain ones that "
            f"mining.fraction={plan.fraction} asks for fit between the shares {plan.start} and {plan.end} of "
            f"{plan.steps} steps, and into an epoch of {plan.per_epoch} batches: take a smaller mining.pool, a larger "
            "fraction, or a longer run"
        )
    rows = encoder.chunk_size or config.data.batch_size // world.size()
    seen = partial(score, encoder, accelerator, rows, bool(loaded.description.get("relative_bias")))
    known = reference(config, data.catalog) if made.method == "learnability" else None
    # a pool stays in ordinary memory, its batches are pinned as they leave
    read = data.reader(loaded, pin=False, hash_images=True)
    return MinedBatches(
        read, stretches, seen, made, config.seed, progress, not config.data.streaming, known, pin
    )


def fixed(config: Config) -> tuple[str, ...]:
    """What a mined run cannot change on its way, beside the settings of any run: pools lie at
    shares of its length.
    """
    return ("mining", "optim.pairs") if config.mining.method != "none" else ("mining.method",)


def reference(config: Config, catalog: Catalog | None) -> Callable[[Identity], ScoredPairs]:
    """What finds the scores of pairs by their numbers.

    Raises:
        ValueError: streamed pairs have no numbers; a shard or a pair has no scores.
    """
    if catalog is None:
        raise ValueError(
            "mining.method=learnability looks scores up by a pair's number, which streamed pairs lack"
        )
    scores = all_scores(catalog, Path(config.mining.reference) if config.mining.reference else None)
    if missing := len(catalog) - len(scores.row):
        raise ValueError(
            f"{missing} of {len(catalog)} pairs have no scores, as their images could not be read: have them left out "
            "with data_tools.check_shards --decode"
        )
    numbers = catalog.index[scores.row]
    order = np.argsort(numbers)

    def found(identity: Identity) -> ScoredPairs:
        places = order[np.searchsorted(numbers, identity.index, sorter=order)]
        assert (numbers[places] == identity.index).all()
        return select_scored(scores, places)

    return found


def recipe(config: Config) -> MiningRecipe:
    """Raises ValueError for groups that do not fit the method or the batch."""
    mining = config.mining
    batch = config.data.batch_size
    # auto: GROUP, or fewer where a batch is no multiple of it
    auto = next((k for k in (GROUP, 3, 2) if batch % k == 0), 0) if mining.method == "groups" else 0
    group = auto if mining.group == "auto" else mining.group
    if group and mining.method in SELECTIONS:
        raise ValueError(
            f"mining.group={group}: {mining.method} selects whole batches; leave it at auto"
        )
    by_pairs = next(iter(config.objective.mix)) in ("sigmoid", "bce")
    return MiningRecipe(
        method=mining.method,
        batch_size=config.data.batch_size,
        group=group,
        weights=("sigmoid" if by_pairs else "softmax")
        if mining.weights == "auto"
        else mining.weights,
        swaps=mining.swaps,
        keep=mining.keep,
        near=mining.near,
        guard=mining.guard,
        ratio=None if mining.ratio == "auto" else mining.ratio,
    )


def schedule(config: Config, made: MiningRecipe, per_epoch: int) -> Schedule:
    """Pools of `mining.pool` pairs, in whole batches."""
    mining = config.mining
    least = math.ceil(1 / mining.keep) if made.method in SELECTIONS else 2
    pool = max(mining.pool // config.data.batch_size, least)
    return Schedule(
        config.steps,
        pool,
        made.batches_kept(pool),
        mining.fraction,
        mining.start,
        mining.end,
        per_epoch,
    )


@torch.no_grad()
def score(
    encoder: DualEncoder, accelerator: Accelerator, rows: int, relative: bool, pairs: Pairs
) -> PoolView:
    """Pairs as the model sees them now: eval mode, in the run's precision, `rows` at a time;
    nothing is left behind.

    `relative`: the model's bias is in units of its scale.
    """
    training = encoder.training
    encoder.eval()
    device = accelerator.device
    with accelerator.autocast():
        image = torch.cat(
            [
                encoder.encode_image(part.to(device)).float()
                for part in torch.split(pairs.image, rows)
            ]
        )
        text = torch.cat(
            [encoder.encode_text(part.to(device)).float() for part in torch.split(pairs.text, rows)]
        )
    encoder.train(training)
    scale = encoder.logit_scale.exp()
    bias = encoder.logit_bias.detach()
    return PoolView(image, text, scale, bias * scale if relative else bias)
