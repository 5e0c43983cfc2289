"""Config -> what is compared and how: the objective, and what it asks of the model (heads, scale,
bias).
"""

import inspect
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
from clipsmall.objectives import OBJECTIVES, ObjectiveSpec
from clipsmall.objectives.accumulated import Accumulated


def setting(config: Config, loaded: Loaded, ids: Tensor | None) -> RunContext:
    """Facts of the run for heads and objectives with a memory."""
    embeddings = [
        part.num_embeddings for part in loaded.towers.modules() if isinstance(part, nn.Embedding)
    ]
    return RunContext(
        width=width(loaded),
        batch_size=config.compared,
        steps=config.steps * config.optim.accumulate,
        seed=config.seed,
        towers=loaded.towers,
        # of tokens; positions are fewer
        vocabulary=max(embeddings, default=0),
        ids=ids,
    )


@torch.no_grad()
def width(loaded: Loaded) -> int:
    """D of the embeddings: the text tower is asked with one word."""
    training = loaded.towers.training
    loaded.towers.eval()
    found: Tensor = loaded.towers.text(loaded.tokenize(["a"]))
    loaded.towers.train(training)
    return found.shape[1]


def kinds(config: Config) -> list[ObjectiveSpec]:
    return [OBJECTIVES[name] for name in config.objective.mix]


def sections(config: Config) -> tuple[str, ...]:
    """Of the config, those that this run's loss depends on."""
    used = sorted({kind.section for kind in kinds(config)} | {config.objective.queue} - {"none"})
    return tuple(f"objective.{section}" for section in used)


def options(config: Config, kind: ObjectiveSpec) -> dict[str, Any]:
    return dict(getattr(config.objective, kind.section))


def head_options(config: Config) -> dict[str, dict[str, Any]]:
    """The heads that the objectives of the mix and the queue ask for, each once, with its options.

    Raises:
        ValueError: two of them ask for one head with different options.
    """
    asked: dict[str, dict[str, Any]] = {}
    wanted = [
        (name, {option: options(config, kind)[option] for option in its})
        for kind in kinds(config)
        for name, its in kind.heads.items()
    ]
    for name, mine in [*wanted, *build_queue.head_options(config).items()]:
        if asked.setdefault(name, mine) != mine:
            raise ValueError(
                f"objective: two of {config.objective.title} ask for {name}, with {asked[name]} and {mine}; give them "
                "the same options"
            )
    return asked


def heads(config: Config, setting: RunContext) -> dict[str, nn.Module]:
    return {name: HEADS[name](setting, **its) for name, its in head_options(config).items()}


def through(config: Config) -> str:
    """The head that retrieval goes through: only if no objective of the mix aligns the towers' own
    features.

    Raises:
        ValueError: the objectives align different heads, and nothing in common.
    """
    found = {kind.through(options(config, kind)) for kind in kinds(config)} - {None}
    if len(found) > 1 and "" not in found:
        raise ValueError(
            f"objective.name: {config.objective.title} aligns {' and '.join(sorted(map(str, found)))}, and nothing to "
            "retrieve by; add an objective that aligns the towers' own features, such as softmax"
        )
    return str(found.pop()) if len(found) == 1 else ""


def learns_scale(config: Config, kind: ObjectiveSpec) -> bool:
    return kind.scale is not None and kind.learns_scale(options(config, kind))


def starts(config: Config, loaded: Loaded, setting: RunContext) -> tuple[float, float]:
    """logit_scale and logit_bias at the start: as the user says, else as the weights were trained,
    else as the first objective that learns them starts."""
    scales = [
        kind.scale
        for kind in kinds(config)
        if kind.scale is not None and learns_scale(config, kind)
    ]
    biases = [kind.bias for kind in kinds(config) if kind.bias is not None]
    scale: float = scales[0] if scales else 1.0
    if config.model.logit_scale != "auto":
        scale = config.model.logit_scale
    elif loaded.logit_scale is not None:
        scale = loaded.logit_scale
    bias = biases[0](build_queue.columns(config, setting)) if biases else 0.0
    if config.model.logit_bias != "auto":
        bias = config.model.logit_bias
    else:
        bias = bias if loaded.logit_bias is None else loaded.logit_bias
        relative = "sigmoid" in config.objective.mix and config.objective.sigmoid.relative_bias
        bias = bias / scale if relative else bias
    return scale, bias


def objective(config: Config, setting: RunContext) -> Callable[..., dict[str, Tensor]]:
    """One objective, or several by weight, with their options.

    Raises:
        ValueError: none of them trains both towers, or one needs all columns at once in a ring.
    """
    if config.objective.exchange == "ring":
        for name in config.objective.mix:
            if not OBJECTIVES[name].ring:
                raise ValueError(
                    f"objective.exchange=ring: {name} needs all columns at once; use gather"
                )
    if not any(kind.alone(options(config, kind)) for kind in kinds(config)):
        raise ValueError(
            f"objective.name: {config.objective.title} does not train the text tower; make it a second term, as in "
            f"--objective='{{softmax: 1, {next(iter(config.objective.mix))}: 0.2}}'"
        )
    made = {}
    for name in config.objective.mix:
        kind = OBJECTIVES[name]
        known = inspect.signature(kind.make).parameters
        given = {**options(config, kind), "mask_duplicates": config.objective.mask_duplicates}
        mine = {option: value for option, value in given.items() if option in known}
        as_class = isinstance(kind.make, type)
        made[name] = kind.make(setting, **mine) if as_class else partial(kind.make, **mine)
    whole = build_queue.queued(config, made, setting) or build_queue.joined(
        config.objective.mix, made
    )
    return Accumulated(whole, parts(config)) if config.optim.accumulate > 1 else whole


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
            f"optim.accumulate is a baseline for objectives that compare pairs alone; {config.objective.title} asks "
            "for more: take model.chunk_size, which gives the whole batch's gradient"
        )
    return count


def without_effect(config: Config) -> list[str]:
    """Options that were changed for an objective that is not in the mix."""
    used = {kind.section for kind in kinds(config)} | {config.objective.queue}
    known = {kind.section for kind in OBJECTIVES.values()} | {"moco", "xbm"}
    plain = type(config.objective)()
    return [
        f"objective.{section}"
        for section in sorted(known - used)
        if getattr(config.objective, section) != getattr(plain, section)
    ]


def columns(config: Config) -> Callable[[Embeddings], Embeddings]:
    """How everybody's embeddings come to my rows."""
    known = {
        "gather": world.gathered_columns,
        "ring": world.ring_columns,
        "host": world.host_columns,
    }
    if config.objective.exchange == "host":
        # a backward pass over two devices runs in two threads, and ranks would start their
        # collectives in different
        # orders: one thread goes by the order of the forward pass
        torch.autograd.set_multithreading_enabled(False)
    return known[config.objective.exchange]
