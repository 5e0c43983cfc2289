"""What features are worth to a classifier that learns from labelled images: a linear probe, and
nearest neighbours.
"""

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor

from clipsmall.evaluation.classification import class_chance, class_hits, summary
from clipsmall.evaluation.hits import chunk_rows, scores
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.view import DataView

# of C: eight a decade, as CLIP swept
STRENGTHS = np.logspace(-6, 6, 97)


def votes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """(N, D), (N,), (n, D) -> (n, C) votes of the k nearest by cosine, each worth exp(cosine /
    temperature).

    Wu et al. 2018, arXiv 1805.01978, §3.4, whose temperature is the default; 0 = every vote counts
    1 (majority).

    Raises:
        ValueError: k is not between 1 and N.
    """
    _check_k(k, len(train))
    # once, not in every chunk
    parts = []
    train = train.double()
    for part in torch.split(test, chunk_rows(len(train))):
        near = scores(part, train).double().topk(k, dim=1)
        # votes are relative: of a small temperature all would be 0
        best = near.values[:, :1]
        worth = (
            ((near.values - best) / temperature).exp()
            if temperature
            else torch.ones_like(near.values)
        )
        parts.append(
            torch.zeros(len(part), classes, dtype=torch.float64).scatter_add_(
                1, labels[near.indices], worth
            )
        )
    return torch.cat(parts)


def _check_k(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(
            f"k={k}: there are {count} images to learn from; choose k from 1 to {count}"
        )


def knn(view: DataView, k: int = 20, temperature: float = 0.07) -> Result:
    """Classify images by their `k` nearest among the train images; see `votes`.

    Raises:
        ValueError: k larger than the train set, or classes without a train image.
    """
    # before anything is encoded
    _check_k(k, len(view.data.training))
    train, labels, _, classes = view.training
    found = votes(train, labels, view.images, classes, k, temperature)
    return _cell(view, "knn", found, {"k": k})


def fit(features: Tensor, labels: Tensor, seed: int = 0) -> tuple[Any, float]:
    """(N, D), (N,) -> scikit-learn's logistic regression and the C it was fitted with.

    As CLIP's linear probe (arXiv 2103.00020, §A.3): L-BFGS, at most 1,000 iterations, C from 1e-6
    to 1e6 by a search
    on log scale: seven of them, then half the way around the best, down to eight a decade. It is
    judged by a fifth of the images (chosen by `seed`, of all classes alike where they are big
    enough), then fitted to all.

    Raises:
        ValueError: a single class.
    """
    x = features.double().numpy()
    y = labels.numpy()
    sizes = np.bincount(y)
    sizes = sizes[sizes > 0]
    if len(sizes) < 2:
        raise ValueError(
            f"a linear probe needs two classes at least; all {len(y)} train images are of one"
        )
    held = -(-len(y) // 5)
    alike = y if sizes.min() > 1 and min(held, len(y) - held) >= len(sizes) else None
    x_fit, x_held, y_fit, y_held = train_test_split(
        x, y, test_size=held, random_state=seed, stratify=alike
    )
    if len(set(y_fit.tolist())) < 2:
        return _fitted(x, y, 1.0), 1.0
    known = dict[int, float]()

    def judged(place: int) -> float:
        if place not in known:
            known[place] = float(_fitted(x_fit, y_fit, STRENGTHS[place]).score(x_held, y_held))
        return known[place]

    # of equals the first: the simplest
    best = max(range(0, 97, 16), key=judged)
    for step in (8, 4, 2, 1):
        best = max(
            (p for p in (best - step, best, best + step) if 0 <= p < 97),
            key=lambda p: (judged(p), -p),
        )
    return _fitted(x, y, STRENGTHS[best]), float(STRENGTHS[best])


def _fitted(x: Any, y: Any, strength: float) -> Any:
    with warnings.catch_warnings():
        # 1,000 iterations are the protocol
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=1000).fit(x, y)


def linear_probe(view: DataView) -> Result:
    """Classify images by a logistic regression on the train images' unit features; see `fit`."""
    train, labels, _, _ = view.training
    if "probe" not in view.learned:
        view.learned["probe"] = fit(train, labels)
    model, strength = view.learned["probe"]
    cell = _cell(
        view,
        "linear_probe",
        torch.from_numpy(model.predict_log_proba(view.images.double().numpy())),
        {},
    )
    cell.details["C"] = strength
    return cell


def _cell(view: DataView, task: str, told: Tensor, counts: dict[str, int]) -> Result:
    train, _, truth, classes = view.training
    size = chunk_rows(classes)
    parts = zip(torch.split(told, size), torch.split(truth, size), strict=True)
    return Result(
        view.data.name,
        task,
        summary(torch.cat([class_hits(*part) for part in parts]), truth, classes),
        class_chance(classes),
        {
            "images": len(truth),
            "train": len(train),
            "classes": classes,
            "skipped": view.skipped,
            **counts,
        },
    )
