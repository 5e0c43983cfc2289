"""Zero-shot classification: each image goes to the class whose mean prompt feature is nearest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.evaluation import prompts
from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.top_k import chunk_rows, in_top_k, scores

KS = (1, 5)


def class_features(
    encoder: Encoder, classes: Sequence[str], templates: Sequence[prompts.Template]
) -> Tensor:
    """(C, D) unit rows: the normalised mean over templates of unit text features.

    Radford et al. 2021, arXiv 2103.00020, §3.1.4.
    """
    texts = []
    for name in classes:
        for template in templates:
            texts.append(template(name))

    # (C · T, D) -> (C, T, D)
    features = encoder.texts(texts)
    by_class = features.view(len(classes), len(templates), -1)
    means = by_class.mean(dim=1)
    return F.normalize(means, dim=-1)


def accuracies(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """(n, D) images, (C, D) classes, (n,) labels -> acc1, acc5 and mean_per_class_recall.

    acc5 only if C > 5. Classes without an image do not count in the mean.
    """
    size = chunk_rows(len(classes))
    chunks_of_images = torch.split(images, size)
    chunks_of_labels = torch.split(labels, size)
    parts = []
    for features, truth in zip(chunks_of_images, chunks_of_labels, strict=True):
        # (size, C)
        cosines = scores(features, classes)
        parts.append(class_in_top_k(cosines, truth))

    right = torch.cat(parts)
    return class_accuracies(right, labels, len(classes))


def class_in_top_k(values: Tensor, labels: Tensor) -> Tensor:
    """(n, C) scores, (n,) labels -> (n, 1 or 2): is the right class the best, and in the top 5?

    The second column exists only if C > 5.
    """
    classes = values.shape[1]
    ks = tuple(k for k in KS if k == 1 or k < classes)
    # (n, C)
    right = F.one_hot(labels, classes).bool()
    return in_top_k(values, right, ks)


def class_accuracies(right: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """The result of `class_in_top_k` -> CLIP_benchmark's metrics."""
    metrics = {}
    for column in range(right.shape[1]):
        accuracy = right[:, column].mean()
        metrics[f"acc{KS[column]}"] = accuracy.item()

    # (C,) images of each class; below, how many of them are classified correctly
    counts = torch.bincount(labels, minlength=classes)
    per_class = torch.zeros(classes, dtype=torch.float64)
    per_class.index_add_(0, labels, right[:, 0])

    recalls = per_class / counts
    # a class without an image has no recall
    with_image = recalls[counts > 0]
    metrics["mean_per_class_recall"] = with_image.mean().item()
    return metrics


def class_chance(classes: int) -> dict[str, float]:
    """Chance levels of acc1 and acc5 among C classes."""
    return {f"acc{k}": k / classes for k in KS if k == 1 or k < classes}
