"""Neighbours: a pair's partner is replaced by what resembles it most among the pairs of former
steps.
"""

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.fifo import Fifo
from clipsmall.objectives.pairs import directions, layout, negatives, whole_batch


class Queue(Fifo):
    """Unit features of one modality."""

    features: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width, ["features"])

    def nearest(self, features: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(b,) cosine with the nearest entry of another index, (b, D) that entry and (b,) its
        caption.

        index: (b,) None = of any. There must be another: two entries of one batch are.
        """
        filled = len(self)
        nowhere = torch.full((len(features),), -1, device=features.device)
        place = Layout(
            nowhere, filled, groups=((index, self.index[:filled]),) if index is not None else ()
        )
        cosine, entry = similarity.nearest(features, self.features[:filled], place)
        return cosine, self.features[entry], self.caption[entry]


class Neighbours(nn.Module):
    """NNCLR between the modalities, DeCLIP's nearest-neighbour supervision (Dwibedi et al. 2021,
    arXiv 2104.14548, eq. 2 and 3; Li et al. 2022, arXiv 2110.05208, section 3.2).

    L = softmax(images, NN(texts)), and if `images`: ½ of it + ½ softmax(NN(images), texts);
    NN(t) = the entry of the queue with the largest cosine with t, without gradient.

    Another description that means nearly the same is a positive, too: more varied targets at the
    same batch. An auxiliary beside softmax, weight 0.2 (DeCLIP, with `images` off: then texts learn
    nothing from it). Alone it needs `images`. Until `start` entries are there every feature is its
    own neighbour: softmax at half the gradient.

    A pair's own former visit is no neighbour. Pairs whose neighbours have one caption are no
    negatives of one another (one whose neighbour has the row's *own* caption still is: a column is
    known by one caption only).

    Made for batches of 64 and more; the queue wants as many entries as memory allows, but no more
    than the data set has pairs (DeCLIP 65,536, NNCLR 98,304). Memory: `size` · D floats, twice with
    `images`.

    Args:
        setting: `width` is used.
        size: entries of a queue. start: entries before neighbours are taken, at most `size`.
        images: keep images, too, and let texts learn from them.
        mask_duplicates: False = the papers': a former visit is a neighbour, equal neighbours are
            negatives.

    Called with rows and columns it returns `loss` (the mean over my rows), `accuracy`,
    `effective_negatives`, `neighbour_cosine` (with the partner replaced; 1 = nothing was) and
    `entries`.

    Raises:
        ValueError: columns are not exactly all ranks' rows, or a single one; `size` or `start`
            below 2.
    """

    def __init__(
        self,
        setting: RunContext,
        size: int = 16_384,
        start: int = 4_096,
        images: bool = True,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        # of one entry nothing is another pair
        if min(size, start) < 2:
            raise ValueError(f"nn: size and start are at least 2, not {min(size, start)}")
        self.start = min(start, size)
        self.mask_duplicates = mask_duplicates
        self.texts = Queue(size, setting.width)
        self.images = Queue(size, setting.width) if images else None

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        if len(columns.index) < 2:
            raise ValueError("nn compares pairs with one another: it needs a batch of at least 2")
        if not whole_batch(rows, columns):
            raise ValueError(
                f"nn keeps its own queue: it needs all ranks' rows as columns, not {len(columns.index)}"
            )
        image = rows.image.detach()
        text = rows.text.detach()
        terms = [self._term(rows, columns, rows.image, text, self.texts)]
        if self.images is not None:
            terms.append(self._term(rows, columns, rows.text, image, self.images))
            self.images.push(columns.index, columns.caption_hash, features=world.gather(image))
        made = {key: torch.stack([term[key] for term in terms]).mean() for key in terms[0]}
        made["entries"] = torch.tensor(float(len(self.texts)), device=image.device)
        self.texts.push(columns.index, columns.caption_hash, features=world.gather(text))
        return made

    def _term(
        self, rows: Embeddings, columns: Embeddings, learning: Tensor, given: Tensor, queue: Queue
    ) -> dict[str, Tensor]:
        """`learning` (b, D) against the neighbours of `given` (b, D), the other modality."""
        partner = given.to(similarity.wide(given))
        caption = rows.caption_hash
        cosine = given.new_ones(len(given))
        if len(queue) >= self.start:
            cosine, partner, caption = queue.nearest(
                given, rows.index if self.mask_duplicates else None
            )
        # for `directions` images are what learns and texts what it is compared with, whichever they
        # are
        rows = rows._replace(image=learning, text=partner, caption_hash=caption)
        everyone = partner if len(columns.text) < len(columns.index) else world.gather(partner)
        columns = columns._replace(text=everyone, caption_hash=world.gather(caption))
        place = layout(rows, columns, self.mask_duplicates)
        forth, back = directions(rows, columns, place)
        return {
            "loss": (forth.surprise.mean() + back.surprise.mean()) / 2,
            "accuracy": (forth.accuracy + back.accuracy) / 2,
            "effective_negatives": negatives(place).float().mean(),
            "neighbour_cosine": cosine.mean(),
        }
