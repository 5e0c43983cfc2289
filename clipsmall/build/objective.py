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
from clipsmall.config.objectives import ObjectiveSection
from clipsmall.distributed import world
from clipsmall.model.heads import HEADS
from clipsmall.model.towers import Loaded
from clipsmall.objectives import OBJECTIVES, SECTIONS, ObjectiveSpec
from clipsmall.objectives.accumulated import Accumulated
from clipsmall.objectives.options import FOR_ALL, Options, given_to_heads


def context_of_run(
    loaded: Loaded, ids: Tensor | None, *, batch_size: int, steps: int, seed: int
) -> RunContext:
    """Facts of the run for heads and objectives with a memory.

    Args:
        loaded: the towers.
        ids: (n,) ascending `index` of all training pairs; None for a stream.
        batch_size: pairs that are compared with one another, over all ranks.
        steps: times that the objective is called in the whole run.
        seed: of the run.
    """
    embeddings = [part for part in loaded.towers.modules() if isinstance(part, nn.Embedding)]
    # the largest table is that of tokens; positions are fewer
    vocabulary = max((part.num_embeddings for part in embeddings), default=0)
    return RunContext(
        width=width(loaded),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
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


def specs(section: ObjectiveSection) -> list[ObjectiveSpec]:
    """The specs of the mix, in its order."""
    return [OBJECTIVES[name] for name in section.mix]


def objective_options(section: ObjectiveSection, spec: ObjectiveSpec) -> Options:
    """The values of the section that an objective reads."""
    return section.options(spec.section)


def used_sections(section: ObjectiveSection) -> tuple[str, ...]:
    """The sections of the config that this run's loss depends on."""
    used = {spec.section for spec in specs(section)}
    queue = section.queue
    if queue != "none":
        used.add(queue)

    names = [f"objective.{name}" for name in sorted(used)]
    return tuple(names)


def without_effect(section: ObjectiveSection) -> list[str]:
    """Sections that were changed for an objective or a queue that this run does not have."""
    used = used_sections(section)
    defaults = type(section)()

    idle = []
    for name in sorted(SECTIONS):
        title = f"objective.{name}"
        given = getattr(section, name)
        default = getattr(defaults, name)
        if given != default and title not in used:
            idle.append(title)
    return idle


def head_options(section: ObjectiveSection) -> dict[str, dict[str, Any]]:
    """The heads that the objectives of the mix and the queue ask for, with their options.

    Raises:
        ValueError: two of them ask for one head with different options.
    """
    asked = []
    for spec in specs(section):
        asked.append(given_to_heads(spec.heads, objective_options(section, spec)))
    asked.append(build_queue.queue_head_options(section))

    heads: dict[str, dict[str, Any]] = {}
    for each in asked:
        for name, its in each.items():
            known = heads.setdefault(name, its)
            if known != its:
                raise ValueError(
                    f"objective: two of {section.title} ask for {name}, with {known} and "
                    f"{its}; give them the same options"
                )
    return heads


def heads(section: ObjectiveSection, context: RunContext) -> dict[str, nn.Module]:
    """The heads of the run, with fresh weights."""
    return {name: HEADS[name](context, **its) for name, its in head_options(section).items()}


def reads_token_ids(section: ObjectiveSection) -> bool:
    """Whether a head needs the token ids of every pair, so cached text features do not suffice."""
    return any(HEADS[name].reads_token_ids for name in head_options(section))


def retrieval_head(section: ObjectiveSection) -> str:
    """The head that retrieval goes through; "" if an objective matches the towers' own features.

    Raises:
        ValueError: the objectives match different heads, and nothing in common.
    """
    matched = set()
    for spec in specs(section):
        head = spec.retrieval_head(objective_options(section, spec))
        if head is not None:
            matched.add(head)

    if len(matched) > 1 and "" not in matched:
        raise ValueError(
            f"objective.name: {section.title} aligns {' and '.join(sorted(matched))}, and "
            "nothing to retrieve by; add an objective that aligns the towers' own features, such "
            "as softmax"
        )
    return matched.pop() if len(matched) == 1 else ""


def least_batch(section: ObjectiveSection) -> int:
    """The smallest batch that the options of the mix allow."""
    return max(spec.least_batch(objective_options(section, spec)) for spec in specs(section))


def mining_weights(section: ObjectiveSection) -> str:
    """How mining weighs negatives by default: as the first objective of the mix does."""
    return specs(section)[0].mining_weights


# ---- scale and bias


def learns_scale(section: ObjectiveSection) -> bool:
    """Whether an objective of the mix learns the scale."""
    return any(_learns_scale(section, spec) for spec in specs(section))


def learns_bias(section: ObjectiveSection) -> bool:
    """Whether an objective of the mix learns the bias."""
    return any(spec.bias is not None for spec in specs(section))


def _learns_scale(section: ObjectiveSection, spec: ObjectiveSpec) -> bool:
    return spec.scale is not None and spec.learns_scale(objective_options(section, spec))


def relative_bias(section: ObjectiveSection) -> bool:
    """Whether the bias is in units of the scale."""
    return any(spec.relative_bias(objective_options(section, spec)) for spec in specs(section))


def initial_scale(section: ObjectiveSection, given: float | str, loaded: Loaded) -> float:
    """logit_scale at the start.

    Args:
        given: model.logit_scale; "auto" takes the scale the weights were trained with, else that of
            the first objective that learns one.
    """
    if not isinstance(given, str):
        return given
    if loaded.logit_scale is not None:
        return loaded.logit_scale
    for spec in specs(section):
        if spec.scale is not None and _learns_scale(section, spec):
            return spec.scale
    return 1.0


def initial_bias(
    section: ObjectiveSection,
    given: float | str,
    loaded: Loaded,
    context: RunContext,
    scale: float,
) -> float:
    """logit_bias at the start, in units of the scale where the objective wants that.

    Args:
        given: model.logit_bias, taken as it is; "auto" as in `initial_scale`.
        scale: logit_scale at the start.
    """
    if not isinstance(given, str):
        return given
    bias = 0.0
    if loaded.logit_bias is not None:
        bias = loaded.logit_bias
    else:
        learned = [spec.bias for spec in specs(section) if spec.bias is not None]
        if learned:
            bias = learned[0](build_queue.count_columns(section, context))
    return bias / scale if relative_bias(section) else bias


# ---- the objective itself


def objective_of_mix(
    section: ObjectiveSection, context: RunContext, *, pairs: int, accumulate: int = 1
) -> Callable[..., dict[str, Tensor]]:
    """One objective, or several by weight, with their options, and the queue around them.

    Args:
        pairs: of the whole run, optim.pairs.
        accumulate: parts of a batch that are compared within themselves.

    Raises:
        ValueError: none of them trains both towers; one needs all columns at once in a ring; a
            queue, or accumulation, that does not fit.
    """
    _refuse_ring(section)
    _refuse_one_tower(section)

    mix = section.mix
    built = {}
    for name in mix:
        built[name] = _built(section, OBJECTIVES[name], context)

    whole = build_queue.queued(section, built, context, pairs)
    # there is no queue
    if whole is None:
        whole = build_queue.joined(mix, built)

    if accumulate > 1:
        _refuse_accumulation(section, context.batch_size * accumulate, accumulate)
        return Accumulated(whole, accumulate)
    return whole


def _built(
    section: ObjectiveSection, spec: ObjectiveSpec, context: RunContext
) -> Callable[..., Any]:
    """One objective of the mix, with its options."""
    given = dict(objective_options(section, spec))
    given[FOR_ALL] = section.mask_duplicates
    taken = spec.taken(given)

    if spec.is_class:
        built: Callable[..., Any] = spec.make(context, **taken)
        return built
    return partial(spec.make, **taken)


def _refuse_ring(section: ObjectiveSection) -> None:
    if section.exchange != "ring":
        return
    for name in section.mix:
        if not OBJECTIVES[name].ring:
            raise ValueError(
                f"objective.exchange=ring: {name} needs all columns at once; use gather"
            )


def _refuse_one_tower(section: ObjectiveSection) -> None:
    if any(spec.trains_both_towers(objective_options(section, spec)) for spec in specs(section)):
        return
    first = next(iter(section.mix))
    raise ValueError(
        f"objective.name: {section.title} does not train the text tower; make it a second "
        f"term, as in --objective='{{softmax: 1, {first}: 0.2}}'"
    )


def _refuse_accumulation(section: ObjectiveSection, batch_size: int, parts: int) -> None:
    """Raises ValueError where naive accumulation cannot compare parts within themselves.

    A rank's pairs cannot be cut so, or something would see the whole batch all the same.
    """
    local = batch_size // world.size()
    if local % parts:
        raise ValueError(f"optim.accumulate={parts} does not divide the {local} pairs of a rank")
    if section.queue != "none" or head_options(section):
        raise ValueError(
            "optim.accumulate is a baseline for objectives that need nothing but pairs; "
            f"{section.title} asks for more: take model.chunk_size, which gives the whole "
            "batch's gradient"
        )


def columns_of_exchange(exchange: str) -> Callable[[Embeddings], Embeddings]:
    """How the embeddings of all ranks come to my rows: `objective.exchange`."""
    known = {
        "gather": world.gathered_columns,
        "ring": world.ring_columns,
        "host": world.host_columns,
    }
    if exchange == "host":
        # a backward pass over two devices runs in two threads, and ranks would start their
        # collectives in different orders; one thread keeps the order of the forward pass
        torch.autograd.set_multithreading_enabled(False)
    return known[exchange]
