"""Queues: an objective's rows also meet pairs of former steps, as columns without gradient."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.fifo import Fifo


class Queued(nn.Module):
    """An objective with a queue of both modalities: images meet the batch's and the queued texts,
    texts the images.

    The queue starts empty (the papers start with random vectors, which are wrong negatives until
    they are gone), takes any batch, and is the same on all ranks and part of the checkpoint. Older
    copies of a row's own pair, and columns with its caption, are no negatives of it (streamed data
    does not know its pairs again: there only the captions).

    moco: columns are made by averaged towers, of the batch as of the queue (MoCo, He et al. 2020,
    arXiv 1911.05722,
        §3.2, alg. 1; for images and texts BriVL, arXiv 2103.06561, §3.2, and ALBEF, arXiv
        2107.07651, §3.2, eq. 1). A gradient reaches the image tower from images among texts, the
        text tower from texts among images.
    xbm: columns are the batch itself, with its gradient, and the towers' own features of former
    steps as they were
        then (cross-batch memory, Wang et al. 2020, arXiv 1912.06798, alg. 1), of both modalities.

    Args:
        objective: of (rows, columns); knows no queue.
        kind: `moco` (rows.extra holds the head momentum's targets) or `xbm`.
        size: pairs in the queue. width: D of the features.
        in_batch: moco: the batch's other pairs are negatives, too (ALBEF), or only the queue's are
            (BriVL).
        start: pairs seen before the queue is met. While weights change fast, old features are told
            apart by their age,
            and turning all features a little at every step is the cheapest way to a low loss: xbm
            from the first step, or with 16 batches, learned nothing on the glyphs (its authors
            start after 1,000 steps; moco's towers change slowly).

    Called with rows and the plain batch's columns it returns what the objective does, and `queue`,
    the pairs in it.
    """

    def __init__(
        self,
        objective: Callable[[Embeddings, Embeddings], dict[str, Tensor]],
        kind: Literal["moco", "xbm"],
        size: int,
        width: int,
        in_batch: bool = True,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.features = FEATURES[kind]
        self.in_batch = in_batch
        self.start = start
        self.past = Fifo(size, width, ("image", "text"))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        image, text = self.features(rows, columns)
        filled = len(self.past) if self.past.seen >= self.start else 0
        losses = self.objective(rows, self.widened(columns, image, text, filled))
        losses["queue"] = torch.tensor(float(filled), device=image.device)
        self.past.push(
            columns.index, columns.caption_hash, image=image.detach(), text=text.detach()
        )
        return losses

    def widened(self, columns: Embeddings, image: Tensor, text: Tensor, filled: int) -> Embeddings:
        """The batch's features image and text (N, D), and the queue's after them."""
        if image is columns.image and not filled:
            return columns
        past = self.past
        return columns._replace(
            image=torch.cat([image, past.get_buffer("image")[:filled].to(image.dtype)]),
            text=torch.cat([text, past.get_buffer("text")[:filled].to(text.dtype)]),
            index=torch.cat([columns.index, past.index[:filled]]),
            caption_hash=torch.cat([columns.caption_hash, past.caption[:filled]]),
            live=columns,
            own_only=0
            if self.in_batch or not filled
            # of an empty queue nobody would learn
            else len(image),
        )


@torch.no_grad()
def averaged(rows: Embeddings, columns: Embeddings) -> tuple[Tensor, Tensor]:
    """(N, D) twice: what the averaged towers make of everybody's pairs."""
    image, text = (world.gather(unit(rows.extra[name])) for name in ("image_target", "text_target"))
    return image, text


def present(rows: Embeddings, columns: Embeddings) -> tuple[Tensor, Tensor]:
    """(N, D) twice: what the towers make of them, with its gradient."""
    return columns.image, columns.text


FEATURES = {"moco": averaged, "xbm": present}


class InBatch(nn.Module):
    """An objective beside a queue that compares within the batch all the same."""

    def __init__(self, objective: Callable[[Embeddings, Embeddings], dict[str, Tensor]]) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        return self.objective(rows, columns.live or columns)
