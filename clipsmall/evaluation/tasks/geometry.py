"""Geometry of the embeddings: modality gap, alignment, uniformity, effective rank."""

import math

import torch
from torch import Tensor

from clipsmall.evaluation.recall import Relevance
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task
from clipsmall.evaluation.top_k import chunk_rows
from clipsmall.evaluation.view import DataView

NAME = "geometry"


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """(n, D), (m, D) -> ‖mean image − mean text‖ (Liang et al. 2022, arXiv 2203.02053, §2)."""
    mean_image = images.double().mean(dim=0)
    mean_text = texts.double().mean(dim=0)
    return float((mean_image - mean_text).norm())


def alignment(images: Tensor, texts: Tensor) -> float:
    """(p, D), (p, D) embeddings of pairs -> E ‖x − y‖²; 0 is best.

    Wang & Isola 2020, arXiv 2005.10242, §4.1, with α = 2.
    """
    difference = images.double() - texts.double()
    # (p,)
    squared_distances = difference.square().sum(dim=1)
    return squared_distances.mean().item()


def uniformity(rows: Tensor, t: float = 2.0) -> float:
    """(n, D) unit rows -> log E exp(−t ‖x − y‖²) over all pairs x ≠ y; lower is more even.

    Wang & Isola 2020, arXiv 2005.10242, §4.1.
    """
    x = rows.double()
    if len(x) < 2:
        return 0.0
    total = 0.0
    for part in torch.split(x, chunk_rows(len(x))):
        # −t ‖x − y‖², as ‖x − y‖² = 2 − 2 x·y for unit rows
        exponents = 2 * t * (part @ x.T - 1)
        total += exponents.exp().sum().item()

    # the terms of each row with itself, which are to be subtracted
    squared_lengths = x.square().sum(dim=1)
    own_exponents = 2 * t * (squared_lengths - 1)
    with_itself = own_exponents.exp().sum().item()

    # keep log finite if rounding leaves nothing
    of_pairs = max(total - with_itself, 1e-300)
    pairs = len(x) * (len(x) - 1)
    return math.log(of_pairs / pairs)


def effective_rank(rows: Tensor) -> float:
    """(n, D) -> exp of the entropy of the normalised singular values: 1 to min(n, D).

    Roy & Vetterli 2007, eq. 3 and 4.
    """
    values = torch.linalg.svdvals(rows.double())
    # 0 log 0 counts as 0
    positive = values[values > 0]
    fractions = positive / values.sum()
    surprise = fractions * fractions.log()
    entropy = -surprise.sum()
    return float(entropy.exp())


def mean_cosines(images: Tensor, texts: Tensor, belongs: Relevance) -> tuple[float, float]:
    """The mean cosine of matching pairs, and of all other pairs (NaN if there are none)."""
    x = images.double()
    y = texts.double()
    pairs = len(belongs.image)
    products = x[belongs.image] * y[belongs.text]
    own = products.sum().item()
    mean_of_pairs = own / pairs

    others = len(x) * len(y) - pairs
    if not others:
        return mean_of_pairs, math.nan

    # the sum of all n · m cosines, without making them
    image_sum = x.sum(dim=0)
    text_sum = y.sum(dim=0)
    everything = (image_sum @ text_sum).item()
    return mean_of_pairs, (everything - own) / others


def geometry(view: DataView) -> Result:
    """All measures of this file, over captioned images and the distinct captions of a data set."""
    images = view.images[view.captioned]
    texts = view.texts
    belongs = view.captions[1]
    pairs, others = mean_cosines(images, texts, belongs)
    metrics = {
        "modality_gap": modality_gap(images, texts),
        "alignment": alignment(images[belongs.image], texts[belongs.text]),
        "image_uniformity": uniformity(images),
        "text_uniformity": uniformity(texts),
        "image_effective_rank": effective_rank(images),
        "text_effective_rank": effective_rank(texts),
        "mean_cosine_of_pairs": pairs,
    }
    # with a single pair there are no others
    if not math.isnan(others):
        metrics["mean_cosine_of_others"] = others
    return Result(
        view.data.name,
        NAME,
        metrics,
        counts={"images": len(images), "captions": len(texts), "width": images.shape[1]},
        fractions=False,
    )


TASK = Task(
    NAME,
    geometry,
    matches="captions",
    metrics=(
        "modality_gap",
        "alignment",
        "image_uniformity",
        "text_uniformity",
        "image_effective_rank",
        "text_effective_rank",
        "mean_cosine_of_pairs",
        "mean_cosine_of_others",
    ),
)
