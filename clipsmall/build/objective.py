"""Build the objective of a run: the losses, the heads they need, and how columns are gathered.

Whatever depends on a particular objective is asked of its `ObjectiveSpec`, never of its name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.build import queue as build_queue
from clipsmall.config import Config
from clipsmall.distributed import world
from clipsmall.model.heads import HEADS
from clipsmall.model.towers import Loaded
from clipsmall.objectives import OBJECTIVES, SECTIONS, ObjectiveSpec
from clipsmall.objectives.accumulated import Accumulated
from clipsmall.objectives.options import FOR_ALL, Options, given_to_heads


def setting(config: Config, loaded: Loaded, ids: Tensor | None) -> RunContext:
    """Facts of the run for heads and objectives with a memory.

    Args:
        config: of the run.
        loaded: the towers.
        ids: (n,) ascending `index` of all training pairs; None for a stream.
    """
    embeddings = [part for part in loaded.towers.modules() if isinstance(part, nn.Embedding)]
    # the largest table is that of tokens; positions are fewer
    vocabulary = max((part.num_embeddings for part in embeddings), default=0)
    return RunContext(
        width=width(loaded),
        batch_size=config.compared,
        steps=config.steps * config.optim.accumulate,
        seed=config.seed,
        towers=loaded.towers,
        vocabulary=vocabulary,
        ids=ids,
    )


@torch.no_grad()
def width(loaded: Loaded) -> int:
    """D of the embeddings, found by running the text tower on one word."""
    towers = loaded.towers
    training = towers.training

    towers.eval()
    ids = loaded.tokenize(["a"])
    embedding: Tensor = towers.text(ids)
    towers.train(training)
    return embedding.shape[1]


# ---- what the mix asks for


def kinds(config: Config) -> list[ObjectiveSpec]:
    """The specs of the mix, in its order."""
    return [OBJECTIVES[name] for name in config.objective.mix]


def options(config: Config, spec: ObjectiveSpec) -> Options:
    """The values of the section that an objective reads."""
    return config.objective.options(spec.section)


def sections(config: Config) -> tuple[str, ...]:
    """The sections of the config that this run's loss depends on."""
    used = {spec.section for spec in kinds(config)}
    queue = config.objective.queue
    if queue != "none":
        used.add(queue)

    names = [f"objective.{section}" for section in sorted(used)]
    return tuple(names)


def without_effect(config: Config) -> list[str]:
    """Sections that were changed for an objective or a queue that this run does not have."""
    used = sections(config)
    defaults = type(config.objective)()

    idle = []
    for name in sorted(SECTIONS):
        title = f"objective.{name}"
        given = getattr(config.objective, name)
        default = getattr(defaults, name)
        if given != default and title not in used:
            idle.append(title)
    return idle


def head_options(config: Config) -> dict[str, dict[str, Any]]:
    """The heads that the objectives of the mix and the queue ask for, with their options.

    Raises:
        ValueError: two of them ask for one head with different options.
    """
    asked = []
    for spec in kinds(config):
        asked.append(given_to_heads(spec.heads, options(config, spec)))
    asked.append(build_queue.head_options(config))

    heads: dict[str, dict[str, Any]] = {}
    for each in asked:
        for name, its in each.items():
            known = heads.setdefault(name, its)
            if known != its:
                raise ValueError(
                    f"objective: two of {config.objective.title} ask for {name}, with {known} and "
                    f"{its}; give them the same options"
                )
    return heads


def heads(config: Config, setting: RunContext) -> dict[str, nn.Module]:
    """The heads of the run, with fresh weights."""
    return {name: HEADS[name](setting, **its) for name, its in head_options(config).items()}


def reads_token_ids(config: Config) -> bool:
    """Whether a head needs the token ids of every pair, so cached text features do not suffice."""
    return any(HEADS[name].reads_token_ids for name in head_options(config))


def through(config: Config) -> str:
    """The head that retrieval goes through; "" if an objective matches the towers' own features.

    Raises:
        ValueError: the objectives match different heads, and nothing in common.
    """
    matched = set()
    for spec in kinds(config):
        head = spec.retrieval_head(options(config, spec))
        if head is not None:
            matched.add(head)

    if len(matched) > 1 and "" not in matched:
        raise ValueError(
            f"objective.name: {config.objective.title} aligns {' and '.join(sorted(matched))}, and "
            "nothing to retrieve by; add an objective that aligns the towers' own features, such "
            "as softmax"
        )
    return matched.pop() if len(matched) == 1 else ""


def least_batch(config: Config) -> int:
    """The smallest batch that the options of the mix allow."""
    return max(spec.least_batch(options(config, spec)) for spec in kinds(config))


