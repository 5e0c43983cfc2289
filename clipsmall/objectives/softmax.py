"""Softmax: each row picks its own pair among all columns."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives.pairs import (
    add_log_sums,
    directions,
    layout_of,
    negative_counts,
    within_modalities,
)
from clipsmall.objectives.soft_targets import SoftTargets
from clipsmall.objectives.spec import ObjectiveSpec


def softmax(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    intra_modal: Annotated[
        bool, Field(description="images are negatives of images, too: SimCLR's NT-Xent")
    ] = False,
) -> dict[str, Tensor]:
    """CLIP's symmetric cross entropy over the similarities of a batch.

    Also known as:
        CLIP loss, InfoNCE, ITC (image-text contrastive), in-batch negatives, N-pairs loss, multiple
        negatives ranking loss; with `intra_modal` NT-Xent, the SimCLR loss.

    Formula:
        L = ½ mean_i [ LSE_j S_ij − S_ii ] + ½ mean_j [ LSE_i S_ij − S_jj ],
        S = logit_scale · cosines.

    Source:
        Radford et al. 2021, arXiv 2103.00020, fig. 3; `intra_modal`: Chen et al. 2020, arXiv
        2002.05709, eq. 1, with image and text as the two views.

    When to use:
        The baseline, and the best-understood choice for batches of 512 pairs and more, or with a
        queue. The only objective that takes a moco queue's soft targets.

    When not:
        Its negatives are the batch: below about 256 pairs `dcl`, `sigmoid` and `gcl` do better.

    Related:
        `dcl` leaves the positive out of the denominator; `sinkhorn` couples both directions; `gcl`
        replaces the sum over the batch by a running mean over all steps.

    Args:
        rows: my b pairs; `image`, `text` (b, D).
        columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out; False = plain CLIP.
        intra_modal: the other images are negatives of an image, too, and other texts of a text.

    Returns:
        `loss` () mean over my rows; `accuracy` () fraction of rows whose own pair scores highest
        among the other modality, mean of both directions; `effective_negatives` () columns that a
        row is compared with.

    Examples:
        >>> import torch
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> terms = softmax(pairs, pairs)
        >>> round(terms["loss"].item(), 4), terms["effective_negatives"].item()
        (0.3408, 3.0)
    """
    layout = layout_of(rows, columns, mask_duplicates)
    image, text = directions(rows, columns, layout)
    # among the other modality only
    accuracy = (image.accuracy + text.accuracy) / 2

    # the own modality's log sums join the denominators
    if intra_modal:
        among_images, among_texts = within_modalities(rows, columns, layout)
        image_sums = add_log_sums(image.others, among_images)
        text_sums = add_log_sums(text.others, among_texts)
        image = image._replace(others=image_sums)
        text = text._replace(others=text_sums)

    both_ways = image.cross_entropy.mean() + text.cross_entropy.mean()
    negatives = negative_counts(layout).float()
    return {
        "loss": both_ways / 2,
        "accuracy": accuracy,
        "effective_negatives": negatives.mean() * (1 + intra_modal),
    }


SPEC = ObjectiveSpec(
    softmax,
    section="softmax",
    queue=True,
    soft_targets=lambda options: None if options["intra_modal"] else SoftTargets,
)
