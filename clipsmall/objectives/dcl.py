"""Decoupled contrastive learning: softmax without the positive in its own denominator."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import world
from clipsmall.objectives.pairs import (
    add_log_sums,
    directions,
    layout_of,
    negative_counts,
    within_modalities,
)
from clipsmall.objectives.spec import ObjectiveSpec

# the same option of dcl and of dclw
IntraModal = Annotated[bool, Field(description="images are negatives of images, too")]


def dcl(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    intra_modal: IntraModal = False,
) -> dict[str, Tensor]:
    """Decoupled contrastive loss between the modalities.

    Also known as:
        DCL, decoupled InfoNCE; CLOOB's InfoLOOB (arXiv 2110.11316) is the same times the
        temperature.

    Formula:
        L = ½ mean_i [ log Σ_{j≠i} e^{S_ij} − S_ii ] + the same over columns,
        S = logit_scale · cosines.

    Source:
        Yeh et al. 2022, arXiv 2110.06848, eq. 4 and 5.

    When to use:
        Batches of 16 to 512. A softmax that is nearly sure of a pair stops learning from it, at
        small batches soonest; without the positive in the denominator it goes on.

    When not:
        The loss has no lower bound: at tiny batches a learnable scale runs to its limit of 100.

    Related:
        `softmax` with the positive in the denominator; `dclw` weights the positives.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out.
        intra_modal: the other images are negatives of an image, too, and texts of a text, as in the
            paper's own setting of two views of an image.

    Returns:
        `loss` () mean over my rows; `accuracy` (); `effective_negatives` ().

    Raises:
        ValueError: a batch of one pair, which has no negative.

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> round(dcl(pairs, pairs)["loss"].item(), 4)  # log 3 − 2
        -0.9014
    """
    return decoupled(rows, columns, mask_duplicates, intra_modal, sigma=None)


def decoupled(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool,
    intra_modal: bool,
    sigma: float | None,
) -> dict[str, Tensor]:
    """DCL, its positives weighted at temperature `sigma`; None = not weighted."""
    if len(columns.index) < 2:
        raise ValueError("dcl compares pairs with one another: it needs a batch of at least 2")
    layout = layout_of(rows, columns, mask_duplicates)
    image, text = directions(rows, columns, layout)
    accuracy = (image.accuracy + text.accuracy) / 2

    # log sums over the negatives
    of_images = image.others
    of_texts = text.others
    if intra_modal:
        among_images, among_texts = within_modalities(rows, columns, layout)
        of_images = add_log_sums(of_images, among_images)
        of_texts = add_log_sums(of_texts, among_texts)

    loss = image.own.new_zeros(())
    for own, others in ((image.own, of_images), (text.own, of_texts)):
        weight: Tensor | float = 1.0
        if sigma is not None:
            cosines = own / rows.logit_scale
            weight = positive_weights(cosines, sigma)

        # every column has the row's caption: there is nothing to learn from
        no_negative = others == -torch.inf
        costs = others - weight * own
        costs = costs.masked_fill(no_negative, 0.0)
        loss = loss + costs.mean() / 2

    negatives = negative_counts(layout).float()
    return {
        "loss": loss,
        "accuracy": accuracy,
        "effective_negatives": negatives.mean() * (1 + intra_modal),
    }


def positive_weights(cosines: Tensor, sigma: float) -> Tensor:
    """(b,) 2 − N · softmax(cosines / sigma) over all ranks' true pairs; mean 1, no gradient.

    Below 0 for a pair that stands out so far that N · softmax exceeds 2, as in the paper.
    """
    mine = cosines.detach() / sigma
    everyone = world.gather(mine)

    # of my pairs, their softmax over all ranks' pairs
    log_sum = everyone.logsumexp(dim=0)
    fraction = (mine - log_sum).exp()
    count = len(everyone)
    return 2 - count * fraction


SPEC = ObjectiveSpec(dcl, section="dcl", queue=True)
