"""SSL-HSIC: embeddings depend on which pair they are of, and on nothing else."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import dots, whole_batch
from clipsmall.objectives.spec import ObjectiveSpec


def hsic(
    rows: Embeddings,
    columns: Embeddings,
    gamma: Annotated[
        float,
        Field(ge=0, description="weight of the spread; the paper's 3 is for a batch of 4,096"),
    ] = 1.0,
    width: Annotated[float, Field(gt=0, description="of the kernel")] = 1.0,
) -> dict[str, Tensor]:
    """Dependence between embeddings and the identity of pairs, by a kernel.

    Also known as:
        SSL-HSIC, Hilbert-Schmidt independence criterion with an inverse multiquadric (IMQ) kernel,
        the HSIC bottleneck.

    Formula:
        L = −HSIC(Z, Y) + gamma √HSIC(Z, Z),  k(x, y) = width / √(width² + ‖x − y‖²),
        over the n = 2N points Z = [X; Y]:  HSIC(Z, Y) = mean_i k(x_i, y_i) − mean_ab K_ab,
        HSIC(Z, Z) = mean_ab (H K H)²_ab,  H = 1 − 11ᵀ/n.

    Source:
        Li et al. 2021, arXiv 2106.08320, §3, with image and text as the two views. The kernel is
        exact here; the paper draws 512 random features, and also learns `width`, from 1.

    When to use:
        To compare a kernel method with the others, at batches of 64 and up.

    When not:
        With a large gamma at a small batch: the second estimate is too large by about 1/N, and
        where gamma makes too much of it all embeddings become one (a loss of 0 shows that). Gamma
        3, the paper's at a batch of 4,096, did so at batch 16 on synthetic pairs and at 256 on the
        glyphs; 1 did not. Not with a queue.

    Related:
        `align_uniform` and `spectral` spread embeddings by other kernels.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch.
        gamma: how much the spread of the embeddings as such counts.
        width: of the kernel.

    Returns:
        `loss` () the same on all ranks; `dependence` () HSIC(Z, Y); `redundancy` () √HSIC(Z, Z).

    Raises:
        ValueError: columns are not as many as all ranks' rows (a queue).

    Examples:
        >>> pairs = Embeddings.of(torch.eye(2), torch.eye(2))
        >>> terms = hsic(pairs, pairs)
        >>> round(terms["dependence"].item(), 4)  # 1 − ½ (1 + 1/√3)
        0.2113
    """
    if not whole_batch(rows, columns):
        raise ValueError(f"hsic needs all ranks' rows as columns, not {len(columns.index)} pairs")
    # (H K H)² is never made. With row means r and mean m of K − (mean of K), its mean is
    # mean (K − …)² − 2 mean r² + m², and its gradient by K_ab is
    # 2 ((K − …)_ab − r_a − r_b + m) / n². Subtracting the mean first costs nothing and saves the
    # digits that the difference would lose.
    n = 2 * len(columns.index)
    x = torch.cat([rows.image, rows.text])
    y = torch.cat([columns.image, columns.text])
    everything = Layout(
        own=torch.arange(len(x), device=x.device),
        columns=n,
        keep_own=True,
        ring=len(y) < n,
    )

    # (b,) and () of K
    kernel = partial(_kernel, width=width)
    row_means = similarity.row_sums(x, y, everything, kernel) / n
    mean = world.mean_over_ranks(row_means.mean())

    # () mean (K − mean)² over my rows: with these weights a total is a mean over my rows and all
    # columns
    weights = torch.full_like(row_means, 1 / (n * len(x)))
    squared = partial(_squared, width=width, mean=mean)
    squares = similarity.total(x, y, everything, squared, weights)

    # HSIC(Z, Z), and its root
    r = row_means - mean
    m = world.mean_over_ranks(r.mean())
    of_rows = world.mean_over_ranks(r.square().mean())
    variance = world.mean_over_ranks(squares) - 2 * of_rows + m.square()
    # the root's slope stays finite when all points are one
    deviation = (variance.clamp(min=0) + 1e-10).sqrt()
    slope = gamma / (2 * deviation)

    # the first term of HSIC(Z, Y)
    of_pairs, _ = _kernel(dots(rows.image, rows.text), width)
    pairs = of_pairs.mean()

    # the part of the gradient that is linear in K
    linear_weights = weights * (1 + slope * (2 * m - 4 * r))
    linear = similarity.total(x, y, everything, kernel, linear_weights)
    dependence = world.mean_over_ranks(pairs) - mean

    # has the loss's gradient, but another value
    surrogate = linear + slope * squares - pairs
    value = gamma * deviation - dependence
    correction = (value - surrogate).detach()
    return {
        "loss": surrogate + correction,
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


SPEC = ObjectiveSpec(hsic, section="hsic", scale=None)
