"""Builds the queue of an objective: its size, and the heads it needs.

Whatever is specific to one kind of queue comes from its `QueueSpec`; no name is tested here.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from clipsmall.batch import RunContext
from clipsmall.config.objectives import ObjectiveSection
from clipsmall.objectives import OBJECTIVES, QUEUES, SECTIONS, QueueSpec
from clipsmall.objectives.combination import Combination
from clipsmall.objectives.options import Options, given_to_heads
from clipsmall.objectives.queued import LONGEST, InBatch, Queued


def spec(section: ObjectiveSection) -> QueueSpec | None:
    """The spec of the run's queue; None without a queue."""
    return QUEUES.get(section.queue)


def queue_options(section: ObjectiveSection) -> Options:
    """The config values of the queue's options; empty without a queue."""
    if section.queue == "none":
        return {}
    return section.options(section.queue)


def queue_size(section: ObjectiveSection, batch_size: int, pairs: int | None) -> int:
    """K, the number of pairs in the queue; 0 without a queue.

    `auto` depends on the kind of queue (moco: see `queued.longest`; xbm: 4 batches). It is a
    multiple of the batch size, at most 65,536 and at most the size of the data set.

    Args:
        section: config.objective.
        batch_size: pairs per step, over all ranks.
        pairs: size of the data set; None for streamed data.
    """
    queue = spec(section)
    if queue is None:
        return 0
    given: Any = queue_options(section)["size"]
    if given != "auto":
        return int(given)

    wanted = queue.auto_size(queue_options(section), batch_size)
    most = min(wanted, LONGEST, pairs or LONGEST)
    batches = max(most // batch_size, 1)
    return batches * batch_size


def count_columns(section: ObjectiveSection, context: RunContext) -> int:
    """Number of columns that a row is compared with, its positive included, with a full queue.

    Used for initial values, so a queue that starts later in the run is not counted.
    """
    queue = spec(section)
    if queue is None or not queue.from_start:
        return context.batch_size

    pairs = None if context.ids is None else len(context.ids)
    queued = queue_size(section, context.batch_size, pairs)
    # all pairs of the batch, or only the row's positive
    of_batch = context.batch_size if in_batch(section) else 1
    return queued + of_batch


def in_batch(section: ObjectiveSection) -> bool:
    """Whether the other pairs of the batch are negatives in addition to the queue."""
    return bool(queue_options(section).get("in_batch", True))


def queue_description(objective: object) -> str:
    """The phrase about the queue in the opening line of a run; "" without a queue."""
    return f", {objective.past.size:,} pairs in the queue" if isinstance(objective, Queued) else ""


def warnings(
    section: ObjectiveSection, batch_size: int, *, fresh: bool, streaming: bool
) -> list[str]:
    """Warnings about a queue that is likely to work badly.

    Args:
        section: config.objective.
        batch_size: pairs per step, over all ranks.
        fresh: whether the weights are randomly initialised.
        streaming: whether the data is streamed.
    """
    queue = spec(section)
    if queue is None:
        return []
    found = []
    if streaming:
        found.append(
            "streamed pairs have no stable number: older copies of a row's own pair in the queue "
            "are not recognised"
        )
    found.append(queue.warning(queue_options(section), batch_size, fresh))
    return [each for each in found if each]


def queue_head_options(section: ObjectiveSection) -> dict[str, dict[str, Any]]:
    """The heads that the queue needs, with their options."""
    queue = spec(section)
    return {} if queue is None else given_to_heads(queue.heads, queue_options(section))


def softened(
    section: ObjectiveSection, built: dict[str, Callable[..., Any]], context: RunContext
) -> dict[str, Callable[..., Any]]:
    """The objectives of the mix, with soft targets if the queue's `alpha` is above 0.

    Raises:
        ValueError: no objective of the mix supports soft targets with its options.
    """
    given = queue_options(section)
    alpha = given.get("alpha", 0.0)
    if not alpha:
        return built
    replaced = dict(built)
    for name in built:
        own = section.options(OBJECTIVES[name].section)
        make = OBJECTIVES[name].soft_targets(own)
        if make is not None:
            replaced[name] = make(context, alpha, given["ramp"], section.mask_duplicates)
    if replaced == built:
        raise ValueError(
            f"objective.{section.queue}.alpha: soft targets work with "
            f"{', '.join(_takers_of_soft_targets())} with default options, not "
            f"{section.title}"
        )
    return replaced


def _takers_of_soft_targets() -> list[str]:
    takers = []
    for name, each in OBJECTIVES.items():
        if each.soft_targets(dict(SECTIONS[each.section]())) is not None:
            takers.append(name)
    return takers


def queued(
    section: ObjectiveSection,
    built: dict[str, Callable[..., Any]],
    context: RunContext,
    pairs: int,
) -> Callable[..., dict[str, Tensor]] | None:
    """The objectives of the mix with a queue around them; None if there is no queue.

    Args:
        pairs: samples seen in the whole run; the queue may be used only after a fraction of them.

    Raises:
        ValueError: no objective of the mix supports a queue; objective.exchange is not gather; or
            in_batch is false for an objective that needs negatives from the batch.
    """
    kind: Any = section.queue
    if kind == "none":
        return None
    _refuse(section)

    # objectives without queue support compare within the batch only
    given: dict[str, Callable[..., Any]] = {}
    for name, each in softened(section, built, context).items():
        takes_more = OBJECTIVES[name].queue
        given[name] = each if takes_more else InBatch(each)

    fraction = queue_options(section).get("start", 0.0)
    of_data_set = None if context.ids is None else len(context.ids)
    return Queued(
        joined(section.mix, given),
        kind,
        size=queue_size(section, context.batch_size, of_data_set),
        width=context.width,
        in_batch=in_batch(section),
        start=round(fraction * pairs),
    )


def _refuse(section: ObjectiveSection) -> None:
    """Raises ValueError for a queue that does not fit the mix or the exchange."""
    if not any(OBJECTIVES[name].queue for name in section.mix):
        takers = ", ".join(name for name, each in OBJECTIVES.items() if each.queue)
        raise ValueError(
            f"objective.queue={section.queue}: {', '.join(section.mix)} compares exactly the "
            f"batch; a queue works with {takers}, or a mix with one of them"
        )
    if not in_batch(section):
        for name in section.mix:
            own = section.options(OBJECTIVES[name].section)
            if reason := OBJECTIVES[name].needs_batch_negatives(own):
                raise ValueError(f"objective.{section.queue}.in_batch=false: {reason}")
    if section.exchange != "gather":
        raise ValueError(
            f"objective.queue={section.queue}: every rank holds the queue; use "
            "objective.exchange=gather"
        )


def joined(
    mix: dict[str, float], built: dict[str, Callable[..., Any]]
) -> Callable[..., dict[str, Tensor]]:
    """A single objective unchanged; several as a weighted sum."""
    weights = list(mix.values())
    if weights == [1.0]:
        return next(iter(built.values()))

    weighted = {}
    for name, weight in mix.items():
        weighted[name] = (weight, built[name])
    return Combination(weighted)
