"""Calibration: is a model right as often as it says? ECE of its softmax and sigmoid probabilities,
and a diagram.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipsmall.evaluation.hits import chunk_rows, scores
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.view import DataView

BINS = 15
# images: all pairs of more of them would be another 100 MiB for every thousand
PAIRS_OF = 2000
# of those that are not empty: confidence, accuracy, count
Bins = list[dict[str, float]]


def equal_width(confidence: NDArray[Any], right: NDArray[Any], bins: int = BINS) -> Bins:
    """(n,) probabilities and (n,) whether they came true, in bins (0, 1/15], (1/15, 2/15], ..."""
    return _binned(confidence, right, np.ceil(confidence * bins).clip(1, bins).astype(np.int64) - 1)


def equal_mass(confidence: NDArray[Any], right: NDArray[Any], bins: int = BINS) -> Bins:
    """The same in bins of equally many, from the least sure to the surest (Nixon et al. 2019, arXiv
    1904.01685).
    """
    place = np.empty(len(confidence), dtype=np.int64)
    place[np.argsort(confidence, kind="stable")] = (
        np.arange(len(confidence)) * bins // len(confidence)
    )
    return _binned(confidence, right, place)


def _binned(confidence: NDArray[Any], right: NDArray[Any], place: NDArray[Any]) -> Bins:
    counts = np.bincount(place)
    told = np.bincount(place, confidence)
    true = np.bincount(place, right)
    return [
        {
            "confidence": told[b] / counts[b],
            "accuracy": true[b] / counts[b],
            "count": int(counts[b]),
        }
        for b in np.flatnonzero(counts)
    ]


def ece(bins: Bins) -> float:
    """Σ_b n_b/n |accuracy_b − confidence_b| (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    total = sum(b["count"] for b in bins)
    return sum(b["count"] / total * abs(b["accuracy"] - b["confidence"]) for b in bins)


def surest(images: Tensor, answers: Tensor, scale: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """(n, D), (C, D) -> each image's highest softmax probability of scale · cosine, and whose it
    is.
    """
    parts = []
    for part in torch.split(images, chunk_rows(len(answers))):
        parts.append((scores(part, answers).double() * scale).softmax(dim=1).max(dim=1))
    return torch.cat([p.values for p in parts]).numpy(), torch.cat(
        [p.indices for p in parts]
    ).numpy()


def calibration(view: DataView) -> Result:
    """Of the softmax over classes (over captions where there are no classes), and of the sigmoid of
    all pairs.

    Sigmoid probabilities σ(scale · cosine + bias) are reported of models that have a bias, over all
    pairs of up to 2,000 images (evenly chosen) with their captions: most of them do not belong
    together, so a model trained on batches of other sizes meets other odds here.
    """
    model = view.encoder.model
    scale = model.logit_scale.exp().item()
    bias = model.logit_bias.item()
    if "zero_shot" in view.data.tasks:
        confidence, best = surest(view.images, view.class_features, scale)
        right = best == view.labels.numpy()
    else:
        images = view.images[view.captioned]
        belongs = view.captions[1]
        confidence, best = surest(images, view.texts, scale)
        own = set(zip(belongs.image.tolist(), belongs.text.tolist(), strict=True))
        right = np.array([pair in own for pair in enumerate(best.tolist())])
    cell = Result(view.data.name, "calibration", {}, counts={"images": len(right)})
    _report(cell, "softmax", confidence, right)
    if bias:
        _report(cell, "sigmoid", *_all_pairs(view, scale, bias))
    return cell


def _all_pairs(view: DataView, scale: float, bias: float) -> tuple[NDArray[Any], NDArray[Any]]:
    images = view.images[view.captioned]
    belongs = view.captions[1]
    chosen = torch.arange(len(images))[:: -(-len(images) // PAIRS_OF)]
    texts = torch.unique(belongs.text[torch.isin(belongs.image, chosen)])
    told = (scores(images[chosen], view.texts[texts]).double() * scale + bias).sigmoid()
    true = torch.cat([belongs.block("image", i, i + 1)[:, texts] for i in chosen.tolist()])
    return told.flatten().numpy(), true.flatten().numpy()


def _report(cell: Result, name: str, confidence: NDArray[Any], right: NDArray[Any]) -> None:
    bins = equal_width(confidence, right)
    cell.metrics[f"{name}_ece"] = ece(bins)
    cell.metrics[f"{name}_ece_adaptive"] = ece(equal_mass(confidence, right))
    cell.metrics[f"{name}_confidence"] = float(confidence.mean())
    cell.metrics[f"{name}_accuracy"] = float(right.mean())
    cell.details[f"{name}_reliability"] = bins


def draw(cell: Result, path: Path) -> None:
    """The reliability diagram of a calibration cell as a PNG: a dot a bin, on the diagonal where it
    is honest.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name in ("softmax", "sigmoid"):
        if bins := cell.details.get(f"{name}_reliability"):
            told = [b["confidence"] for b in bins]
            true = [b["accuracy"] for b in bins]
            axes.plot(told, true, "o-", label=f"{name}, ECE {cell.metrics[f'{name}_ece']:.3f}")
    axes.set(
        xlabel="told probability",
        ylabel="share that came true",
        xlim=(0, 1),
        ylim=(0, 1),
        title=cell.dataset,
    )
    axes.legend()
    figure.savefig(path, dpi=150)
