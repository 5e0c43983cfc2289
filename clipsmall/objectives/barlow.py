"""Barlow Twins: one coordinate of image and text agrees, different coordinates do not correlate."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import world
from clipsmall.distributed.batch_norm import moments
from clipsmall.objectives.spec import ObjectiveSpec, Options


def barlow(
    rows: Embeddings,
    columns: Embeddings,
    redundancy: Annotated[
        float, Field(ge=0, description="weight of the correlations between coordinates")
    ] = 5e-3,
) -> dict[str, Tensor]:
    """Cross-correlation between the modalities' coordinates, driven to the identity.

    Also known as:
        Barlow Twins, redundancy reduction, cross-correlation loss.

    Formula:
        L = Σ_d (1 − c_dd)² + redundancy · Σ_{d≠e} c_de²,  c = X̂ᵀ Ŷ / N,
        X̂ and Ŷ standardised in each coordinate over the global batch (eps 1e-5).

    Source:
        Zbontar et al. 2021, arXiv 2103.03230, eq. 1 and 2.

    When to use:
        Small batches with wide embeddings: no pair is compared with another, memory is D² whatever
        the batch, and the paper finds little lost down to 256.

    When not:
        With the paper's `redundancy` at a small batch: chance alone makes the second sum D(D−1)/N.
        With a batch below D choose `redundancy` near 1/D, or it drowns the first sum (5e-3 is for
        D = 8,192 and a batch of 2,048). The loss does not see means, cosines do: synthetic pairs
        (D = 32, batch 64, redundancy 1/D) were found at 79 %, and at 97 % once the features were
        centred.

    Related:
        `vicreg` keeps each modality's own covariance in place of the one between them.

    Args:
        rows: my b pairs, with `image_projected`, `text_projected` (b, D) of the head `projectors`,
            not normalised.
        columns: not looked at.
        redundancy: weight of the second sum.

    Returns:
        `loss` () the same on all ranks; its parts `invariance` () and `redundancy` () (weighted).

    Raises:
        ValueError: a batch of one pair, which has no variance.

    Examples:
        >>> features = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        >>> pairs = Embeddings.of(
        ...     features, features, image_projected=features, text_projected=-features
        ... )
        >>> round(barlow(pairs, pairs)["loss"].item(), 3)  # both coordinates opposite: (1 + 1)²
        8.0
    """
    image = _standardised(rows.extra["image_projected"])
    text = _standardised(rows.extra["text_projected"])

    # (D, D) of the global batch
    count = len(image) * world.size()
    with torch.autocast(image.device.type, enabled=False):
        products = world.differentiable_sum(image.T @ text)
        correlation = products / count

    # its diagonal should be 1, the rest 0
    own = correlation.diagonal()
    invariance = (1 - own).square().sum()
    everything = correlation.square().sum()
    others = redundancy * (everything - own.square().sum())
    return {
        "loss": invariance + others,
        "invariance": invariance.detach(),
        "redundancy": others.detach(),
    }


def _standardised(x: Tensor) -> Tensor:
    """(b, D) mean 0 and variance 1 in each coordinate, over the global batch."""
    count = len(x) * world.size()
    if count < 2:
        raise ValueError("barlow standardises over pairs: it needs a batch of at least 2")

    _, centred, variance = moments(x)
    # coordinates that do not vary stay finite
    factor = (variance + 1e-5).rsqrt()
    return centred * factor


def projectors_if_any(options: Options) -> str:
    """With projectors only their outputs match."""
    return "projectors" if options["widths"] else ""


SPEC = ObjectiveSpec(
    barlow,
    section="barlow",
    heads={"projectors": {}},
    scale=None,
    retrieval_head=projectors_if_any,
)
