"""kNN classification: the nearest training images vote for an image's class."""

import torch
from torch import Tensor

from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task, TaskOption
from clipsmall.evaluation.top_k import chunk_rows, scores
from clipsmall.evaluation.trained import classified
from clipsmall.evaluation.view import DataView

NAME = "knn"


def votes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """(N, D), (N,), (n, D) -> (n, C) votes of the k nearest by cosine.

    A vote is worth exp(cosine / temperature): Wu et al. 2018, arXiv 1805.01978, §3.4, whose
    temperature is the default; 0 = every vote counts 1 (majority).

    Raises:
        ValueError: k is not between 1 and N.
    """
    refuse_k(k, len(train))
    # converted once, not in every chunk
    train = train.double()
    size = chunk_rows(len(train))
    parts = []
    for part in torch.split(test, size):
        # (rows, k) cosines and indices of the nearest
        cosines = scores(part, train).double()
        near = cosines.topk(k, dim=1)
        if temperature:
            # only ratios matter; dividing by the largest vote avoids overflow
            best = near.values[:, :1]
            worth = ((near.values - best) / temperature).exp()
        else:
            worth = torch.ones_like(near.values)

        # (rows, C)
        counted = torch.zeros(len(part), classes, dtype=torch.float64)
        near_labels = labels[near.indices]
        counted.scatter_add_(1, near_labels, worth)
        parts.append(counted)
    return torch.cat(parts)


def refuse_k(k: int, count: int) -> None:
    """Raises ValueError if there are fewer than k training images."""
    if not 1 <= k <= count:
        raise ValueError(
            f"k={k}: there are {count} images to learn from; choose k from 1 to {count}"
        )


def knn(view: DataView, k: int = 20, temperature: float = 0.07) -> Result:
    """Classify images by their `k` nearest among the training images; see `votes`.

    Raises:
        ValueError: k larger than the training set, or classes without a training image.
    """
    # checked before anything is encoded
    refuse_k(k, len(view.data.training))
    train, labels, _, classes = view.training
    # (n, C)
    class_votes = votes(train, labels, view.images, classes, k, temperature)
    return classified(view, NAME, class_votes, {"k": k})


TASK = Task(
    NAME,
    knn,
    options={
        "k": TaskOption(20, "neighbours of kNN", least=1),
        "temperature": TaskOption(0.07, "temperature of kNN's votes; 0 = majority", least=0),
    },
    learns=True,
    main=(("acc1",),),
    repeatable=True,
    metrics=("acc1", "acc5", "mean_per_class_recall"),
)
