"""Sinkhorn: the likelihood of the batch's true pairing, with rows and columns competing at once."""

from contextlib import nullcontext

import torch
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import dots, layout, negatives, own_column, scaled, whole_batch


def sinkhorn(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    iterations: int = 20,
    tolerance: float = 1e-3,
    unrolled: bool = False,
) -> dict[str, Tensor]:
    """Negative log likelihood of the pairing under the entropic transport plan (inverse optimal
    transport).

    P_ij = exp(S_ij + f_i + g_j) has row and column sums 1; L = −mean_i log P_ii = −mean_i (S_ii +
    f_i + g_i), and by the envelope theorem dL/dS = (P − E)/N: nothing is unrolled (Shi et al. 2023,
    "Understanding and Generalizing Contrastive Learning from the Inverse Optimal Transport
    Perspective"; the dual potentials and their log-domain updates as in Peyré & Cuturi 2019, arXiv
    1803.00567, §4.4). As −g are the columns' log sums of S + f, holding f alone constant gives just
    this value and just this gradient.

    L ≤ min of the two InfoNCE directions at convergence, and bounds the exact pairing likelihood (a
    permanent) within 1 nat a pair. Per-image and per-text constants do not change it, so hubs are
    not punished and a plain
    argmax over all captions suffers: `{sinkhorn: 0.5, softmax: 0.5}` is the remedy. Batches of 16
    and up; an iteration costs two matrix products.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch, exactly all ranks' rows.
        mask_duplicates: columns with the row's own caption get no mass; False = plain.
        iterations: at most; each ends on the column step. 0 is half an iteration: one direction of
            softmax.
        tolerance: stop when no row sum is further than this from 1. 0 = always all iterations.
        unrolled: differentiate through the iterations instead; the same as they converge, 3 to 4
            times the cost.

    Returns `loss` (mean over my rows), `row_error` (largest |row sum − 1|, all ranks),
    `iterations`, `effective_negatives`.

    Raises:
        ValueError: columns are not as many as all ranks' rows (a queue): the plan needs a square
            matrix.
    """
    if not whole_batch(rows, columns):
        raise ValueError(
            f"sinkhorn needs {len(rows.index) * world.size()} columns, all ranks' rows, not {len(columns.index)}"
        )
    place = layout(rows, columns, mask_duplicates, keep_own=True)
    x = scaled(rows.image, rows.logit_scale)
    own = dots(x, own_column(rows.text, columns.text, place))
    with nullcontext() if unrolled else torch.no_grad():
        f, used, error = potentials(x, columns.text, place, iterations, tolerance)
    if iterations:
        minus_g = similarity.logsumexp(x, columns.text, place, u=f, rows=False).columns[place.own]
        loss = (minus_g - own - f).mean()
    else:
        loss = (similarity.logsumexp(x, columns.text, place, columns=False).rows - own).mean()
    return {
        "loss": loss,
        "row_error": error,
        "iterations": torch.tensor(float(used), device=x.device),
        "effective_negatives": negatives(place).float().mean(),
    }


def potentials(
    x: Tensor, y: Tensor, place: Layout, iterations: int, tolerance: float
) -> tuple[Tensor, int, Tensor]:
    """f (b,) of my rows before the last column step, the iterations used, and the largest row error
    of all ranks.
    """
    f = -similarity.logsumexp(x, y, place, columns=False).rows
    used = 0
    error = f.new_tensor(torch.inf)
    while used < iterations:
        used += 1
        g = -similarity.logsumexp(x, y, place, u=f, rows=False).columns
        row = similarity.logsumexp(x, y, place, v=g, columns=False).rows
        error = world.max_over_ranks((row.detach() + f.detach()).exp().sub(1).abs().max())
        if used == iterations or bool(error <= tolerance):
            break
        f = -row
    return f, used, error
