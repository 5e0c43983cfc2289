"""Sigmoid: every pair is judged by itself, true or not."""

import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives.pairs import duplicates, effective_negatives, logits, positives


def sigmoid(rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True) -> dict[str, Tensor]:
    """SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343, eq. 1): summed over columns, mean over rows.

    L = −mean_i sum_j log σ( z_ij (logit_scale · cos_ij + logit_bias) ),  z_ij = 1 for the true pair, else −1.

    The bias is the log odds of a true pair. The paper's −10 fits a batch of about 22,000; we start at −log(N−1)
    (`model.logit_bias: auto`), which makes the first gradients those of softmax at any batch size.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch.
        mask_duplicates: leave columns with the row's own caption out; False = plain SigLIP.

    Returns `loss` (mean over my rows), its parts `positive` and `negative`, `effective_negatives`.
    """
    target = positives(rows, columns)
    scores = logits(rows.image, columns.text, rows.logit_scale) + rows.logit_bias
    own = scores.gather(1, target[:, None])
    ignored = duplicates(rows, columns, target) if mask_duplicates else None
    costs = F.softplus(scores).scatter(1, target[:, None], 0.0)
    if ignored is not None:
        costs = costs.masked_fill(ignored, 0.0)
    positive, negative = F.softplus(-own).mean(), costs.sum(dim=1).mean()
    return {
        "loss": positive + negative,
        "positive": positive.detach(),
        "negative": negative.detach(),
        "effective_negatives": effective_negatives(len(columns.index), ignored),
    }
