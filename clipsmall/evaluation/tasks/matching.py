"""Retrieval with one-to-one constraints: Sinkhorn scores, Hungarian assignment, and argmax."""

import math

import torch
from torch import Tensor

from clipsmall.evaluation.recall import both_recalls, one_to_one
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task
from clipsmall.evaluation.top_k import chunk_rows, in_top_k, scores
from clipsmall.evaluation.view import DataView

NAME = "matching"
# Pairs of the one-to-one subset: scipy assigns these in seconds; its time grows cubically.
SQUARE = 2000


def dual_potentials(
    x: Tensor, y: Tensor, scale: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """(n, D), (m, D) -> potentials f (n,) and g (m,), and the largest error of a row sum.

    exp(scale · x_i·y_j + f_i + g_j) then has row sums 1 and column sums n/m. Sinkhorn's algorithm
    in the log domain (Peyré & Cuturi 2019, arXiv 1803.00567, §4.4); the n × m matrix is never
    stored.
    """
    g = torch.zeros(len(y), dtype=torch.float64)
    f = -_log_sums(x, y, g, scale)
    log_column_sum = math.log(len(x) / len(y))
    error = math.inf
    for _ in range(iterations):
        # normalise the columns, then see how far the row sums are from 1
        g = log_column_sum - _log_sums(y, x, f, scale)
        row = _log_sums(x, y, g, scale)
        row_sums = (row + f).exp()
        error = (row_sums - 1).abs().max().item()
        if error <= tolerance:
            break
        f = -row
    return f, g, error


def _log_sums(x: Tensor, y: Tensor, offset: Tensor, scale: float) -> Tensor:
    """(n,) log Σ_j exp(scale · x_i·y_j + offset_j), in blocks of rows."""
    scaled = x.double() * scale
    columns = y.double()
    sums = []
    for part in torch.split(scaled, chunk_rows(len(y))):
        # (rows, m)
        logits = part @ columns.T + offset
        sums.append(logits.logsumexp(dim=1))
    return torch.cat(sums)


def assigned(x: Tensor, y: Tensor) -> Tensor:
    """(p, D), (p, D) -> (p,) the column of each row in the best one-to-one assignment (Hungarian).

    Columns are shuffled first: among equal scores scipy prefers the diagonal, which here would be
    the right answer.
    """
    from scipy.optimize import linear_sum_assignment

    # the same order every time
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)
    # (p, p)
    shuffled = scores(x, y[order]).numpy()
    _, columns = linear_sum_assignment(shuffled, maximize=True)
    assigned_columns = torch.from_numpy(columns)
    return order[assigned_columns]


def matching(view: DataView, iterations: int = 50, tolerance: float = 1e-3) -> Result:
    """How much retrieval gains from knowing that each answer is used once.

    `sinkhorn_*_retrieval_recall@k`, over all images and captions: each answer's score is corrected
    by its Sinkhorn potential, which lowers hubs (answers near to many queries). A one-to-one subset
    of up to 2,000 pairs compares `argmax`, `sinkhorn` (argmax of the corrected scores) and
    `hungarian` (the best assignment). Sinkhorn and Hungarian need all queries at once, which a
    search engine does not have. The scale is the model's logit scale. Memory is bounded; time is
    that of up to a hundred retrievals.
    """
    images = view.images[view.captioned]
    texts = view.texts
    belongs = view.captions[1]
    scale = view.encoder.model.logit_scale.exp().item()

    f, g, error = dual_potentials(images, texts, scale, iterations, tolerance)
    result = _normalised_recalls(view, images, texts, scale, f, g)

    # the one-to-one subset: p pairs, the k-th image with the k-th text
    mine, own = one_to_one(belongs, SQUARE)
    x = images[mine]
    y = texts[own]
    f, g, square_error = dual_potentials(x, y, scale, iterations, tolerance)

    # (p, p) scores, without and with the potentials
    plain = scores(x, y)
    normalised = plain.double() * scale + f[:, None] + g
    truth = torch.eye(len(mine), dtype=torch.bool)
    for way, values in (("argmax", plain), ("sinkhorn", normalised)):
        of_images = in_top_k(values, truth, (1,))
        of_texts = in_top_k(values.T, truth, (1,))
        result.metrics[f"{way}_image_to_text"] = of_images.mean().item()
        result.metrics[f"{way}_text_to_image"] = of_texts.mean().item()

    columns = assigned(x, y)
    right = columns == torch.arange(len(mine))
    result.metrics["hungarian"] = right.double().mean().item()

    result.counts["matched"] = len(mine)
    result.details = {
        "iterations": iterations,
        "row_error": error,
        "row_error_of_matched": square_error,
    }
    return result


def _normalised_recalls(
    view: DataView, images: Tensor, texts: Tensor, scale: float, f: Tensor, g: Tensor
) -> Result:
    """Recall@k of scale · x·y + f + g over all images and captions."""
    # Both potentials become two more coordinates: (x · scale, f, 1) · (y, 1, g). The query's own
    # potential shifts all its answers alike and changes no ranking.
    image_ones = torch.ones(len(images), 1)
    text_ones = torch.ones(len(texts), 1)
    f_column = f[:, None].float()
    g_column = g[:, None].float()

    # (n, D + 2) and (m, D + 2)
    lifted_images = torch.cat([images * scale, f_column, image_ones], dim=1)
    lifted_texts = torch.cat([texts, text_ones, g_column], dim=1)

    belongs = view.captions[1]
    result = both_recalls(
        lifted_images,
        lifted_texts,
        belongs,
        view.data.name,
        NAME,
        view.uncaptioned,
    )

    # the names without a prefix belong to plain retrieval
    result.metrics = {f"sinkhorn_{name}": value for name, value in result.metrics.items()}
    result.chance = {f"sinkhorn_{name}": value for name, value in result.chance.items()}
    return result


_RECALLS = tuple(
    f"sinkhorn_{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)
)
_MATCHED = (
    "argmax_image_to_text",
    "argmax_text_to_image",
    "sinkhorn_image_to_text",
    "sinkhorn_text_to_image",
    "hungarian",
)
TASK = Task(NAME, matching, matches="captions", metrics=(*_RECALLS, *_MATCHED))
