"""Sigmoid: every pair is judged by itself, true or not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity
from clipsmall.objectives.pairs import dots, layout, negatives, scaled, ways


def sigmoid(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True, relative_bias: bool = False
) -> dict[str, Tensor]:
    """SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343, eq. 1): summed over columns, mean over
    rows.

    L = −mean_i Σ_j log σ( z_ij (logit_scale · cos_ij + logit_bias) ),  z_ij = 1 for the true pair,
    else −1.

    The bias is the log odds of a true pair. The paper's −10 fits a batch of about 22,000; we start
    at −log(N−1) (`model.logit_bias: auto`; a moco queue counts), which makes the first gradients
    those of softmax at any batch
    size: then it serves batches of 16 and up. No statistics of rows or columns: the cheapest of the
    pair losses.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch; with a queue both modalities'
            columns count half.
        mask_duplicates: leave columns with the row's own caption out; False = plain SigLIP.
        relative_bias: logits are logit_scale · (cos + logit_bias) (Bangachev et al. 2025, arXiv
            2509.18552): a learned scale no longer moves the threshold.

    Returns `loss` (mean over my rows), its parts `positive` and `negative`, `effective_negatives`.
    """
    place = layout(rows, columns, mask_duplicates)
    bias = rows.logit_bias * rows.logit_scale if relative_bias else rows.logit_bias
    compared = ways(rows, columns, place)
    positive = negative = rows.logit_scale.new_zeros(())
    for x, y, own in compared:
        x = scaled(x, rows.logit_scale)
        offset = bias.to(x.dtype).expand(len(x))
        share = torch.full_like(offset, 1 / (len(x) * len(compared)))
        positive = positive + F.softplus(-(dots(x, own) + bias)).mean() / len(compared)
        negative = negative + similarity.total(x, y, place, softplus, share, u=offset)
    return {
        "loss": positive + negative,
        "positive": positive.detach(),
        "negative": negative.detach(),
        "effective_negatives": negatives(place).float().mean(),
    }


def softplus(logits: Tensor) -> tuple[Tensor, Tensor]:
    """−log σ(−logits), the cost of a false pair, and its slope."""
    return F.softplus(logits), logits.sigmoid()
