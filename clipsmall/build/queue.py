"""Build the queue around an objective: its size, and what it asks of the model.

Whatever depends on the kind of queue is asked of its `QueueSpec`, never of its name.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from clipsmall.batch import RunContext
from clipsmall.config import Config
from clipsmall.objectives import OBJECTIVES, QUEUES, SECTIONS, QueueSpec
from clipsmall.objectives.combination import Combination
from clipsmall.objectives.options import Options, given_to_heads
from clipsmall.objectives.queued import LONGEST, InBatch, Queued


def spec(config: Config) -> QueueSpec | None:
    """Of the run's queue; None without one."""
    return QUEUES.get(config.objective.queue)


def options(config: Config) -> Options:
    """The values of the queue's section; none without a queue."""
    if config.objective.queue == "none":
        return {}
    return config.objective.options(config.objective.queue)


def size(config: Config, pairs: int | None) -> int:
    """K, the pairs a queue holds; 0 without one.

    `auto` is what the queue thinks best (see `queued.longest` for moco; 4 batches for xbm), at most
    65,536 and the data set, a multiple of the batch.

    Args:
        config: of the run.
        pairs: of the data set; None for a stream.
    """
    queue = spec(config)
    if queue is None:
        return 0
    given: Any = options(config)["size"]
    if given != "auto":
        return int(given)

    batch = config.data.batch_size
    wanted = queue.auto_size(options(config), batch)
    most = min(wanted, LONGEST, pairs or LONGEST)
    batches = max(most // batch, 1)
    return batches * batch


def columns(config: Config, setting: RunContext) -> int:
    """How many columns a row meets, its own pair included, once a queue is full.

    A queue that is used only later in the run does not count: this is for the start.
    """
    queue = spec(config)
    if queue is None or not queue.from_start:
        return setting.batch_size

    pairs = None if setting.ids is None else len(setting.ids)
    queued = size(config, pairs)
    # of the batch all pairs, or the row's own
    of_batch = setting.batch_size if in_batch(config) else 1
    return queued + of_batch


def in_batch(config: Config) -> bool:
    """Whether the batch's other pairs are negatives beside a queue."""
    return bool(options(config).get("in_batch", True))


def told(objective: object) -> str:
    """The queue in the opening line of a run; "" without one."""
    return f", {objective.past.size:,} pairs in the queue" if isinstance(objective, Queued) else ""


def warnings(config: Config, fresh: bool) -> list[str]:
    """What to say of a queue that will not do what it is there for.

    Args:
        config: of the run.
        fresh: the weights have not been trained yet.
    """
    queue = spec(config)
    if queue is None:
        return []
    found = []
    if config.data.streaming:
        found.append(
            "streamed pairs have no number of their own: a queue may hold older copies of a row's "
            "pair"
        )
    found.append(queue.warning(options(config), config.data.batch_size, fresh))
    return [each for each in found if each]


def head_options(config: Config) -> dict[str, dict[str, Any]]:
    """The heads that the queue asks for, with their options."""
    queue = spec(config)
    return {} if queue is None else given_to_heads(queue.heads, options(config))


def softened(
    config: Config, built: dict[str, Callable[..., Any]], setting: RunContext
) -> dict[str, Callable[..., Any]]:
    """The objectives of the mix, with soft targets if the queue's `alpha` asks for them.

    Raises:
        ValueError: no objective of the mix takes soft targets with its options.
    """
    given = options(config)
    alpha = given.get("alpha", 0.0)
    if not alpha:
        return built
    replaced = dict(built)
    for name in built:
        section = config.objective.options(OBJECTIVES[name].section)
        make = OBJECTIVES[name].soft_targets(section)
        if make is not None:
            replaced[name] = make(setting, alpha, given["ramp"], config.objective.mask_duplicates)
    if replaced == built:
        raise ValueError(
            f"objective.{config.objective.queue}.alpha: soft targets serve "
            f"{', '.join(_takers_of_soft_targets())} with default options, not "
            f"{config.objective.title}"
        )
    return replaced


def _takers_of_soft_targets() -> list[str]:
    takers = []
    for name, each in OBJECTIVES.items():
        if each.soft_targets(dict(SECTIONS[each.section]())) is not None:
            takers.append(name)
    return takers


def queued(
    config: Config, built: dict[str, Callable[..., Any]], setting: RunContext
) -> Callable[..., dict[str, Tensor]] | None:
    """The objectives of the mix with a queue around them; None if there is no queue.

    Raises:
        ValueError: no objective of the mix takes more columns than the batch; columns that are not
            gathered; negatives drawn from a batch that gives none.
    """
    kind: Any = config.objective.queue
    if kind == "none":
        return None
    _refuse(config)

    # those that take no more columns than the batch compare within it all the same
    given: dict[str, Callable[..., Any]] = {}
    for name, each in softened(config, built, setting).items():
        takes_more = OBJECTIVES[name].queue
        given[name] = each if takes_more else InBatch(each)

    fraction = options(config).get("start", 0.0)
    pairs = None if setting.ids is None else len(setting.ids)
    return Queued(
        joined(config.objective.mix, given),
        kind,
        size=size(config, pairs),
        width=setting.width,
        in_batch=in_batch(config),
        start=round(fraction * config.optim.pairs),
    )


def _refuse(config: Config) -> None:
    """Raises ValueError for a queue that does not fit the mix or the exchange."""
    objective = config.objective
    if not any(OBJECTIVES[name].queue for name in objective.mix):
        takers = ", ".join(name for name, each in OBJECTIVES.items() if each.queue)
        raise ValueError(
            f"objective.queue={objective.queue}: {', '.join(objective.mix)} compares exactly the "
            f"batch; a queue serves {takers}, or a mix with one of them"
        )
    if not in_batch(config):
        for name in objective.mix:
            section = objective.options(OBJECTIVES[name].section)
            if reason := OBJECTIVES[name].needs_batch_negatives(section):
                raise ValueError(f"objective.{objective.queue}.in_batch=false: {reason}")
    if objective.exchange != "gather":
        raise ValueError(
            f"objective.queue={objective.queue}: every rank holds the queue; use "
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
