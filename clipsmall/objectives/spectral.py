"""Spectral contrastive loss: a polynomial, so that a small batch estimates it without bias."""

import torch
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity
from clipsmall.objectives.pairs import dots, layout, negatives, ways


def spectral(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True, mu: float = 10.0
) -> dict[str, Tensor]:
    """The spectral contrastive loss (HaoChen et al. 2021, arXiv 2106.04156, eq. 6) of features of
    length √mu.

    L = −2 mean_i cos_ii + mu · mean_{i≠j} cos_ij²,  which is 1/mu times the paper's loss of x = √mu
    · unit features.

    No temperature, no bias, no logarithm of a sum: its value at any batch size of 2 or more is an
    unbiased estimate. It wants other pairs at right angles, not opposite. Batches of 16 and up; mu
    and the learning rate need tuning (the authors: mu = 1 on CIFAR-10, 10 on ImageNet with batch
    384).

    Args:
        rows: my b pairs. columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out of the mean.
        mu: the weight of the negatives: squared length of the features.

    Returns `loss` (mean over my rows), its parts `positive` and `negative`, `effective_negatives`.
    """
    place = layout(rows, columns, mask_duplicates)
    counts = negatives(place).to(similarity.wide(rows.image))
    compared = ways(rows, columns, place)
    positive = negative = rows.logit_scale.new_zeros(())
    for x, y, own in compared:
        positive = positive - 2 * dots(x, own).mean() / len(compared)
        share = mu / (counts.clamp(min=1) * len(x) * len(compared))
        negative = negative + similarity.total(x, y, place, square, share)
    return {
        "loss": positive + negative,
        "positive": positive.detach(),
        "negative": negative.detach(),
        "effective_negatives": counts.mean(),
    }


def square(cosines: Tensor) -> tuple[Tensor, Tensor]:
    return torch.square(cosines), 2 * cosines
