"""Builds the objective of a run: the losses, the heads they need, and how columns are gathered.

Whatever is specific to one objective comes from its `ObjectiveSpec`; no name is tested here.
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
    """Facts about the run for heads and stateful objectives.

    Args:
        loaded: the towers.
        ids: (n,) `index` of all training pairs, ascending; None for streamed data.
        batch_size: pairs compared with one another, over all ranks.
        steps: number of calls of the objective in the whole run.
        seed: seed of the run.
    """
    embeddings = [part for part in loaded.towers.modules() if isinstance(part, nn.Embedding)]
    # the largest embedding table is that of the tokens; there are fewer positions
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
    """D, the width of the embeddings, found by running the text tower on one word."""
    towers = loaded.towers
    training = towers.training

    towers.eval()
    ids = loaded.tokenize(["a"])
    embedding: Tensor = towers.text(ids)
    towers.train(training)
    return embedding.shape[1]


def specs(section: ObjectiveSection) -> list[ObjectiveSpec]:
    """The specs of the objectives in the mix, in order."""
    return [OBJECTIVES[name] for name in section.mix]


def objective_options(section: ObjectiveSection, spec: ObjectiveSpec) -> Options:
    """The config values of an objective's options."""
    return section.options(spec.section)


def used_sections(section: ObjectiveSection) -> tuple[str, ...]:
    """The config sections that this run's loss depends on."""
    used = {spec.section for spec in specs(section)}
    queue = section.queue
    if queue != "none":
        used.add(queue)

    names = [f"objective.{name}" for name in sorted(used)]
    return tuple(names)


def without_effect(section: ObjectiveSection) -> list[str]:
    """Sections set in the config whose objective or queue this run does not use."""
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
    """The heads that the objectives and the queue need, with their options.

    Raises:
        ValueError: two of them need the same head with different options.
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
                    f"objective: two parts of {section.title} need the head {name}, with {known} "
                    f"and with {its}; give both the same options"
                )
    return heads


def heads(section: ObjectiveSection, context: RunContext) -> dict[str, nn.Module]:
    """The heads of the run, with fresh weights."""
    return {name: HEADS[name](context, **its) for name, its in head_options(section).items()}


def reads_token_ids(section: ObjectiveSection) -> bool:
    """Whether a head needs every pair's token ids, so that cached text features are not enough."""
    return any(HEADS[name].reads_token_ids for name in head_options(section))


def retrieval_head(section: ObjectiveSection) -> str:
    """The head whose outputs are used for retrieval; "" = the towers' own features.

    Raises:
        ValueError: the objectives align the outputs of different heads.
    """
    matched = set()
    for spec in specs(section):
        head = spec.retrieval_head(objective_options(section, spec))
        if head is not None:
            matched.add(head)

    if len(matched) > 1 and "" not in matched:
        raise ValueError(
            f"objective.name: {section.title} aligns {' and '.join(sorted(matched))}, but "
            "no common embedding for retrieval; add an objective that aligns the towers' own "
            "features, such as softmax"
        )
    return matched.pop() if len(matched) == 1 else ""


def least_batch(section: ObjectiveSection) -> int:
    """The smallest batch size that the options of the mix allow."""
    return max(spec.least_batch(objective_options(section, spec)) for spec in specs(section))


def mining_weights(section: ObjectiveSection) -> str:
    """Mining's default weights of negatives: those of the first objective in the mix."""
    return specs(section)[0].mining_weights


def learns_scale(section: ObjectiveSection) -> bool:
    """Whether an objective in the mix learns logit_scale."""
    return any(_learns_scale(section, spec) for spec in specs(section))


def learns_bias(section: ObjectiveSection) -> bool:
    """Whether an objective in the mix learns logit_bias."""
    return any(spec.bias is not None for spec in specs(section))


def _learns_scale(section: ObjectiveSection, spec: ObjectiveSpec) -> bool:
    return spec.scale is not None and spec.learns_scale(objective_options(section, spec))


def relative_bias(section: ObjectiveSection) -> bool:
    """Whether logit_bias is in units of logit_scale."""
    return any(spec.relative_bias(objective_options(section, spec)) for spec in specs(section))


def initial_scale(section: ObjectiveSection, given: float | str, loaded: Loaded) -> float:
    """Initial logit_scale.

    Args:
        given: model.logit_scale; "auto" is the scale that the weights were trained with, or for
            fresh weights the initial scale of the first objective that learns one.
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
    """Initial logit_bias, in units of logit_scale if the objective defines it so.

    Args:
        given: model.logit_bias; a number is used unchanged, "auto" works as in `initial_scale`.
        scale: initial logit_scale.
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


def objective_of_mix(
    section: ObjectiveSection, context: RunContext, *, pairs: int, accumulate: int = 1
) -> Callable[..., dict[str, Tensor]]:
    """One objective, or a weighted sum of several, with their options and the queue, if any.

    Args:
        pairs: samples seen in the whole run, optim.pairs.
        accumulate: number of parts that the batch is cut into, each compared only within itself.

    Raises:
        ValueError: no objective trains both towers; one does not work with exchange=ring; or the
            queue or the accumulation does not fit.
    """
    _refuse_ring(section)
    _refuse_one_tower(section)

    mix = section.mix
    built = {}
    for name in mix:
        built[name] = _built(section, OBJECTIVES[name], context)

    whole = build_queue.queued(section, built, context, pairs)
    # no queue
    if whole is None:
        whole = build_queue.joined(mix, built)

    if accumulate > 1:
        _refuse_accumulation(section, context.batch_size * accumulate, accumulate)
        return Accumulated(whole, accumulate)
    return whole


def _built(
    section: ObjectiveSection, spec: ObjectiveSpec, context: RunContext
) -> Callable[..., Any]:
    """One objective of the mix, built with its options."""
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
    """Raises ValueError where naive accumulation is impossible.

    Either a rank's pairs cannot be cut into that many parts, or the run has a queue or heads.
    """
    local = batch_size // world.size()
    if local % parts:
        raise ValueError(f"optim.accumulate={parts} does not divide the {local} pairs of a rank")
    if section.queue != "none" or head_options(section):
        raise ValueError(
            "optim.accumulate is a baseline for objectives without heads or a queue; "
            f"{section.title} needs more: use model.chunk_size, which gives the gradient of the "
            "whole batch"
        )


def columns_of_exchange(exchange: str) -> Callable[[Embeddings], Embeddings]:
    """The function that exchanges embeddings between ranks, chosen by `objective.exchange`."""
    known = {
        "gather": world.gathered_columns,
        "ring": world.ring_columns,
        "host": world.host_columns,
    }
    if exchange == "host":
        # A backward pass over two devices uses two threads, so ranks could start collectives in
        # different orders. A single thread keeps the order of the forward pass.
        torch.autograd.set_multithreading_enabled(False)
    return known[exchange]
