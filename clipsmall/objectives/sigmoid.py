"""Sigmoid: every pair of an image and a text is judged by itself, true or not."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity
from clipsmall.objectives.pairs import comparisons, dots, layout_of, negative_counts, scaled
from clipsmall.objectives.spec import ObjectiveSpec


def sigmoid(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    relative_bias: Annotated[bool, Field(description="logits are scale · (cos + bias)")] = False,
) -> dict[str, Tensor]:
    """SigLIP's loss: binary cross entropy, summed over columns, mean over rows.

    Also known as:
        SigLIP loss, pairwise sigmoid loss.

    Formula:
        L = −mean_i Σ_j log σ( z_ij (logit_scale · cos_ij + logit_bias) ),
        z_ij = 1 for the true pair, else −1.

    Source:
        Zhai et al. 2023, arXiv 2303.15343, eq. 1; `relative_bias`: Bangachev et al. 2025, arXiv
        2509.18552.

    When to use:
        Batches of 16 and up. It needs no statistics of rows or columns: the cheapest of the pair
        losses. The bias is the log odds of a true pair; the paper's −10 fits a batch of about
        22,000. We start at −log(N−1) (`model.logit_bias: auto`; a moco queue counts), which makes
        the first gradients those of softmax at any batch size.

    When not:
        With a fixed bias that was chosen for another batch size.

    Related:
        `bce` balances positive and negatives and needs no prior; `softmax` normalises over columns.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch; with a queue both modalities' columns count half.
        mask_duplicates: leave columns with the row's own caption out; False = plain SigLIP.
        relative_bias: logits are logit_scale · (cos + logit_bias): a learned scale no longer moves
            the threshold.

    Returns:
        `loss` () mean over my rows; its parts `positive` and `negative` (); `effective_negatives`
        ().

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=10.0, logit_bias=-5.0)
        >>> round(sigmoid(pairs, pairs)["loss"].item(), 4)  # four times log(1 + e^−5)
        0.0269
    """
    layout = layout_of(rows, columns, mask_duplicates)
    bias = rows.logit_bias
    if relative_bias:
        bias = rows.logit_bias * rows.logit_scale

    compared = comparisons(rows, columns, layout)
    directions = len(compared)
    positive = negative = rows.logit_scale.new_zeros(())
    for x, y, own in compared:
        x = scaled(x, rows.logit_scale)
        offset = bias.to(x.dtype).expand(len(x))

        # positives
        logits = dots(x, own) + bias
        costs = F.softplus(-logits).mean()
        positive = positive + costs / directions

        # negatives: a mean over rows, a sum over columns
        weights = torch.full_like(offset, 1 / (len(x) * directions))
        costs = similarity.total(x, y, layout, softplus, weights, u=offset)
        negative = negative + costs

    negatives = negative_counts(layout).float()
    return {
        "loss": positive + negative,
        "positive": positive.detach(),
        "negative": negative.detach(),
        "effective_negatives": negatives.mean(),
    }


def softplus(logits: Tensor) -> tuple[Tensor, Tensor]:
    """−log σ(−logits), the cost of a false pair, and its slope."""
    return F.softplus(logits), logits.sigmoid()


def log_odds(columns: int) -> float:
    """Of a true pair among N columns; SigLIP's −10 is the same for N = 22,027."""
    return -math.log(columns - 1)


SPEC = ObjectiveSpec(
    sigmoid,
    section="sigmoid",
    scale=10.0,
    bias=log_odds,
    relative_bias=lambda options: bool(options["relative_bias"]),
    queue=True,
    mining_weights="sigmoid",
)
