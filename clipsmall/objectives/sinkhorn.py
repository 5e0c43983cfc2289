"""Sinkhorn: the likelihood of the batch's true pairing, with rows and columns competing at once."""

import torch
from torch import Tensor

from clipsmall import world
from clipsmall.batch import Embeddings
from clipsmall.objectives.pairs import duplicates, effective_negatives, logits, positives


def sinkhorn(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    iterations: int = 20,
    tolerance: float = 1e-3,
) -> dict[str, Tensor]:
    """Negative log likelihood of the pairing under the entropic transport plan (inverse optimal transport).

    P_ij = exp(S_ij + f_i + g_j) has row and column sums 1; L = −mean_i log P_ii = −mean_i (S_ii + f_i + g_i), and
    by the envelope theorem dL/dS = (P − E)/N: nothing is unrolled (Shi et al. 2023, "Understanding and
    Generalizing Contrastive Learning from the Inverse Optimal Transport Perspective"; the dual potentials and their
    log-domain updates as in Peyré & Cuturi 2019, arXiv 1803.00567, §4.4).

    L ≤ min of the two InfoNCE directions at convergence, and bounds the exact pairing likelihood (a permanent)
    within 1 nat a pair. Per-image and per-text constants do not change it, so hubs are not punished.

    Rows stay sharded: a rank holds (b, N) logits; an iteration exchanges N numbers twice.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch, exactly all ranks' rows.
        mask_duplicates: columns with the row's own caption get no mass; False = plain.
        iterations: at most; each ends on the column step. ½ an iteration would be one direction of softmax.
        tolerance: stop when no row sum is further than this from 1. 0 = always all iterations.

    Returns `loss` (mean over my rows), `row_error` (largest |row sum − 1|, all ranks), `iterations`,
    `effective_negatives`.

    Raises:
        ValueError: columns are not as many as all ranks' rows (a queue): the plan needs a square matrix.
    """
    if len(columns.index) != len(rows.index) * world.size():
        raise ValueError(
            f"sinkhorn needs {len(rows.index) * world.size()} columns, all ranks' rows, not {len(columns.index)}"
        )
    target = positives(rows, columns)
    scores = logits(rows.image, columns.text, rows.logit_scale)
    own = scores.gather(1, target[:, None])[:, 0]
    same = duplicates(rows, columns, target) if mask_duplicates else None
    with torch.no_grad():
        fixed = scores.detach() if same is None else scores.detach().masked_fill(same, -torch.inf)
        f, g, used, error = _potentials(fixed, iterations, tolerance)
        plan = (fixed + f[:, None] + g[None, :]).exp()
        value = -(own.detach() + f + g[target]).mean()
    surrogate = (plan * scores).sum(dim=1).mean() - own.mean()  # its gradient by S is (P − E)/b
    return {
        "loss": surrogate + (value - surrogate).detach(),
        "row_error": error,
        "iterations": torch.tensor(float(used), device=value.device),
        "effective_negatives": effective_negatives(len(columns.index), same),
    }


def _potentials(scores: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, int, Tensor]:
    """Duals f (b,) of my rows and g (N,) of all columns, the iterations used, and the largest row error."""
    g, used, error = scores.new_zeros(scores.shape[1]), 0, scores.new_tensor(torch.inf)
    f = -torch.logsumexp(scores, dim=1)
    while used < iterations and bool(error > tolerance):
        g = -world.logsumexp(scores + f[:, None])
        used += 1
        rows = torch.logsumexp(scores + g[None, :], dim=1)
        error = world.maximum((rows + f).exp().sub(1).abs().max())
        if used < iterations and bool(error > tolerance):
            f = -rows
    return f, g, used, error
