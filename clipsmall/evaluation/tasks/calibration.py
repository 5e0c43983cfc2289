"""Calibration: does a model's confidence match its accuracy? ECE and a reliability diagram."""

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
# Images whose pairs are all formed: each further thousand would take another 100 MiB.
PAIRS_OF = 2000
# The non-empty bins, each with mean confidence, accuracy and count.
Bins = list[dict[str, float]]


def equal_width(confidence: NDArray[Any], right: NDArray[Any], bins: int = BINS) -> Bins:
    """(n,) confidences and (n,) whether each was right, in bins (0, 1/15], (1/15, 2/15], ..."""
    # bins are open below and closed above; a confidence of 0 goes to the first
    upper_edge = np.ceil(confidence * bins).clip(1, bins)
    bin_of = upper_edge.astype(np.int64) - 1
    return _binned(confidence, right, bin_of)


def equal_mass(confidence: NDArray[Any], right: NDArray[Any], bins: int = BINS) -> Bins:
    """The same in bins of equal count, from least to most confident.

    Nixon et al. 2019, arXiv 1904.01685.
    """
    count = len(confidence)
    ascending = np.argsort(confidence, kind="stable")
    ranks = np.arange(count)

    bin_of = np.empty(count, dtype=np.int64)
    bin_of[ascending] = ranks * bins // count
    return _binned(confidence, right, bin_of)


def _binned(confidence: NDArray[Any], right: NDArray[Any], bin_of: NDArray[Any]) -> Bins:
    # (bins,) sums
    counts = np.bincount(bin_of)
    confidences = np.bincount(bin_of, confidence)
    rights = np.bincount(bin_of, right)

    bins: Bins = []
    for b in np.flatnonzero(counts):
        count = counts[b]
        one_bin = {
            "confidence": confidences[b] / count,
            "accuracy": rights[b] / count,
            "count": int(count),
        }
        bins.append(one_bin)
    return bins


def ece(bins: Bins) -> float:
    """Σ_b n_b/n |accuracy_b − confidence_b| (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    total = sum(b["count"] for b in bins)
    return sum(b["count"] / total * abs(b["accuracy"] - b["confidence"]) for b in bins)


def most_confident(
    images: Tensor, answers: Tensor, scale: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(n, D), (C, D) -> (n,) highest probability of each image, and (n,) the answer that has it.

    Probabilities are the softmax of scale · cosine over the answers.
    """
    values = []
    indices = []
    rows = chunk_rows(len(answers))
    for part in torch.split(images, rows):
        # (rows, C)
        logits = scores(part, answers).double() * scale
        probabilities = logits.softmax(dim=1)
        best = probabilities.max(dim=1)
        values.append(best.values)
        indices.append(best.indices)

    confidence = torch.cat(values)
    answer = torch.cat(indices)
    return confidence.numpy(), answer.numpy()


def calibration(view: DataView) -> Result:
    """Calibration of the softmax over classes (or captions), and of the sigmoid over all pairs.

    The softmax is over captions if there are no classes. Models with a logit_bias also get the
    calibration of σ(scale · cosine + bias), over all combinations of up to 2,000 images (evenly
    spaced) with these images' captions. Nearly all are negatives, so the fraction of positives is
    not the one of the training batches.
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
        belonging_images = belongs.image.tolist()
        belonging_texts = belongs.text.tolist()
        pairs = set(zip(belonging_images, belonging_texts, strict=True))
        # is an image's most probable caption one of its own?
        right = np.array([pair in pairs for pair in enumerate(best.tolist())])

    result = Result(view.data.name, NAME, {}, counts={"images": len(right)})
    _report(result, "softmax", confidence, right)
    if bias:
        probabilities, together = _all_pairs(view, scale, bias)
        _report(result, "sigmoid", probabilities, together)
    return result


def _all_pairs(view: DataView, scale: float, bias: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """(pairs,) sigmoid probabilities of all pairs of some images, and whether each pair matches."""
    images = view.images[view.captioned]
    belongs = view.captions[1]
    # rounded up
    step = -(-len(images) // PAIRS_OF)
    # (i,) images, and the (t,) texts that match one of them
    chosen = torch.arange(len(images))[::step]
    of_chosen = torch.isin(belongs.image, chosen)
    texts = torch.unique(belongs.text[of_chosen])

    # (i, t)
    cosines = scores(images[chosen], view.texts[texts])
    logits = cosines.double() * scale + bias
    probabilities = logits.sigmoid()

    # (i, t), built row by row: a block over all texts would be too large
    rows = []
    for image in chosen.tolist():
        row = belongs.block("image", image, image + 1)
        rows.append(row[:, texts])
    together = torch.cat(rows)
    return probabilities.flatten().numpy(), together.flatten().numpy()


def _report(result: Result, name: str, confidence: NDArray[Any], right: NDArray[Any]) -> None:
    bins = equal_width(confidence, right)
    adaptive_bins = equal_mass(confidence, right)

    metrics = result.metrics
    metrics[f"{name}_ece"] = ece(bins)
    metrics[f"{name}_ece_adaptive"] = ece(adaptive_bins)
    metrics[f"{name}_confidence"] = float(confidence.mean())
    metrics[f"{name}_accuracy"] = float(right.mean())
    # the reliability diagram is drawn from these bins
    result.details[f"{name}_reliability"] = bins


def draw_reliability(result: Result, path: Path) -> None:
    """The reliability diagram as a PNG beside the result's file `path`.

    One dot per bin; on the diagonal, accuracy equals confidence.
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
