"""Queues: an objective's rows also meet pairs of former steps, as columns without gradient."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Embeddings
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.fifo import Fifo
from clipsmall.objectives.options import (
    DeclaredOption,
    Options,
    Section,
    in_order,
    merged,
    options_of,
    options_of_heads,
    section_model,
)
from clipsmall.objectives.soft_targets import SoftTargets

Loss = Callable[[Embeddings, Embeddings], dict[str, Tensor]]
# maps rows and the batch's columns to (N, D) image and (N, D) text features of all ranks' pairs
Features = Callable[[Embeddings, Embeddings], tuple[Tensor, Tensor]]


class Queued(nn.Module):
    """An objective with a queue of both modalities.

    Images meet the batch's and the queued texts, texts the images. The queue starts empty (the
    papers start with random vectors, which are wrong negatives until they are gone), takes any
    batch, is the same on all ranks and is part of the checkpoint. Older copies of a row's own pair,
    and columns with its caption, are no negatives of it (in streamed data pairs are not recognised:
    there only the captions).

    Also known as:
        moco: momentum contrast, MoCo, the queue of ALBEF, BLIP and BriVL. xbm: cross-batch memory,
        memory bank.

    Formula:
        The objective's, over the columns [batch; queue]:

        - moco: columns are made by averaged towers, of the batch as of the queue. A gradient
          reaches the image tower from images among texts, the text tower from texts among images.
        - xbm: columns are the batch itself, with its gradient, and the towers' own features of
          former steps as they were then.

    Source:
        moco: He et al. 2020, arXiv 1911.05722, §3.2, alg. 1; for images and texts BriVL, arXiv
        2103.06561, §3.2, and ALBEF, arXiv 2107.07651, §3.2, eq. 1. xbm: Wang et al. 2020, arXiv
        1912.06798, alg. 1, here of both modalities.

    When to use:
        Small batches of an objective that takes more columns than the batch. moco also from
        scratch: its towers change slowly.

    When not:
        xbm while weights change fast: old features are told apart by their age, and turning all
        features a little at every step is the cheapest way to a low loss. From the first step, or
        with 16 batches, it learned nothing on the glyphs (its authors start after 1,000 steps).

    Related:
        `InBatch` for objectives that compare within the batch; `SoftTargets` for moco.

    Called with rows and the plain batch's columns.

    Args:
        objective: of rows and columns; knows no queue.
        kind: `moco` (rows.extra holds the head momentum's targets) or `xbm`.
        size: pairs in the queue.
        width: D of the features.
        in_batch: moco: the batch's other pairs are negatives, too (ALBEF), or only the queue's are
            (BriVL).
        start: pairs seen before the queue is used.

    Returns:
        What the objective does, and `queue` () the pairs in it.

    Examples:
        >>> from clipsmall.objectives.softmax import softmax
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4))
        >>> loss = Queued(softmax, "xbm", size=8, width=4)
        >>> [loss(pairs, pairs)["queue"].item() for _ in range(4)]
        [0.0, 4.0, 8.0, 8.0]
    """

    def __init__(
        self,
        objective: Loss,
        kind: Literal["moco", "xbm"],
        size: int,
        width: int,
        in_batch: bool = True,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.features = QUEUES[kind].features
        self.in_batch = in_batch
        self.start = start
        self.past = Fifo(size, width, ("image", "text"))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        image, text = self.features(rows, columns)

        # before `start` the queue is filled but not used
        started = self.past.seen >= self.start
        filled = len(self.past) if started else 0
        widened = self.widened(columns, image, text, filled)
        losses = self.objective(rows, widened)
        losses["queue"] = torch.tensor(float(filled), device=image.device)

        # push after use, so that no pair is compared with itself
        self.past.push(
            columns.index,
            columns.caption_hash,
            image=image.detach(),
            text=text.detach(),
        )
        return losses

    def widened(self, columns: Embeddings, image: Tensor, text: Tensor, filled: int) -> Embeddings:
        """The batch's columns followed by those of the queue.

        Args:
            columns: columns of the batch alone.
            image: (N, D) image features to use for the batch's columns.
            text: (N, D) text features to use for them.
            filled: number of pairs in the queue.
        """
        if image is columns.image and not filled:
            return columns

        past = self.past
        queued_image = past.get_buffer("image")[:filled]
        queued_text = past.get_buffer("text")[:filled]
        index = past.index[:filled]
        caption = past.caption[:filled]

        # while the queue is empty, the batch must provide negatives
        only_positives = bool(filled) and not self.in_batch
        return columns._replace(
            image=torch.cat([image, queued_image.to(image.dtype)]),
            text=torch.cat([text, queued_text.to(text.dtype)]),
            index=torch.cat([columns.index, index]),
            caption_hash=torch.cat([columns.caption_hash, caption]),
            live=columns,
            own_only=len(image) if only_positives else 0,
        )


class InBatch(nn.Module):
    """An objective that compares only within the batch, in a run with a queue."""

    def __init__(self, objective: Loss) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        return self.objective(rows, columns.live or columns)


@torch.no_grad()
def averaged_features(rows: Embeddings, columns: Embeddings) -> tuple[Tensor, Tensor]:
    """The averaged towers' features of all ranks' pairs."""
    image = unit(rows.extra["image_target"])
    text = unit(rows.extra["text_target"])

    all_images = world.gather(image)
    all_texts = world.gather(text)
    return all_images, all_texts


def live_features(rows: Embeddings, columns: Embeddings) -> tuple[Tensor, Tensor]:
    """The towers' own features of all ranks' pairs, with gradient."""
    return columns.image, columns.text


# largest queue size chosen by auto
LONGEST = 65_536
# Size of an xbm queue in batches. From scratch on the glyphs at batch size 32 (100,000 pairs, queue
# used after 0.3 of them) 4 batches gave 31 %, no queue 22 %, and 16 batches learned nothing: the
# model tells queued features apart by their age.
FRESH_BATCHES = 4
# largest r = K(1 − m)/B: age of the oldest key over the averaging time of the towers, in steps
STALE = 0.5

Size = Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto"]
MOCO_OPTIONS = {
    "size": DeclaredOption(
        Annotated[
            Size, Field(description="pairs in the queue; auto: 0.5 · batch_size / (1 - momentum)")
        ],
        "auto",
    ),
    "in_batch": DeclaredOption(
        Annotated[
            bool,
            Field(
                description="other pairs of the batch are negatives, too; false: the queue's only"
            ),
        ],
        True,
    ),
}
XBM_OPTIONS = {
    "size": DeclaredOption(Annotated[Size, Field(description="pairs; auto: 4 batches")], "auto"),
    "start": DeclaredOption(
        Annotated[
            float,
            Field(ge=0, lt=1, description="fraction of the run before the queue is used"),
        ],
        0.3,
    ),
}


@dataclass(frozen=True)
class QueueSpec:
    """A kind of queue, and what it asks of the model and of a run."""

    features: Features
    # options of the queue itself
    own_options: Mapping[str, DeclaredOption]
    # maps (options, batch size) to the number of pairs for `size: auto`
    auto_size: Callable[[Options, int], int]
    # maps (options, batch size, whether weights are fresh) to a warning about a bad size; "" = none
    warning: Callable[[Options, int, bool], str]
    # names in HEADS -> defaults that differ from the head's own
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # whether its averaged towers can make soft targets
    soft_targets: bool = False
    # whether the queue is used from the start of a run, as soon as it holds pairs
    from_start: bool = True
    # options that the section lists before all others
    first: tuple[str, ...] = ()
    # as in ObjectiveSpec
    by_second_step: Callable[[int], Mapping[str, float]] = lambda pairs: {}

    def options(self, name: str) -> dict[str, DeclaredOption]:
        """Options of the queue, of its heads and of its soft targets, with their defaults.

        Raises:
            TypeError: an option that nothing uses.
        """
        parts = [
            dict(self.own_options),
            options_of_heads(self.heads),
        ]
        if self.soft_targets:
            parts.append(options_of(SoftTargets))

        found = merged(parts, name)
        return in_order(found, self.first, name)


def longest(batch: int, momentum: float) -> int:
    """The largest moco queue whose oldest key the averaged towers remember, in whole batches.

    The oldest key is K/B steps old, the averaged towers remember 1/(1 − m) steps. Published recipes
    keep r = K(1 − m)/B between 0.12 and 0.64 (BLIP, ALBEF, MoCo); this is the largest K with r ≤
    0.5.
    """
    return max(round(STALE * batch / (1 - momentum)) // batch, 1) * batch


def _stale_moco(options: Options, batch: int, fresh: bool) -> str:
    size = options["size"]
    momentum = options["momentum"]
    if size == "auto" or size <= longest(batch, momentum):
        return ""

    # a sufficient momentum: 1 − m is rounded down to one digit
    largest = STALE * batch / size
    digit = 10.0 ** math.floor(math.log10(largest))
    enough = 1 - largest // digit * digit

    return (
        f"objective.moco.size={size} at momentum {momentum} and batch {batch}: the oldest keys are "
        f"{size / batch:,.0f} steps old, the averaged towers remember {1 / (1 - momentum):,.0f} (r "
        f"= K(1-m)/B = {size * (1 - momentum) / batch:.2g}); take {longest(batch, momentum)} or "
        f"fewer, or momentum {enough:.10g}"
    )


def _stale_xbm(options: Options, batch: int, fresh: bool) -> str:
    size = options["size"]
    if not fresh or size == "auto" or size <= FRESH_BATCHES * batch:
        return ""
    return (
        f"objective.xbm.size={size} is more than {FRESH_BATCHES} batches: features of weights that "
        "learn from scratch age fast, and the queue is told apart by its age; take fewer, or "
        "objective.queue=moco"
    )


QUEUES = {
    "moco": QueueSpec(
        averaged_features,
        MOCO_OPTIONS,
        auto_size=lambda options, batch: longest(batch, options["momentum"]),
        warning=_stale_moco,
        # ALBEF's average, which does not change over the run
        heads={"momentum": {"momentum": 0.995, "schedule": "constant"}},
        soft_targets=True,
        first=("size", "momentum", "schedule"),
    ),
    "xbm": QueueSpec(
        live_features,
        XBM_OPTIONS,
        auto_size=lambda options, batch: FRESH_BATCHES * batch,
        warning=_stale_xbm,
        from_start=False,
        by_second_step=lambda pairs: {"start": 0.5},
    ),
}


def queue_sections() -> dict[str, type[Section]]:
    """The config's sections of the queues, by name.

    Raises:
        TypeError: a queue whose options are not declared as they must be.
    """
    return {name: section_model(name, spec.options(name)) for name, spec in QUEUES.items()}
