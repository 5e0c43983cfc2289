"""SSL-HSIC: embeddings depend on which pair they are of, and on nothing else."""

from functools import partial

import torch
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import dots, whole_batch


def hsic(
    rows: Embeddings, columns: Embeddings, gamma: float = 1.0, width: float = 1.0
) -> dict[str, Tensor]:
    """SSL-HSIC with image and text as the two views (Li et al. 2021, arXiv 2106.08320, §3).

    L = −HSIC(Z, Y) + gamma √HSIC(Z, Z),  k(x, y) = width / √(width² + ‖x − y‖²),  over the n = 2N
    points Z = [X; Y]: HSIC(Z, Y) = mean_i k(x_i, y_i) − mean_ab K_ab,  HSIC(Z, Z) = mean_ab (H K
    H)²_ab,  H = 1 − 11ᵀ/n.

    The kernel is exact (the paper draws 512 random features, and also learns `width`, from 1). The
    second estimate is too large by about 1/N, and where gamma makes too much of it all embeddings
    become one (a loss of 0 tells): gamma 3, the paper's at a batch of 4,096, did so at batch 16 on
    synthetic pairs and at 256 on the glyphs; 1 did not.

    (H K H)² is never made. With row means r and mean m of K − (mean of K), mean (H K H)² = mean (K
    − …)² − 2 mean r² + m², and its gradient by K_ab is 2 ((K − …)_ab − r_a − r_b + m) / n². Taking
    the mean out first costs nothing and saves the digits that the difference would lose.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch.
        gamma: how much the spread of the embeddings as such counts. width: the kernel's.

    Returns `loss` (the same on all ranks), `dependence` HSIC(Z, Y) and `redundancy` √HSIC(Z, Z).

    Raises:
        ValueError: columns are not as many as all ranks' rows (a queue).
    """
    if not whole_batch(rows, columns):
        raise ValueError(f"hsic needs all ranks' rows as columns, not {len(columns.index)} pairs")
    n = 2 * len(columns.index)
    x = torch.cat([rows.image, rows.text])
    y = torch.cat([columns.image, columns.text])
    everywhere = Layout(torch.arange(len(x), device=x.device), n, keep_own=True, ring=len(y) < n)
    kernel = partial(_kernel, width=width)
    row_means = similarity.row_sums(x, y, everywhere, kernel) / n
    mean = world.mean_over_ranks(row_means.mean())
    # the mean over my rows and all columns
    each = torch.full_like(row_means, 1 / (n * len(x)))
    squares = similarity.total(x, y, everywhere, partial(_squared, width=width, mean=mean), each)

    r = row_means - mean
    m = world.mean_over_ranks(r.mean())
    variance = (
        world.mean_over_ranks(squares) - 2 * world.mean_over_ranks(r.square().mean()) + m.square()
    )
    # the root's slope stays finite when all points are one
    deviation = (variance.clamp(min=0) + 1e-10).sqrt()
    slope = gamma / (2 * deviation)
    pairs = _kernel(dots(rows.image, rows.text), width)[0].mean()
    linear = similarity.total(x, y, everywhere, kernel, each * (1 + slope * (2 * m - 4 * r)))
    dependence = world.mean_over_ranks(pairs) - mean
    surrogate = linear + slope * squares - pairs
    return {
        "loss": surrogate + (gamma * deviation - dependence - surrogate).detach(),
        "dependence": dependence,
        "redundancy": deviation,
    }


def _kernel(cosines: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """k between unit vectors, and its slope by the cosine; bf16 rounds cosines beyond 1."""
    k = width * (width**2 + (2 - 2 * cosines).clamp(min=0)).rsqrt()
    return k, k**3 / width**2


def _squared(cosines: Tensor, width: float, mean: Tensor) -> tuple[Tensor, Tensor]:
    k, slope = _kernel(cosines, width)
    return (k - mean).square(), 2 * (k - mean) * slope
