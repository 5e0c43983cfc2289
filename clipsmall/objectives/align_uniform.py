"""Alignment and uniformity: true pairs close, everything spread over the sphere."""

import torch
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import layout, negatives, own_column, scaled


def align_uniform(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    align: float = 1.0,
    uniform: float = 1.0,
    alpha: float = 2.0,
    t: float = 2.0,
    cross: bool = False,
) -> dict[str, Tensor]:
    """Alignment and uniformity (Wang & Isola 2020, arXiv 2005.10242, §4.1) with image and text as
    the two views.

    L = align · mean_i ‖I_i − T_i‖^alpha + uniform · ½ [ U(I) + U(T) ],  U(X) = log mean_{i≠j}
    exp(−t ‖X_i − X_j‖²).

    Uniformity is one logarithm over all pairs of the batch, where softmax has one a row: little
    bias from small batches, 16 and up. Within the modalities nothing pushes an image from another's
    text: `align` alone has to close the gap between the modalities, and its weight against
    `uniform` is what there is to tune.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch.
        mask_duplicates: pairs with the same caption are not pushed apart.
        cross: one U over images against texts, log mean_{i≠j} exp(−t ‖I_i − T_j‖²), instead of the
            two within.

    Returns `loss` (the same on all ranks but for alignment, the mean over my rows), its parts
    `alignment` and `uniformity`, `effective_negatives`.

    Raises:
        ValueError: cross with align < t · uniform: the optimum is then that all images sit opposite
            all texts.
    """
    if cross and align < t * uniform:
        raise ValueError(
            f"align_uniform: cross=true with align={align} < t · uniform = {t * uniform} drives images and texts to "
            "opposite poles; raise align"
        )
    place = layout(rows, columns, mask_duplicates)
    counts = negatives(place).to(similarity.wide(rows.image))
    own = own_column(rows.text, columns.text, place)
    apart = (rows.image.to(counts.dtype) - own.to(counts.dtype)).square().sum(dim=1)
    # the power's slope at 0 is infinite below alpha 2, and NaN from autograd's 0 · inf
    alignment = (
        apart if alpha == 2 else apart.clamp(min=torch.finfo(apart.dtype).tiny) ** (alpha / 2)
    ).mean()
    ways = [(rows.image, columns.image), (rows.text, columns.text)]
    if cross:
        ways = [(rows.image, columns.text)]
    pairs = world.sum_over_ranks(counts.sum())
    spread = alignment.new_zeros(())
    for x, y in ways:
        spread = spread + log_mean_kernel(x, y, place, t, pairs) / len(ways)
    return {
        "loss": align * alignment + uniform * spread,
        "alignment": alignment.detach(),
        "uniformity": spread.detach(),
        "effective_negatives": counts.mean(),
    }


def log_mean_kernel(x: Tensor, y: Tensor, place: Layout, t: float, pairs: Tensor) -> Tensor:
    """() log of the mean of exp(−t ‖x_i − y_j‖²) over all ranks' `pairs` that count; 0 if there are
    none.
    """
    if pairs == 0:
        return (x.sum() + y.sum()) * 0.0
    sums = similarity.logsumexp(scaled(x, x.new_tensor(2 * t)), y, place, columns=False).rows
    # ‖x − y‖² = 2 − 2 cos
    return world.gather(sums).logsumexp(dim=0) - pairs.log() - 2 * t
