"""Softmax: each row picks its own pair among all columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives.pairs import duplicates, effective_negatives, logits, positives


def softmax(rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True) -> dict[str, Tensor]:
    """CLIP's symmetric cross entropy (Radford et al. 2021, arXiv 2103.00020, fig. 3).

    L = ½ mean_i [ LSE_j S_ij − S_ii ] + ½ mean_j [ LSE_i S_ij − S_jj ],  S = logit_scale · cosines.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch.
        mask_duplicates: leave columns with the row's own caption out of its softmax; False = plain CLIP.

    Returns `loss` (mean over my rows) and `accuracy` (share of rows whose own pair scores highest, both ways)
    and `effective_negatives` (columns a row is compared with, less duplicates).
    """
    target = positives(rows, columns)
    by_image = logits(rows.image, columns.text, rows.logit_scale)
    by_text = logits(rows.text, columns.image, rows.logit_scale)
    same = duplicates(rows, columns, target) if mask_duplicates else None
    if same is not None:
        by_image = by_image.masked_fill(same, -torch.inf)
        by_text = by_text.masked_fill(same, -torch.inf)
    hits = (by_image.argmax(dim=1) == target).float() + (by_text.argmax(dim=1) == target).float()
    loss = (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2
    return {
        "loss": loss,
        "accuracy": hits.mean() / 2,
        "effective_negatives": effective_negatives(len(columns.index), same),
    }
