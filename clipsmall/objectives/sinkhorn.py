"""Sinkhorn: the likelihood of the batch's true pairing, rows and columns competing at once."""

from contextlib import nullcontext
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import (
    dots,
    layout_of,
    negative_counts,
    own_features,
    scaled,
    whole_batch,
)
from clipsmall.objectives.spec import ObjectiveSpec


def sinkhorn(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    iterations: Annotated[
        int, Field(ge=0, description="at most; 0 = one direction of softmax")
    ] = 20,
    tolerance: Annotated[float, Field(ge=0, description="largest row error to stop at")] = 1e-3,
    unrolled: Annotated[bool, Field(description="differentiate through the iterations")] = False,
) -> dict[str, Tensor]:
    """Negative log likelihood of the true pairing under the entropic transport plan.

    Also known as:
        Inverse optimal transport (IOT), entropic OT matching loss, GCA/IOT-CL, Sinkhorn matching
        (as in SuperGlue), doubly normalised InfoNCE.

    Formula:
        P_ij = exp(S_ij + f_i + g_j) has row and column sums 1;
        L = −mean_i log P_ii = −mean_i (S_ii + f_i + g_i),  dL/dS = (P − E)/N by the envelope
        theorem: nothing is unrolled. As −g are the columns' log sums of S + f, holding f alone
        constant gives just this value and just this gradient.

    Source:
        Shi et al. 2023, "Understanding and Generalizing Contrastive Learning from the Inverse
        Optimal Transport Perspective"; potentials and log-domain updates as in Peyré & Cuturi 2019,
        arXiv 1803.00567, §4.4.

    When to use:
        Batches of 16 and up, matching one to one. An iteration costs two matrix products.

    When not:
        Where captions are retrieved by a plain argmax: constants per image and per text do not
        change the loss, so hubs are not punished. `{sinkhorn: 0.5, softmax: 0.5}` is the remedy.
        With a queue it compares the batch alone: the plan needs a square matrix.

    Related:
        At convergence L is at most the smaller of softmax's two directions, and bounds the exact
        pairing likelihood (a permanent) within 1 nat per pair. `sinkhorn_targets` and `swav` use
        the same iterations to make targets.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch, exactly all ranks' rows.
        mask_duplicates: columns with the row's own caption get no mass; False = plain.
        iterations: at most; each ends on the column step. 0 is half an iteration: one direction of
            softmax.
        tolerance: stop when no row sum is further than this from 1. 0 = always all iterations.
        unrolled: differentiate through the iterations instead; the same as they converge, at 3 to
            4 times the cost.

    Returns:
        `loss` () mean over my rows; `row_error` () largest |row sum − 1| of all ranks;
        `iterations` (); `effective_negatives` ().

    Raises:
        ValueError: columns are not as many as all ranks' rows (a queue).

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> round(sinkhorn(pairs, pairs)["loss"].item(), 4)  # symmetric: softmax's loss
        0.3408
    """
    if not whole_batch(rows, columns):
        needed = len(rows.index) * world.size()
        raise ValueError(
            f"sinkhorn needs {needed} columns, all ranks' rows, not {len(columns.index)}"
        )

    layout = layout_of(rows, columns, mask_duplicates, keep_own=True)
    x = scaled(rows.image, rows.logit_scale)
    own_texts = own_features(rows.text, columns.text, layout)
    own = dots(x, own_texts)

    # the gradient goes through the last column step alone
    with nullcontext() if unrolled else torch.no_grad():
        f, used, error = potentials(x, columns.text, layout, iterations, tolerance)

    if iterations:
        # of all columns; each row takes its own column's
        sums = similarity.logsumexp(x, columns.text, layout, u=f, rows=False)
        minus_g = sums.columns[layout.own]
        loss = (minus_g - own - f).mean()
    else:
        sums = similarity.logsumexp(x, columns.text, layout, columns=False)
        loss = (sums.rows - own).mean()

    return {
        "loss": loss,
        "row_error": error,
        "iterations": torch.tensor(float(used), device=x.device),
        "effective_negatives": negative_counts(layout).float().mean(),
    }


def potentials(
    x: Tensor, y: Tensor, layout: Layout, iterations: int, tolerance: float
) -> tuple[Tensor, int, Tensor]:
    """Sinkhorn's iterations, in logs.

    Args:
        x: (b, D) my rows, times the scale.
        y: (N, D) the columns.
        layout: which pairs may have mass.
        iterations: at most.
        tolerance: largest row error to stop at.

    Returns:
        f (b,) of my rows before the last column step; the iterations used; () the largest row error
        of all ranks, so that all stop together.
    """
    first = similarity.logsumexp(x, y, layout, columns=False)
    f = -first.rows
    used = 0
    error = f.new_tensor(torch.inf)
    while used < iterations:
        used += 1
        # columns sum to 1
        by_columns = similarity.logsumexp(x, y, layout, u=f, rows=False)
        g = -by_columns.columns

        # how far the rows are from it; the largest of all ranks, so that all stop together
        by_rows = similarity.logsumexp(x, y, layout, v=g, columns=False)
        row = by_rows.rows
        row_sums = (row.detach() + f.detach()).exp()
        mine = row_sums.sub(1).abs().max()
        error = world.max_over_ranks(mine)
        if used == iterations or bool(error <= tolerance):
            break

        # rows sum to 1
        f = -row
    return f, used, error


SPEC = ObjectiveSpec(sinkhorn, section="sinkhorn")
