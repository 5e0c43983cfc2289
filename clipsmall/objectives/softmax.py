"""Softmax: each row picks its own pair among all columns."""

from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.objectives.pairs import both, directions, layout, negatives, within


def softmax(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True, intra_modal: bool = False
) -> dict[str, Tensor]:
    """CLIP's symmetric cross entropy (Radford et al. 2021, arXiv 2103.00020, fig. 3).

    L = ½ mean_i [ LSE_j S_ij − S_ii ] + ½ mean_j [ LSE_i S_ij − S_jj ],  S = logit_scale · cosines.

    The baseline. Its negatives are the batch: below about 256 pairs `dcl`, `sigmoid`, `gcl` or a
    queue do better.

    Args:
        rows: my b pairs. columns: the N pairs of the global batch, or more (a queue).
        mask_duplicates: leave columns with the row's own caption out of its softmax; False = plain
            CLIP.
        intra_modal: the other images are negatives of an image, too, and the other texts of a text:
            SimCLR's NT-Xent on image and text as the two views (Chen et al. 2020, arXiv 2002.05709,
            eq. 1).

    Returns `loss` (mean over my rows), `accuracy` (share of rows whose own pair scores highest
    among the other modality, both ways) and `effective_negatives` (columns a row is compared with,
    less duplicates).
    """
    place = layout(rows, columns, mask_duplicates)
    image, text = directions(rows, columns, place)
    accuracy = (image.accuracy + text.accuracy) / 2
    if intra_modal:
        among_images, among_texts = within(rows, columns, place)
        image = image._replace(others=both(image.others, among_images))
        text = text._replace(others=both(text.others, among_texts))
    return {
        "loss": (image.surprise.mean() + text.surprise.mean()) / 2,
        "accuracy": accuracy,
        "effective_negatives": negatives(place).float().mean() * (1 + intra_modal),
    }
