"""Barlow Twins: what image and text say in one coordinate agrees, and different coordinates say
different things.
"""

import torch
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import world
from clipsmall.distributed.batch_norm import moments


def barlow(rows: Embeddings, columns: Embeddings, redundancy: float = 5e-3) -> dict[str, Tensor]:
    """Barlow Twins between the modalities (Zbontar et al. 2021, arXiv 2103.03230, eq. 1 and 2).

    L = Σ_d (1 − c_dd)² + redundancy · Σ_{d≠e} c_de²,  c = X̂ᵀ Ŷ / N,  with X̂ and Ŷ standardised in
    each coordinate over the global batch (eps 1e-5).

    No pair is compared with another: memory is D², whatever the batch, and the paper finds little
    lost down to 256. Chance alone makes the second sum D(D−1)/N: with a batch below D choose
    `redundancy` near 1/D, or it drowns the first. The paper's 5e-3 is for D = 8,192 and a batch of
    2,048. The loss does not see means, cosines do: synthetic pairs (D = 32, batch 64, redundancy
    1/D) were found at 79 %, and at 97 % once the features were centred.

    Args:
        rows: my b pairs, with `image_projected`, `text_projected` (b, D) of the head `projectors`,
            not normalised.
        columns: not looked at.

    Returns `loss` (the same on all ranks) and its parts `invariance` and `redundancy` (weighted).

    Raises:
        ValueError: a batch of one pair, which has no variance.
    """
    image, text = (_standard(rows.extra[name]) for name in ("image_projected", "text_projected"))
    with torch.autocast(image.device.type, enabled=False):
        correlation = world.differentiable_sum(image.T @ text) / (len(image) * world.size())
    own = correlation.diagonal()
    invariance = (1 - own).square().sum()
    others = redundancy * (correlation.square().sum() - own.square().sum())
    return {
        "loss": invariance + others,
        "invariance": invariance.detach(),
        "redundancy": others.detach(),
    }


def _standard(x: Tensor) -> Tensor:
    if len(x) * world.size() < 2:
        raise ValueError("barlow standardises over pairs: it needs a batch of at least 2")
    _, centred, variance = moments(x)
    return centred * (variance + 1e-5).rsqrt()
