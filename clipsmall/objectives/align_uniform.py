"""Alignment and uniformity: true pairs close, everything spread over the sphere."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.pairs import layout_of, negative_counts, own_features, scaled
from clipsmall.objectives.spec import ObjectiveSpec, Options


def align_uniform(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    align: Annotated[float, Field(gt=0, description="weight of the alignment")] = 1.0,
    uniform: Annotated[float, Field(ge=0, description="weight of the uniformity")] = 1.0,
    alpha: Annotated[
        float, Field(gt=0, description="power of the distance between a pair's embeddings")
    ] = 2.0,
    t: Annotated[float, Field(gt=0, description="sharpness of the uniformity's kernel")] = 2.0,
    cross: Annotated[
        bool,
        Field(description="uniformity of images against texts; needs align >= t * uniform"),
    ] = False,
) -> dict[str, Tensor]:
    """Alignment of true pairs and uniformity of each modality.

    Also known as:
        Alignment and uniformity loss, hypersphere loss, Align-Uniform; the uniformity is a
        Gaussian-potential (RBF) energy.

    Formula:
        L = align · mean_i ‖I_i − T_i‖^alpha + uniform · ½ [ U(I) + U(T) ],
        U(X) = log mean_{i≠j} exp(−t ‖X_i − X_j‖²).

    Source:
        Wang & Isola 2020, arXiv 2005.10242, §4.1, with image and text as the two views.

    When to use:
        Batches of 16 and up. Uniformity is one logarithm over all pairs of the batch, where softmax
        has one per row: little bias from small batches.

    When not:
        Where nothing can be tuned: within the modalities nothing pushes an image from another's
        text, `align` alone has to close the gap between them, and its weight against `uniform`
        decides.

    Related:
        `spectral` spreads by squares of cosines; `softmax` is the same two forces in one logarithm
        per row.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch.
        mask_duplicates: pairs with the same caption are not pushed apart.
        align: weight of the first term.
        uniform: weight of the second term.
        alpha: power of the distance.
        t: of the kernel.
        cross: one U over images against texts, log mean_{i≠j} exp(−t ‖I_i − T_j‖²), in place of the
            two within the modalities.

    Returns:
        `loss` () the same on all ranks but for the alignment, the mean over my rows; its parts
        `alignment` and `uniformity` (); `effective_negatives` ().

    Raises:
        ValueError: cross with align < t · uniform: in the optimum all images sit opposite all
            texts.

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4))
        >>> align_uniform(pairs, pairs)["loss"].item()  # −t ‖X_i − X_j‖² = −2 · 2
        -4.0
    """
    problem = opposite_poles(
        {"cross": cross, "align": align, "t": t, "uniform": uniform},
    )
    if problem:
        raise ValueError(f"align_uniform: {problem}")

    layout = layout_of(rows, columns, mask_duplicates)
    dtype = similarity.wide(rows.image)
    counts = negative_counts(layout).to(dtype)

    # (b,) squared distances of the pairs, to the power alpha/2
    own = own_features(rows.text, columns.text, layout)
    difference = rows.image.to(dtype) - own.to(dtype)
    distance = difference.square().sum(dim=1)
    if alpha != 2:
        # the power's slope at 0 is infinite below alpha 2, and autograd's 0 · inf is NaN
        distance = distance.clamp(min=torch.finfo(distance.dtype).tiny) ** (alpha / 2)
    alignment = distance.mean()

    # the mean over both modalities, or between them
    if cross:
        compared = [(rows.image, columns.text)]
    else:
        compared = [(rows.image, columns.image), (rows.text, columns.text)]
    pairs = world.sum_over_ranks(counts.sum())
    uniformity = alignment.new_zeros(())
    for x, y in compared:
        uniformity = uniformity + log_mean_kernel(x, y, layout, t, pairs) / len(compared)
    return {
        "loss": align * alignment + uniform * uniformity,
        "alignment": alignment.detach(),
        "uniformity": uniformity.detach(),
        "effective_negatives": counts.mean(),
    }


def log_mean_kernel(x: Tensor, y: Tensor, layout: Layout, t: float, pairs: Tensor) -> Tensor:
    """() log of the mean of exp(−t ‖x_i − y_j‖²) over all ranks' pairs that count.

    Args:
        x: (b, D) my rows.
        y: (N, D) the columns.
        layout: which of their pairs count.
        t: of the kernel.
        pairs: () how many count on all ranks; with none the result is 0.
    """
    if pairs == 0:
        # still a function of both: DDP refuses what gets no gradient
        return (x.sum() + y.sum()) * 0.0

    # −t ‖x − y‖² = 2t cos − 2t
    x = scaled(x, x.new_tensor(2 * t))
    sums = similarity.logsumexp(x, y, layout, columns=False)

    # one log sum over all ranks' rows
    everyone = world.gather(sums.rows)
    log_sum = everyone.logsumexp(dim=0)
    return log_sum - pairs.log() - 2 * t


def opposite_poles(options: Options) -> str:
    """Whether these options drive the modalities apart, and what to do; "" if not."""
    repulsion = options["t"] * options["uniform"]
    if not options["cross"] or options["align"] >= repulsion:
        return ""
    return (
        f"cross=true with align={options['align']:g} < t * uniform = {repulsion:g} drives images "
        "and texts to opposite poles; raise align"
    )


SPEC = ObjectiveSpec(
    align_uniform, section="align_uniform", scale=None, contradiction=opposite_poles
)
