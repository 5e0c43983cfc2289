"""Decoupled contrastive learning: softmax without the positive in its own denominator."""

import torch
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import world
from clipsmall.objectives.pairs import both, directions, layout, negatives, within


def dcl(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    intra_modal: bool = False,
    weighted: bool = False,
    sigma: float = 0.5,
) -> dict[str, Tensor]:
    """DCL (Yeh et al. 2022, arXiv 2110.06848, eq. 4 to 6), between the modalities.

    L = ½ mean_i [ log Σ_{j≠i} e^{S_ij} − w_i S_ii ] + the same over columns;  S = logit_scale ·
    cosines.

    w = 1, or for `dclw` w_i = 2 − N softmax_i(cos_ii / sigma) over the batch, without gradient (eq.
    6). A softmax that is nearly sure of a pair stops learning from it, at small batches soonest;
    without the positive in the denominator it goes on. CLOOB's InfoLOOB is the same loss times the
    temperature (arXiv 2110.11316). Made for batches of 16 to
    512. The loss has no lower bound: a learnable scale runs to its limit of 100 at tiny batches.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out.
        intra_modal: the other images are negatives of an image, too, and texts of a text, as in the
            paper's own setting of two views of an image.
        weighted: down-weight pairs that are aligned already (DCLW). sigma: its temperature.

    Returns `loss` (mean over my rows), `accuracy`, `effective_negatives`.

    Raises:
        ValueError: a batch of one pair, which has no negative.
    """
    if len(columns.index) < 2:
        raise ValueError("dcl compares pairs with one another: it needs a batch of at least 2")
    place = layout(rows, columns, mask_duplicates)
    image, text = directions(rows, columns, place)
    accuracy = (image.accuracy + text.accuracy) / 2
    among = within(rows, columns, place) if intra_modal else (None, None)
    loss = image.own.new_zeros(())
    for way, same in zip((image, text), among, strict=True):
        others = way.others if same is None else both(way.others, same)
        weight = weights(way.own / rows.logit_scale, sigma) if weighted else 1.0
        # every column has the row's caption: nothing to learn from
        alone = others == -torch.inf
        loss = loss + (others - weight * way.own).masked_fill(alone, 0.0).mean() / 2
    return {
        "loss": loss,
        "accuracy": accuracy,
        "effective_negatives": negatives(place).float().mean() * (1 + intra_modal),
    }


def weights(cosines: Tensor, sigma: float) -> Tensor:
    """(b,) 2 − N · softmax of my true pairs' cosines among all ranks'; mean 1 over the batch, no
    gradient.

    Below 0 for a pair that stands out so far that N · softmax exceeds 2: as in the paper.
    """
    mine = cosines.detach() / sigma
    everyone = world.gather(mine)
    return 2 - len(everyone) * (mine - everyone.logsumexp(dim=0)).exp()


def dclw(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    intra_modal: bool = False,
    sigma: float = 0.5,
) -> dict[str, Tensor]:
    """DCL with pairs that are aligned already weighing less; see `dcl`."""
    return dcl(rows, columns, mask_duplicates, intra_modal, weighted=True, sigma=sigma)
