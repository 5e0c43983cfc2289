"""Config -> the queue around an objective: its size, what it asks of the model, and whether it is too long."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from clipsmall.batch import Setting
from clipsmall.config import Config
from clipsmall.objectives import OBJECTIVES
from clipsmall.objectives.combination import Combination
from clipsmall.objectives.queued import InBatch, Queued
from clipsmall.objectives.soft_targets import SoftTargets

LONGEST = 65_536
# batches of an xbm queue. From scratch on the glyphs at batch 32 (100,000 pairs, met after 0.3 of them) 4 batches gave
# 31 % where none gave 22 %, and 16 nothing at all: they are told apart by their age.
FRESH = 4
STALE = 0.5  # of K(1 − m)/B: how many times the averaged towers' memory the oldest key is old; see `size`


def size(config: Config, pairs: int | None) -> int:
    """K, the pairs a queue holds; 0 without one.

    moco: the oldest key is K/B steps old, the averaged towers remember 1/(1 − m) steps. Published recipes keep
    r = K(1 − m)/B between 0.12 and 0.64 (BLIP, ALBEF, MoCo); auto takes the largest K with r ≤ 0.5, at most 65,536 and
    the data set (`pairs`), a multiple of B. xbm has no average to be true to: auto is 4 batches.
    """
    objective, batch = config.objective, config.data.batch_size
    if objective.queue == "none":
        return 0
    given = objective.moco.size if objective.queue == "moco" else objective.xbm.size
    if given != "auto":
        return given
    wanted = longest(batch, objective.moco.momentum) if objective.queue == "moco" else FRESH * batch
    return max(min(wanted, LONGEST, pairs or LONGEST) // batch, 1) * batch


def warning(config: Config) -> str:
    """What to say of a moco queue that the user made too long (see `size`); "" of one that is not."""
    moco, batch = config.objective.moco, config.data.batch_size
    if config.objective.queue != "moco" or moco.size == "auto":
        return ""
    forgotten = 1 - moco.momentum
    stale = moco.size * forgotten / batch
    if stale <= STALE * (1 + 1e-9):
        return ""
    return (
        f"objective.moco.size={moco.size} at momentum {moco.momentum} and batch {batch}: the oldest keys are "
        f"{moco.size / batch:,.0f} steps old, the averaged towers remember {1 / forgotten:,.0f} (r = K(1-m)/B = "
        f"{stale:.2g}); take {longest(batch, moco.momentum)} or fewer, or momentum {1 - STALE * batch / moco.size:.4g}"
    )


def longest(batch: int, momentum: float) -> int:
    return max(round(STALE * batch / (1 - momentum)) // batch, 1) * batch


def head_options(config: Config) -> dict[str, dict[str, Any]]:
    """The heads that the queue asks for, with their options."""
    moco = config.objective.moco
    return (
        {"momentum": {"momentum": moco.momentum, "schedule": moco.schedule}} if config.objective.queue == "moco" else {}
    )


def softened(config: Config, made: dict[str, Callable[..., Any]], setting: Setting) -> dict[str, Callable[..., Any]]:
    """softmax against soft targets, if `objective.moco.alpha` asks for them.

    Raises:
        ValueError: there is no queue of moco, or no plain softmax to soften.
    """
    objective, alpha = config.objective, config.objective.moco.alpha
    if not alpha or objective.queue != "moco":
        return made
    if "softmax" not in made or objective.softmax.intra_modal:
        raise ValueError("objective.moco.alpha: soft targets are softmax's, without intra_modal")
    targets = SoftTargets(setting, alpha, objective.moco.ramp, objective.mask_duplicates)
    return {**made, "softmax": targets}


def queued(
    config: Config, made: dict[str, Callable[..., Any]], setting: Setting
) -> Callable[..., dict[str, Tensor]] | None:
    """The objectives of the mix with a queue around them; None if there is none.

    Raises:
        ValueError: no objective of the mix takes more columns than the batch; a ring; parts of a batch.
    """
    objective = config.objective
    if objective.queue == "none":
        return None
    if not any(OBJECTIVES[name].queue for name in made):
        takers = ", ".join(name for name, kind in OBJECTIVES.items() if kind.queue)
        raise ValueError(
            f"objective.queue={objective.queue}: {', '.join(made)} compares exactly the batch; a queue serves "
            f"{takers}, or a mix with one of them"
        )
    if objective.exchange == "ring":
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
    return Queued(inner, objective.queue, size(config, pairs), setting.width, objective.moco.in_batch, start)


def joined(mix: dict[str, float], made: dict[str, Callable[..., Any]]) -> Callable[..., dict[str, Tensor]]:
    """One objective as it is, several by weight."""
    if list(mix.values()) == [1.0]:
        return next(iter(made.values()))
    return Combination({name: (weight, made[name]) for name, weight in mix.items()})
