"""Spectral contrastive loss: a polynomial, so that a small batch estimates it without bias."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity
from clipsmall.objectives.pairs import comparisons, dots, layout_of, negative_counts
from clipsmall.objectives.spec import ObjectiveSpec


def spectral(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    mu: Annotated[float, Field(gt=0, description="weight of the negatives")] = 10.0,
) -> dict[str, Tensor]:
    """Spectral contrastive loss of features of length √mu.

    Also known as:
        SCL, SpectralCL; a low-rank factorisation of the pairs' co-occurrence matrix.

    Formula:
        L = −2 mean_i cos_ii + mu · mean_{i≠j} cos_ij²,
        which is 1/mu times the paper's loss of x = √mu · unit features.

    Source:
        HaoChen et al. 2021, arXiv 2106.04156, eq. 6.

    When to use:
        Batches of 16 and up. No temperature, no bias, no logarithm of a sum: its value at any batch
        size of 2 or more is an unbiased estimate.

    When not:
        Without a search: mu and the learning rate need tuning (the authors: mu = 1 on CIFAR-10, 10
        on ImageNet with batch 384).

    Related:
        `align_uniform` spreads features, too, with a kernel and one logarithm. Spectral wants other
        pairs at right angles, not opposite.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out of the mean.
        mu: weight of the negatives: the squared length of the features.

    Returns:
        `loss` () mean over my rows; its parts `positive` and `negative` (); `effective_negatives`
        ().

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4))
        >>> spectral(pairs, pairs)["loss"].item()  # all others at right angles: the optimum
        -2.0
    """
    layout = layout_of(rows, columns, mask_duplicates)
    counts = negative_counts(layout).to(similarity.wide(rows.image))
    compared = comparisons(rows, columns, layout)
    directions = len(compared)
    positive = negative = rows.logit_scale.new_zeros(())
    for x, y, own in compared:
        # positives
        cosine = dots(x, own).mean()
        positive = positive - 2 * cosine / directions

        # negatives: a mean over rows and over each row's negatives
        weights = mu / (counts.clamp(min=1) * len(x) * directions)
        squares = similarity.total(x, y, layout, square, weights)
        negative = negative + squares

    return {
        "loss": positive + negative,
        "positive": positive.detach(),
        "negative": negative.detach(),
        "effective_negatives": counts.mean(),
    }


def square(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """The square of cosines and its slope."""
    return torch.square(cosines), 2 * cosines


SPEC = ObjectiveSpec(spectral, section="spectral", scale=None, queue=True)
