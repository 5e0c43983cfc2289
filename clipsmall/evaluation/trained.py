"""What tasks share that classify images after learning from labelled training images."""

import torch
from torch import Tensor

from clipsmall.evaluation.classification import class_accuracies, class_chance, class_in_top_k
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.top_k import chunk_rows
from clipsmall.evaluation.view import DataView


def classified(view: DataView, task: str, scores: Tensor, counts: dict[str, int]) -> Result:
    """(n, C) scores of the classes for each image -> the result of `task`."""
    train, _, labels, classes = view.training
    size = chunk_rows(classes)
    parts = []
    for some, truth in zip(torch.split(scores, size), torch.split(labels, size), strict=True):
        parts.append(class_in_top_k(some, truth))
    metrics = class_accuracies(torch.cat(parts), labels, classes)
    sizes = {
        "images": len(labels),
        "train": len(train),
        "classes": classes,
        "skipped": view.skipped,
    }
    return Result(view.data.name, task, metrics, class_chance(classes), {**sizes, **counts})
