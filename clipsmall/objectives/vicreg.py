"""VICReg: embeddings of a pair are near, every coordinate varies, and no two vary together."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.batch_norm import moments
from clipsmall.objectives.barlow import projectors_if_any
from clipsmall.objectives.spec import ObjectiveSpec


def vicreg(
    rows: Embeddings,
    columns: Embeddings,
    invariance: Annotated[
        float, Field(ge=0, description="weight of the distance within a pair")
    ] = 25.0,
    variance: Annotated[
        float, Field(ge=0, description="weight of each coordinate's variance")
    ] = 25.0,
    covariance: Annotated[
        float, Field(ge=0, description="weight of the covariances between coordinates")
    ] = 1.0,
) -> dict[str, Tensor]:
    """Invariance of a pair, variance and covariance of each modality by itself.

    Also known as:
        VICReg, variance-invariance-covariance regularisation.

    Formula:
        L = invariance · mean (x − y)² + variance · ½ [v(X) + v(Y)] + covariance · [c(X) + c(Y)],
        v(X) = mean_d relu(1 − √(Var_d + 1e-4)),  c(X) = Σ_{d≠e} Cov_de² / D,
        Var and Cov over the global batch, by N − 1. The ½ is the official code's; the paper's eq. 6
        has v(X) + v(Y), as has solo-learn: `variance` 50 is that.

    Source:
        Bardes et al. 2021, arXiv 2105.04906, eq. 1 to 6.

    When to use:
        Small batches, as a second term: memory is D², whatever the batch; the paper loses 1 of 68
        points at 128. The two branches share nothing, so modalities as different as image and text
        suit it; it is the only term here that asks each of them by itself to spread.

    When not:
        Normalised features: unit vectors have a standard deviation of at most 1/√D per coordinate,
        and v pulls at 1 for ever.

    Related:
        `barlow` decorrelates between the modalities; `align_uniform` spreads on the sphere.

    Args:
        rows: my b pairs, with `image_projected`, `text_projected` (b, D) of the head `projectors`,
            not normalised.
        columns: not looked at.
        invariance: weight of the first term (the paper's λ).
        variance: weight of the second (μ).
        covariance: weight of the third (ν).

    Returns:
        `loss` (), its first term the mean over my rows, the others the same on all ranks; the three
        weighted terms by their names ().

    Raises:
        ValueError: a batch of one pair, which has no variance.

    Examples:
        >>> features = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        >>> pairs = Embeddings.of(
        ...     features, features, image_projected=features, text_projected=-features
        ... )
        >>> vicreg(pairs, pairs)["loss"].item()  # 25 · 2²; coordinates vary, and independently
        100.0
    """
    image = _at_least_float32(rows.extra["image_projected"])
    text = _at_least_float32(rows.extra["text_projected"])
    image_spread, image_overlap = _spread_and_overlap(image)
    text_spread, text_overlap = _spread_and_overlap(text)
    terms = {
        "invariance": invariance * F.mse_loss(image, text),
        "variance": variance * (image_spread + text_spread) / 2,
        "covariance": covariance * (image_overlap + text_overlap),
    }
    loss = terms["invariance"] + terms["variance"] + terms["covariance"]
    return {
        "loss": loss,
        "invariance": terms["invariance"].detach(),
        "variance": terms["variance"].detach(),
        "covariance": terms["covariance"].detach(),
    }


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(similarity.wide(x))


def _spread_and_overlap(x: Tensor) -> tuple[Tensor, Tensor]:
    """v and c of one modality."""
    count = len(x) * world.size()
    if count < 2:
        raise ValueError("vicreg measures how pairs vary: it needs a batch of at least 2")

    # v: moments divide by N, the paper by N − 1
    _, centred, variance = moments(x)
    unbiased = variance * (count / (count - 1))
    deviation = (unbiased + 1e-4).sqrt()
    missing = F.relu(1 - deviation)

    # c: all entries of the matrix but its diagonal
    with torch.autocast(x.device.type, enabled=False):
        products = world.differentiable_sum(centred.T @ centred)
        covariance = products / (count - 1)
    everything = covariance.square().sum()
    own = covariance.diagonal().square().sum()
    others = everything - own
    width = x.shape[1]
    return missing.mean(), others / width


SPEC = ObjectiveSpec(
    vicreg,
    section="vicreg",
    heads={"projectors": {}},
    scale=None,
    retrieval_head=projectors_if_any,
)
