"""Config -> the queue around an objective: its size, what it asks of the model, and whether it is
too long.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from clipsmall.batch import RunContext
from clipsmall.config import Config
from clipsmall.objectives import OBJECTIVES
from clipsmall.objectives.combination import Combination
from clipsmall.objectives.queued import InBatch, Queued
from clipsmall.objectives.soft_targets import SoftTargets

LONGEST = 65_536
# batches of an xbm queue. From scratch on the glyphs at batch 32 (100,000 pairs, met after 0.3 of
# them) 4 batches gave 31 % where none gave 22 %, and 16 nothing at all: they are told apart by
# their age.
FRESH = 4
# of K(1 − m)/B: how many times the averaged towers' memory the oldest key is old; see `size`
STALE = 0.5


def size(config: Config, pairs: int | None) -> int:
    """K, the pairs a queue holds; 0 without one.

    moco: the oldest key is K/B steps old, the averaged towers remember 1/(1 − m) steps. Published
    recipes keep r = K(1 − m)/B between 0.12 and 0.64 (BLIP, ALBEF, MoCo); auto takes the largest K
    with r ≤ 0.5, at most 65,536 and the data set (`pairs`), a multiple of B. xbm has no average to
    be true to: auto is 4 batches.
    """
    objective = config.objective
    batch = config.data.batch_size
    if objective.queue == "none":
        return 0
    given = objective.moco.size if objective.queue == "moco" else objective.xbm.size
    if given != "auto":
        return given
    wanted = longest(batch, objective.moco.momentum) if objective.queue == "moco" else FRESH * batch
    return max(min(wanted, LONGEST, pairs or LONGEST) // batch, 1) * batch


def columns(config: Config, setting: RunContext) -> int:
    """What a row meets, its own pair included, once a queue is full; for xbm, which is met later,
    at the start.
    """
    if config.objective.queue != "moco":
        return setting.batch_size
    held = size(config, None if setting.ids is None else len(setting.ids))
    return held + (setting.batch_size if config.objective.moco.in_batch else 1)


def told(objective: object) -> str:
    """For the opening line of a run."""
    return f", {objective.past.size:,} pairs in the queue" if isinstance(objective, Queued) else ""


def warnings(config: Config, fresh: bool) -> list[str]:
    """What to say of a queue that will not do what it is there for. fresh: weights that nothing has
    trained yet.
    """
    objective = config.objective
    moco = config.objective.moco
    batch = config.data.batch_size
    found = []
    if objective.queue != "none" and config.data.streaming:
        found.append(
            "streamed pairs have no number of their own: a queue may hold older copies of a row's pair"
        )
    if objective.queue == "xbm" and fresh and size(config, None) > FRESH * batch:
        found.append(
            f"objective.xbm.size={objective.xbm.size} is more than {FRESH} batches: features of weights that learn "
            "from scratch age fast, and the queue is told apart by its age; take fewer, or objective.queue=moco"
        )
    if (
        objective.queue == "moco"
        and moco.size != "auto"
        and moco.size > longest(batch, moco.momentum)
    ):
        most = STALE * batch / moco.size
        # one digit of 1 - m, rounded down
        digit = 10.0 ** math.floor(math.log10(most))
        found.append(
            f"objective.moco.size={moco.size} at momentum {moco.momentum} and batch {batch}: the oldest keys are "
            f"{moco.size / batch:,.0f} steps old, the averaged towers remember {1 / (1 - moco.momentum):,.0f} (r = "
            f"K(1-m)/B = {moco.size * (1 - moco.momentum) / batch:.2g}); take {longest(batch, moco.momentum)} or "
            f"fewer, or momentum {1 - most // digit * digit:.10g}"
        )
    return found


def longest(batch: int, momentum: float) -> int:
    return max(round(STALE * batch / (1 - momentum)) // batch, 1) * batch


def head_options(config: Config) -> dict[str, dict[str, Any]]:
    """The heads that the queue asks for, with their options."""
    moco = config.objective.moco
    return (
        {"momentum": {"momentum": moco.momentum, "schedule": moco.schedule}}
        if config.objective.queue == "moco"
        else {}
    )


def softened(
    config: Config, made: dict[str, Callable[..., Any]], setting: RunContext
) -> dict[str, Callable[..., Any]]:
    """softmax against soft targets, if `objective.moco.alpha` asks for them.

    Raises:
        ValueError: there is no queue of moco, or no plain softmax to soften.
    """
    objective = config.objective
    alpha = config.objective.moco.alpha
    if not alpha or objective.queue != "moco":
        return made
    if "softmax" not in made or objective.softmax.intra_modal:
        raise ValueError("objective.moco.alpha: soft targets are softmax's, without intra_modal")
    targets = SoftTargets(setting, alpha, objective.moco.ramp, objective.mask_duplicates)
    return {**made, "softmax": targets}


def queued(
    config: Config, made: dict[str, Callable[..., Any]], setting: RunContext
) -> Callable[..., dict[str, Tensor]] | None:
    """The objectives of the mix with a queue around them; None if there is none.

    Raises:
        ValueError: no objective of the mix takes more columns than the batch; columns that are not
            gathered; negatives drawn from a batch that gives none.
    """
    objective = config.objective
    in_batch = objective.queue == "xbm" or objective.moco.in_batch
    if objective.queue == "none":
        return None
    if not any(OBJECTIVES[name].queue for name in made):
        takers = ", ".join(name for name, kind in OBJECTIVES.items() if kind.queue)
        raise ValueError(
            f"objective.queue={objective.queue}: {', '.join(made)} compares exactly the batch; a queue serves "
            f"{takers}, or a mix with one of them"
        )
    if "bce" in made and objective.bce.mode != "balanced" and not in_batch:
        raise ValueError(
            "objective.moco.in_batch=false: bce draws its few negatives from the batch, too; use mode balanced"
        )
    if objective.exchange != "gather":
        raise ValueError(
            f"objective.queue={objective.queue}: every rank holds the queue; use objective.exchange=gather"
        )
    given = {
        name: each if OBJECTIVES[name].queue else InBatch(each)
        for name, each in softened(config, made, setting).items()
    }
    pairs = None if setting.ids is None else len(setting.ids)
    inner = joined(objective.mix, given)
    start = round(objective.xbm.start * config.optim.pairs) if objective.queue == "xbm" else 0
    return Queued(inner, objective.queue, size(config, pairs), setting.width, in_batch, start)


def joined(
    mix: dict[str, float], made: dict[str, Callable[..., Any]]
) -> Callable[..., dict[str, Tensor]]:
    """One objective as it is, several by weight."""
    if list(mix.values()) == [1.0]:
        return next(iter(made.values()))
    return Combination({name: (weight, made[name]) for name, weight in mix.items()})
