"""Classification: a class is the mean of its prompts' features, an image goes to the nearest."""

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
    texts = [template(name) for name in classes for template in templates]
    features = encoder.texts(texts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=-1)


def accuracies(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """(n, D), (C, D), (n,) -> acc1, acc5 (where C > 5) and mean_per_class_recall.

    The last is the mean over the classes that have an image.
    """
    size = chunk_rows(len(classes))
    parts = []
    for features, truth in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        parts.append(class_in_top_k(scores(features, classes), truth))
    return class_accuracies(torch.cat(parts), labels, len(classes))


def class_in_top_k(values: Tensor, labels: Tensor) -> Tensor:
    """(n, C) scores, (n,) labels -> (n, 1 or 2): is the right class among the best 1, and 5?

    The second column is there where C > 5.
    """
    classes = values.shape[1]
    ks = tuple(k for k in KS if k == 1 or k < classes)
    return in_top_k(values, F.one_hot(labels, classes).bool(), ks)


def class_accuracies(right: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """What `class_in_top_k` found -> CLIP_benchmark's metrics."""
    metrics = {
        f"acc{KS[column]}": right[:, column].mean().item() for column in range(right.shape[1])
    }
    counts = torch.bincount(labels, minlength=classes)
    per_class = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, right[:, 0])
    recall = (per_class / counts)[counts > 0].mean().item()
    return {**metrics, "mean_per_class_recall": recall}


def class_chance(classes: int) -> dict[str, float]:
    """acc1 and acc5 of a guess among C classes."""
    return {f"acc{k}": k / classes for k in KS if k == 1 or k < classes}
