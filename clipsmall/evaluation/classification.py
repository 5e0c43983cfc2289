"""Zero-shot classification: a class is the mean of its prompts' features, an image goes to the nearest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.evaluation import prompts
from clipsmall.evaluation.cells import Cell
from clipsmall.evaluation.features import Encoder, class_indices, read_texts
from clipsmall.evaluation.hits import chance, chunk_rows, hits, refuse_non_finite, scores
from clipsmall.shards import Catalog

KS = (1, 5)


def class_features(encoder: Encoder, classes: Sequence[str], templates: Sequence[prompts.Template]) -> Tensor:
    """(C, D) unit rows: the normalised mean over templates of unit text features (Radford et al. 2021, §3.1.4)."""
    texts = encoder.texts([template(name) for name in classes for template in templates])
    return F.normalize(texts.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def accuracies(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """(n, D), (C, D), (n,) -> acc1, acc5 (where C > 5) and mean_per_class_recall over the classes with images."""
    ks = tuple(k for k in KS if k == 1 or k < len(classes))
    found, size = [], chunk_rows(len(classes))
    for features, truth in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        found.append(hits(scores(features, classes), F.one_hot(truth, len(classes)).bool(), ks))
    hit = torch.cat(found)
    counts = torch.bincount(labels, minlength=len(classes))
    per_class = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, labels, hit[:, 0])
    metrics = {f"acc{k}": hit[:, i].mean().item() for i, k in enumerate(ks)}
    return {**metrics, "mean_per_class_recall": (per_class / counts)[counts > 0].mean().item()}


def zero_shot(
    encoder: Encoder,
    catalog: Catalog,
    name: str,
    classes: str = "captions",
    templates: str = "plain",
    label: str = "",
) -> Cell:
    """Classify every image of `catalog` among `classes`; exact under several ranks.

    Args:
        classes, templates: see `prompts`. label: see `read_texts`.

    Raises:
        ValueError: labels without a class, templates without {c}, features that are not finite.
    """
    texts = read_texts(catalog, label)
    names = prompts.classes(classes, texts.captions, texts.labels)
    labels = class_indices(texts.labels, names)
    images, rows = encoder.images(catalog)
    weights = class_features(encoder, names, prompts.templates(templates))
    refuse_non_finite(images, "image")
    refuse_non_finite(weights, "class")
    answers = torch.tensor([len(names)])
    guess = chance(answers, torch.ones_like(answers), KS)
    metrics = accuracies(images, weights, labels[rows])
    return Cell(
        dataset=name,
        task="zeroshot_classification",
        metrics=metrics,
        chance={f"acc{k}": p for k, p in zip(KS, guess.tolist(), strict=True) if f"acc{k}" in metrics},
        counts={"images": len(rows), "classes": len(names), "skipped": len(catalog) - len(rows)},
    )
