"""Shared by tasks that classify images with a model fitted to labelled training images."""

import torch
from torch import Tensor

from clipsmall.evaluation.classification import class_accuracies, class_chance, class_in_top_k
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.top_k import chunk_rows
from clipsmall.evaluation.view import DataView


def classified(view: DataView, task: str, scores: Tensor, counts: dict[str, int]) -> Result:
    """(n, C) class scores of each image -> the result of `task`."""
    train, _, labels, classes = view.training
    size = chunk_rows(classes)
    chunks_of_scores = torch.split(scores, size)
    chunks_of_labels = torch.split(labels, size)
    parts = []
    for some, truth in zip(chunks_of_scores, chunks_of_labels, strict=True):
        parts.append(class_in_top_k(some, truth))

    right = torch.cat(parts)
    metrics = class_accuracies(right, labels, classes)
    chance = class_chance(classes)
    all_counts = {
        "images": len(labels),
        "train": len(train),
        "classes": classes,
        "skipped": view.skipped,
    }
    # counts that only some tasks have come last
    all_counts |= counts
    return Result(view.data.name, task, metrics, chance, all_counts)
