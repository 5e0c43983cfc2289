"""VICReg: embeddings of a pair are near, every coordinate varies, and no two vary together."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.batch_norm import moments


def vicreg(
    rows: Embeddings,
    columns: Embeddings,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> dict[str, Tensor]:
    """VICReg between the modalities (Bardes et al. 2021, arXiv 2105.04906, eq. 1 to 6).

    L = invariance · mean (x − y)² + variance · ½ [v(X) + v(Y)] + covariance · [c(X) + c(Y)],
    v(X) = mean_d relu(1 − √(Var_d + 1e-4)),  c(X) = Σ_{d≠e} Cov_de² / D,  Var and Cov over the
    global batch, by N − 1.

    The ½ is the official code's; the paper's eq. 6 has v(X) + v(Y), as has solo-learn: `variance`
    50 is that. Memory is D², whatever the batch; the paper loses 1 of 68 points at 128. Features
    must not be normalised: unit vectors have a standard deviation of 1/√D a coordinate at most, and
    v pulls at 1 for ever. The two branches share nothing, so modalities as different as image and
    text suit it; it is the only term here that asks each of them alone to spread.

    Args:
        rows: my b pairs, with `image_projected`, `text_projected` (b, D) of the head `projectors`,
            not normalised.
        columns: not looked at.
        invariance, variance, covariance: the terms' weights (the paper's λ, μ and ν).

    Returns `loss` (its first term the mean over my rows, the others the same on all ranks) and the
    three weighted terms by their names.

    Raises:
        ValueError: a batch of one pair, which has no variance.
    """
    image, text = (
        x.to(similarity.wide(x))
        for x in (rows.extra["image_projected"], rows.extra["text_projected"])
    )
    spread, overlap = zip(*(_spread_and_overlap(x) for x in (image, text)), strict=True)
    terms = {
        "invariance": invariance * F.mse_loss(image, text),
        "variance": variance * (spread[0] + spread[1]) / 2,
        "covariance": covariance * (overlap[0] + overlap[1]),
    }
    loss = terms["invariance"] + terms["variance"] + terms["covariance"]
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


def _spread_and_overlap(x: Tensor) -> tuple[Tensor, Tensor]:
    """v and c of one modality."""
    count = len(x) * world.size()
    if count < 2:
        raise ValueError("vicreg measures how pairs vary: it needs a batch of at least 2")
    _, centred, variance = moments(x)
    deviation = (variance * (count / (count - 1)) + 1e-4).sqrt()
    with torch.autocast(x.device.type, enabled=False):
        covariance = world.differentiable_sum(centred.T @ centred) / (count - 1)
    others = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviation).mean(), others / x.shape[1]
