"""Neighbours: a pair's partner is replaced by what resembles it most among former pairs."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.fifo import Fifo
from clipsmall.objectives.options import check_options
from clipsmall.objectives.pairs import directions, layout_of, negative_counts, whole_batch
from clipsmall.objectives.spec import ObjectiveSpec


class Queue(Fifo):
    """Unit features of one modality, in which nearest neighbours are looked up."""

    features: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width, ["features"])

    def nearest(self, features: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest entry of each row.

        Args:
            features: (b, D) unit rows.
            index: (b,) of these rows: entries of the same index are no neighbours. There must be
                others, which two entries of one batch are. None = all entries may be.

        Returns:
            (b,) cosine with the entry; (b, D) its features; (b,) its caption's hash.
        """
        filled = len(self)
        entries = self.features[:filled]

        # no entry is a row's own column, but those of its index are left out
        nowhere = torch.full((len(features),), -1, device=features.device)
        layout = Layout(own=nowhere, columns=filled)
        if index is not None:
            layout = replace(layout, groups=((index, self.index[:filled]),))

        cosine, entry = similarity.nearest(features, entries, layout)
        neighbour = self.features[entry]
        caption = self.caption[entry]
        return cosine, neighbour, caption


class Neighbours(nn.Module):
    """Softmax against the nearest neighbours of the true partners, from a queue.

    Also known as:
        NNCLR, nearest-neighbour supervision (NNS) of DeCLIP, nearest-neighbour contrastive loss.

    Formula:
        L = softmax(images, NN(texts)), and with `images` ½ of it + ½ softmax(NN(images), texts);
        NN(t) = the entry of the queue with the largest cosine with t, without gradient.

    Source:
        Dwibedi et al. 2021, arXiv 2104.14548, eq. 2 and 3; Li et al. 2022, arXiv 2110.05208, §3.2.

    When to use:
        Batches of 64 and more, as a second term beside softmax, at weight 0.2 (DeCLIP, with
        `images` off: then texts learn nothing from it). Another description that means nearly the
        same is a positive, too: more varied targets at the same batch. The queue wants as many
        entries as memory allows, but no more than the data set has pairs (DeCLIP 65,536, NNCLR
        98,304).

    When not:
        As the only objective without `images`, which trains the image tower alone. Until `start`
        entries are there every feature is its own neighbour: softmax at half the gradient.

    Related:
        `softmax`; a queue around it (`objective.queue`) adds negatives where this adds positives.

    Called with rows, my b pairs, and columns, exactly all ranks' rows.

    A pair's own former visit is no neighbour. Pairs whose neighbours have one caption are no
    negatives of one another (one whose neighbour has the row's *own* caption still is: a column is
    known by one caption only). Memory: `size` · D floats, twice with `images`.

    Args:
        context: `width` is used.
        size: entries of a queue.
        start: entries before neighbours are taken, at most `size`.
        images: keep images, too, and let texts learn from them.
        mask_duplicates: False = the papers': a former visit is a neighbour, equal neighbours are
            negatives.

    Returns:
        `loss` () mean over my rows; `accuracy` (); `effective_negatives` (); `neighbour_cosine` ()
        with the partner replaced (1 = nothing was); `entries` ().

    Raises:
        ValueError: columns are not exactly all ranks' rows, or a single one; `size` or `start`
            below 2.

    Examples:
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> loss = Neighbours(RunContext(width=4, batch_size=4, steps=10), size=8, start=4)
        >>> [round(loss(pairs, pairs)["neighbour_cosine"].item(), 4) for _ in range(2)]
        [1.0, 0.0]
    """

    def __init__(
        self,
        context: RunContext,
        size: Annotated[int, Field(ge=2, description="entries of the queue")] = 16_384,
        start: Annotated[
            int, Field(ge=2, description="entries before neighbours are taken")
        ] = 4_096,
        images: Annotated[
            bool, Field(description="texts learn from neighbours of images, too")
        ] = True,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        # of a single entry there is no other pair
        check_options("nn", Neighbours, size=size, start=start)
        self.start = min(start, size)
        self.mask_duplicates = mask_duplicates
        self.texts = Queue(size, context.width)
        self.images = Queue(size, context.width) if images else None

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        count = len(columns.index)
        if count < 2:
            raise ValueError("nn compares pairs with one another: it needs a batch of at least 2")
        if not whole_batch(rows, columns):
            raise ValueError(
                f"nn keeps its own queue: it needs all ranks' rows as columns, not {count}"
            )

        # neighbours are looked up before these pairs are in the queue
        image = rows.image.detach()
        text = rows.text.detach()
        terms = [self._compared(rows, columns, rows.image, text, self.texts)]
        if self.images is not None:
            terms.append(self._compared(rows, columns, rows.text, image, self.images))
            all_images = world.gather(image)
            self.images.push(columns.index, columns.caption_hash, features=all_images)

        # the mean of both directions, or of the one
        losses = {}
        for key in terms[0]:
            of_both = [term[key] for term in terms]
            losses[key] = torch.stack(of_both).mean()
        losses["entries"] = torch.tensor(float(len(self.texts)), device=image.device)

        all_texts = world.gather(text)
        self.texts.push(columns.index, columns.caption_hash, features=all_texts)
        return losses

    def _compared(
        self, rows: Embeddings, columns: Embeddings, learning: Tensor, partner: Tensor, queue: Queue
    ) -> dict[str, Tensor]:
        """One modality against the neighbours of the other.

        Args:
            rows: my b pairs.
            columns: the N pairs of the global batch.
            learning: (b, D) the modality that learns.
            partner: (b, D) the other one, without gradient.
            queue: of the partner's modality.
        """
        # until the queue is filled each feature is its own neighbour
        neighbour = partner.to(similarity.wide(partner))
        caption = rows.caption_hash
        cosine = partner.new_ones(len(partner))
        if len(queue) >= self.start:
            own_index = rows.index if self.mask_duplicates else None
            cosine, neighbour, caption = queue.nearest(partner, own_index)

        # `directions` compares images with texts: what learns takes the images' place, what it is
        # compared with that of the texts, whichever they are
        rows = rows._replace(image=learning, text=neighbour, caption_hash=caption)
        ring = len(columns.text) < len(columns.index)
        everyone = neighbour if ring else world.gather(neighbour)
        columns = columns._replace(text=everyone, caption_hash=world.gather(caption))

        layout = layout_of(rows, columns, self.mask_duplicates)
        forth, back = directions(rows, columns, layout)
        return {
            "loss": (forth.cross_entropy.mean() + back.cross_entropy.mean()) / 2,
            "accuracy": (forth.accuracy + back.accuracy) / 2,
            "effective_negatives": negative_counts(layout).float().mean(),
            "neighbour_cosine": cosine.mean(),
        }


SPEC = ObjectiveSpec(
    Neighbours,
    section="nn",
    trains_both_towers=lambda options: bool(options["images"]),
    by_second_step=lambda pairs: {"start": pairs},
)
