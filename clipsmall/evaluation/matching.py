"""Retrieval when answers can be taken once: Sinkhorn-normalised scores and the best assignment,
beside argmax.
"""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clipsmall.evaluation.hits import chunk_rows, hits, scores
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.retrieval import Relevance, retrieval_of
from clipsmall.evaluation.view import DataView

SQUARE = (
    # pairs that are assigned: scipy takes seconds for them, and cubically longer for more
    2000
)


def potentials(
    x: Tensor, y: Tensor, scale: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """(n, D), (m, D) -> f (n,), g (m,) and the largest error of a row sum.

    exp(scale · x_i·y_j + f_i + g_j) has row sums 1 and column sums n/m: Sinkhorn in the log domain
    (Peyré & Cuturi 2019, arXiv 1803.00567, §4.4), without ever holding the n × m matrix.
    """
    g = torch.zeros(len(y), dtype=torch.float64)
    f = -_log_sums(x, y, g, scale)
    error = math.inf
    for _ in range(iterations):
        g = math.log(len(x) / len(y)) - _log_sums(y, x, f, scale)
        row = _log_sums(x, y, g, scale)
        error = ((row + f).exp() - 1).abs().max().item()
        if error <= tolerance:
            break
        f = -row
    return f, g, error


def _log_sums(x: Tensor, y: Tensor, offset: Tensor, scale: float) -> Tensor:
    """(n,) log Σ_j exp(scale · x_i·y_j + offset_j), in blocks of rows."""
    parts = torch.split(x.double() * scale, chunk_rows(len(y)))
    return torch.cat([(part @ y.double().T + offset).logsumexp(dim=1) for part in parts])


def one_to_one(belongs: Relevance, limit: int = SQUARE) -> tuple[Tensor, Tensor]:
    """(p,), (p,) images and texts that belong together, each once, `limit` of them at most, evenly
    chosen.
    """
    images = dict[int, int]()
    texts = set[int]()
    for image, text in zip(belongs.image.tolist(), belongs.text.tolist(), strict=True):
        if image not in images and text not in texts:
            images[image] = text
            texts.add(text)
    chosen = list(images.items())[:: -(-len(images) // limit)]
    return torch.tensor([image for image, _ in chosen]), torch.tensor([text for _, text in chosen])


def assigned(x: Tensor, y: Tensor) -> Tensor:
    """(p, D), (p, D) -> (p,) the column of each row in the one-to-one assignment of the highest sum
    (Hungarian).

    Columns are shuffled first: among equal scores scipy prefers the diagonal, which here is the
    truth.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return order[
        torch.from_numpy(linear_sum_assignment(scores(x, y[order]).numpy(), maximize=True)[1])
    ]


def matching(view: DataView, iterations: int = 50, tolerance: float = 1e-3) -> Result:
    """What knowing that answers are taken once is worth.

    `sinkhorn_*_retrieval_recall@k` over all images and captions: an answer's score is lowered by
    its potential, so hubs that everybody finds stand back. On a one-to-one part (up to 2,000 pairs)
    three ways beside each other: `argmax`, `sinkhorn` (argmax of normalised scores) and `hungarian`
    (the best assignment). Both use the whole set of queries at once, which a search engine does not
    have. The scale is the model's own. Memory is bounded, time that of up to a hundred retrievals.
    """
    images = view.images[view.captioned]
    texts = view.texts
    belongs = view.captions[1]
    scale = view.encoder.model.logit_scale.exp().item()
    f, g, error = potentials(images, texts, scale, iterations, tolerance)
    # a query's own potential moves all its answers alike; so both can be two more coordinates of
    # plain products
    ones = torch.ones(len(images), 1), torch.ones(len(texts), 1)
    lifted_images = torch.cat([images * scale, f[:, None].float(), ones[0]], dim=1)
    lifted_texts = torch.cat([texts, ones[1], g[:, None].float()], dim=1)
    cell = retrieval_of(lifted_images, lifted_texts, belongs, view.data.name, view.uncaptioned)
    cell.task, cell.metrics = (
        "matching",
        {f"sinkhorn_{name}": value for name, value in cell.metrics.items()},
    )
    cell.chance = {f"sinkhorn_{name}": value for name, value in cell.chance.items()}
    mine, own = one_to_one(belongs)
    x = images[mine]
    y = texts[own]
    truth = torch.eye(len(mine), dtype=torch.bool)
    f, g, square_error = potentials(x, y, scale, iterations, tolerance)
    normal = scores(x, y).double() * scale + f[:, None] + g
    for way, values in (("argmax", scores(x, y)), ("sinkhorn", normal)):
        cell.metrics[f"{way}_image_to_text"] = hits(values, truth, (1,)).mean().item()
        cell.metrics[f"{way}_text_to_image"] = hits(values.T, truth, (1,)).mean().item()
    cell.metrics["hungarian"] = (assigned(x, y) == torch.arange(len(mine))).double().mean().item()
    cell.counts |= {"matched": len(mine)}
    cell.details = {
        "iterations": iterations,
        "row_error": error,
        "row_error_of_matched": square_error,
    }
    return cell
