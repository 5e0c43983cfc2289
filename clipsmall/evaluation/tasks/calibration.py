"""Calibration: is a model right as often as it is confident? ECE, and a reliability diagram."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task
from clipsmall.evaluation.top_k import chunk_rows, scores
from clipsmall.evaluation.view import DataView

NAME = "calibration"
BINS = 15
# images: all pairs of more of them would be another 100 MiB for every thousand
PAIRS_OF = 2000
# those that are not empty, each with its mean confidence, accuracy and count
Bins = list[dict[str, float]]


def equal_width(confidence: NDArray[Any], right: NDArray[Any], bins: int = BINS) -> Bins:
    """(n,) probabilities and (n,) whether they came true, in bins (0, 1/15], (1/15, 2/15], ..."""
    bin_of = np.ceil(confidence * bins).clip(1, bins).astype(np.int64) - 1
    return _binned(confidence, right, bin_of)


def equal_mass(confidence: NDArray[Any], right: NDArray[Any], bins: int = BINS) -> Bins:
    """The same in bins of equally many, from the least confident to the most.

    Nixon et al. 2019, arXiv 1904.01685.
    """
    count = len(confidence)
    bin_of = np.empty(count, dtype=np.int64)
    ascending = np.argsort(confidence, kind="stable")
    bin_of[ascending] = np.arange(count) * bins // count
    return _binned(confidence, right, bin_of)


def _binned(confidence: NDArray[Any], right: NDArray[Any], bin_of: NDArray[Any]) -> Bins:
    counts = np.bincount(bin_of)
    confidences = np.bincount(bin_of, confidence)
    rights = np.bincount(bin_of, right)
    bins: Bins = []
    for b in np.flatnonzero(counts):
        mean_confidence = confidences[b] / counts[b]
        accuracy = rights[b] / counts[b]
        bins.append({"confidence": mean_confidence, "accuracy": accuracy, "count": int(counts[b])})
    return bins


def ece(bins: Bins) -> float:
    """Σ_b n_b/n |accuracy_b − confidence_b| (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    total = sum(b["count"] for b in bins)
    return sum(b["count"] / total * abs(b["accuracy"] - b["confidence"]) for b in bins)


def most_confident(
    images: Tensor, answers: Tensor, scale: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(n, D), (C, D) -> (n,) each image's highest probability, and (n,) of which answer it is.

    Probabilities are the softmax of scale · cosine over the answers.
    """
    values = []
    indices = []
    for part in torch.split(images, chunk_rows(len(answers))):
        probabilities = (scores(part, answers).double() * scale).softmax(dim=1)
        best = probabilities.max(dim=1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values).numpy(), torch.cat(indices).numpy()


def calibration(view: DataView) -> Result:
    """Calibration of the softmax over classes (or captions), and of the sigmoid of all pairs.

    The softmax is over captions where there are no classes. Sigmoid probabilities
    σ(scale · cosine + bias) are reported of models that have a bias, over all pairs of up to 2,000
    images (evenly chosen) with their captions: most of them do not belong together, so a model
    trained on batches of other sizes meets other odds here.
    """
    model = view.encoder.model
    scale = model.logit_scale.exp().item()
    bias = model.logit_bias.item()
    if view.data.has_classes:
        confidence, best = most_confident(view.images, view.class_features, scale)
        right = best == view.labels.numpy()
    else:
        images = view.images[view.captioned]
        belongs = view.captions[1]
        confidence, best = most_confident(images, view.texts, scale)
        pairs = set(zip(belongs.image.tolist(), belongs.text.tolist(), strict=True))
        right = np.array([pair in pairs for pair in enumerate(best.tolist())])
    result = Result(view.data.name, NAME, {}, counts={"images": len(right)})
    _report(result, "softmax", confidence, right)
    if bias:
        _report(result, "sigmoid", *_all_pairs(view, scale, bias))
    return result


def _all_pairs(view: DataView, scale: float, bias: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """(pairs,) sigmoid probabilities of all pairs of some images, and whether they belong."""
    images = view.images[view.captioned]
    belongs = view.captions[1]
    # rounded up
    step = -(-len(images) // PAIRS_OF)
    chosen = torch.arange(len(images))[::step]
    texts = torch.unique(belongs.text[torch.isin(belongs.image, chosen)])
    logits = scores(images[chosen], view.texts[texts]).double() * scale + bias
    together = [belongs.block("image", image, image + 1)[:, texts] for image in chosen.tolist()]
    return logits.sigmoid().flatten().numpy(), torch.cat(together).flatten().numpy()


def _report(result: Result, name: str, confidence: NDArray[Any], right: NDArray[Any]) -> None:
    bins = equal_width(confidence, right)
    result.metrics[f"{name}_ece"] = ece(bins)
    result.metrics[f"{name}_ece_adaptive"] = ece(equal_mass(confidence, right))
    result.metrics[f"{name}_confidence"] = float(confidence.mean())
    result.metrics[f"{name}_accuracy"] = float(right.mean())
    result.details[f"{name}_reliability"] = bins


def draw_reliability(result: Result, path: Path) -> None:
    """The reliability diagram as a PNG beside the result's file `path`.

    One dot per bin, on the diagonal where the model is as right as it is confident.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name in ("softmax", "sigmoid"):
        bins = result.details.get(f"{name}_reliability")
        if bins:
            confidence = [b["confidence"] for b in bins]
            accuracy = [b["accuracy"] for b in bins]
            label = f"{name}, ECE {result.metrics[f'{name}_ece']:.3f}"
            axes.plot(confidence, accuracy, "o-", label=label)
    axes.set(
        xlabel="predicted probability",
        ylabel="fraction that came true",
        xlim=(0, 1),
        ylim=(0, 1),
        title=result.dataset,
    )
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)


def _names(probabilities: str) -> Iterable[str]:
    for measure in ("ece", "ece_adaptive", "confidence", "accuracy"):
        yield f"{probabilities}_{measure}"


TASK = Task(
    NAME,
    calibration,
    matches="classes",
    metrics=(*_names("softmax"), *_names("sigmoid")),
    write_files=draw_reliability,
)