def mining_weights(config: Config) -> str:
    """How mining weighs negatives by default: as the first objective of the mix does."""
    return kinds(config)[0].mining_weights


# ---- scale and bias


def learns_scale(config: Config, spec: ObjectiveSpec) -> bool:
    return spec.scale is not None and spec.learns_scale(options(config, spec))


def relative_bias(config: Config) -> bool:
    """Whether the bias is in units of the scale."""
    return any(spec.relative_bias(options(config, spec)) for spec in kinds(config))


def starts(config: Config, loaded: Loaded, setting: RunContext) -> tuple[float, float]:
    """logit_scale and logit_bias at the start.

    Those the user gives, else those the weights were trained with, else those of the first
    objective that learns them.
    """
    scale = _initial_scale(config, loaded)
    return scale, _initial_bias(config, loaded, setting, scale)


def _initial_scale(config: Config, loaded: Loaded) -> float:
    if config.model.logit_scale != "auto":
        return config.model.logit_scale
    if loaded.logit_scale is not None:
        return loaded.logit_scale
    for spec in kinds(config):
        if spec.scale is not None and learns_scale(config, spec):
            return spec.scale
    return 1.0


def _initial_bias(config: Config, loaded: Loaded, setting: RunContext, scale: float) -> float:
    if config.model.logit_bias != "auto":
        return config.model.logit_bias
    bias = 0.0
    if loaded.logit_bias is not None:
        bias = loaded.logit_bias
    else:
        learned = [spec.bias for spec in kinds(config) if spec.bias is not None]
        if learned:
            bias = learned[0](build_queue.columns(config, setting))
    return bias / scale if relative_bias(config) else bias


# ---- the objective itself


def objective(config: Config, setting: RunContext) -> Callable[..., dict[str, Tensor]]:
    """One objective, or several by weight, with their options, and the queue around them.

    Raises:
        ValueError: none of them trains both towers; one needs all columns at once in a ring; a
            queue, or accumulation, that does not fit.
    """
    _refuse_ring(config)
    _refuse_one_tower(config)

    mix = config.objective.mix
    built = {}
    for name in mix:
        built[name] = _built(config, OBJECTIVES[name], setting)

    whole = build_queue.queued(config, built, setting)
    # there is no queue
    if whole is None:
        whole = build_queue.joined(mix, built)

    if config.optim.accumulate > 1:
        return Accumulated(whole, parts(config))
    return whole


def _built(config: Config, spec: ObjectiveSpec, setting: RunContext) -> Callable[..., Any]:
    """One objective of the mix, with its options."""
    given = dict(options(config, spec))
    given[FOR_ALL] = config.objective.mask_duplicates
    taken = spec.taken(given)

    if spec.is_class:
        built: Callable[..., Any] = spec.make(setting, **taken)
        return built
    return partial(spec.make, **taken)


def _refuse_ring(config: Config) -> None:
    if config.objective.exchange != "ring":
        return
    for name in config.objective.mix:
        if not OBJECTIVES[name].ring:
            raise ValueError(
                f"objective.exchange=ring: {name} needs all columns at once; use gather"
            )


def _refuse_one_tower(config: Config) -> None:
    if any(spec.trains_both_towers(options(config, spec)) for spec in kinds(config)):
        return
    first = next(iter(config.objective.mix))
    raise ValueError(
        f"objective.name: {config.objective.title} does not train the text tower; make it a second "
        f"term, as in --objective='{{softmax: 1, {first}: 0.2}}'"
    )


def parts(config: Config) -> int:
    """How many parts of a batch naive accumulation compares within themselves.

    Raises:
        ValueError: a rank's pairs cannot be cut so; or something would see the whole batch all the
            same.
    """
    count = config.optim.accumulate
    local = config.data.batch_size // world.size()
    if local % count:
        raise ValueError(f"optim.accumulate={count} does not divide the {local} pairs of a rank")
    if config.objective.queue != "none" or head_options(config):
        raise ValueError(
            "optim.accumulate is a baseline for objectives that need nothing but pairs; "
            f"{config.objective.title} asks for more: take model.chunk_size, which gives the whole "
            "batch's gradient"
        )
    return count


def columns(config: Config) -> Callable[[Embeddings], Embeddings]:
    """How the embeddings of all ranks come to my rows: `objective.exchange`."""
    known = {
        "gather": world.gathered_columns,
        "ring": world.ring_columns,
        "host": world.host_columns,
    }
    if config.objective.exchange == "host":
        # a backward pass over two devices runs in two threads, and ranks would start their
        # collectives in different orders; one thread keeps the order of the forward pass
        torch.autograd.set_multithreading_enabled(False)
    return known[config.objective.exchange]
