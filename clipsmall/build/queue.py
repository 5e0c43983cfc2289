"""Build the queue around an objective: its size, and what it asks of the model.

Whatever depends on the kind of queue is asked of its `QueueSpec`, never of its name.
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
    """Of the run's queue; None without one."""
    return QUEUES.get(section.queue)


def queue_options(section: ObjectiveSection) -> Options:
    """The values of the queue's section; none without a queue."""
    if section.queue == "none":
        return {}
    return section.options(section.queue)


def queue_size(section: ObjectiveSection, batch_size: int, pairs: int | None) -> int:
    """K, the pairs a queue holds; 0 without one.

    `auto` is what the queue thinks best (see `queued.longest` for moco; 4 batches for xbm), at most
    65,536 and the data set, a multiple of the batch.

    Args:
        section: config.objective.
        batch_size: over all ranks.
        pairs: of the data set; None for a stream.
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
    """How many columns a row meets, its own pair included, once a queue is full.

    A queue that is used only later in the run does not count: this is for the start.
    """
    queue = spec(section)
    if queue is None or not queue.from_start:
        return context.batch_size

    pairs = None if context.ids is None else len(context.ids)
    queued = queue_size(section, context.batch_size, pairs)
    # of the batch all pairs, or the row's own
    of_batch = context.batch_size if in_batch(section) else 1
    return queued + of_batch


def in_batch(section: ObjectiveSection) -> bool:
    """Whether the batch's other pairs are negatives beside a queue."""
    return bool(queue_options(section).get("in_batch", True))


def queue_description(objective: object) -> str:
    """The queue in the opening line of a run; "" without one."""
    return f", {objective.past.size:,} pairs in the queue" if isinstance(objective, Queued) else ""


def warnings(
    section: ObjectiveSection, batch_size: int, *, fresh: bool, streaming: bool
) -> list[str]:
    """What to say of a queue that will not do what it is there for.

    Args:
        section: config.objective.
        batch_size: over all ranks.
        fresh: the weights have not been trained yet.
        streaming: pairs come from a stream.
    """
    queue = spec(section)
    if queue is None:
        return []
    found = []
    if streaming:
        found.append(
            "streamed pairs have no number of their own: a queue may hold older copies of a row's "
            "pair"
        )
    found.append(queue.warning(queue_options(section), batch_size, fresh))
    return [each for each in found if each]


def queue_head_options(section: ObjectiveSection) -> dict[str, dict[str, Any]]:
    """The heads that the queue asks for, with their options."""
    queue = spec(section)
    return {} if queue is None else given_to_heads(queue.heads, queue_options(section))


def softened(
    section: ObjectiveSection, built: dict[str, Callable[..., Any]], context: RunContext
) -> dict[str, Callable[..., Any]]:
    """The objectives of the mix, with soft targets if the queue's `alpha` asks for them.

    Raises:
        ValueError: no objective of the mix takes soft targets with its options.
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
            f"objective.{section.queue}.alpha: soft targets serve "
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
        pairs: of the whole run, a fraction of which may pass before the queue is used.

    Raises:
        ValueError: no objective of the mix takes more columns than the batch; columns that are not
            gathered; negatives drawn from a batch that gives none.
    """
    kind: Any = section.queue
    if kind == "none":
        return None
    _refuse(section)

    # those that take no more columns than the batch compare within it all the same
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
            f"batch; a queue serves {takers}, or a mix with one of them"
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
    """One objective as it is, several by weight."""
    weights = list(mix.values())
    if weights == [1.0]:
        return next(iter(built.values()))

    weighted = {}
    for name, weight in mix.items():
        weighted[name] = (weight, built[name])
    return Combination(weighted)
