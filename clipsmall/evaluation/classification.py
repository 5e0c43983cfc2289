"""Zero-shot classification: a class is the mean of its prompts' features, an image goes to the
nearest.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.data import Catalog
from clipsmall.evaluation import prompts
from clipsmall.evaluation.features import Encoder, class_indices, read_texts
from clipsmall.evaluation.hits import chunk_rows, hits, refuse_non_finite, scores
from clipsmall.evaluation.results import Result

KS = (1, 5)


def class_features(
    encoder: Encoder, classes: Sequence[str], templates: Sequence[prompts.Template]
) -> Tensor:
    """(C, D) unit rows: the normalised mean over templates of unit text features (Radford et al.
    2021, §3.1.4).
    """
    texts = encoder.texts([template(name) for name in classes for template in templates])
    return F.normalize(texts.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def accuracies(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """(n, D), (C, D), (n,) -> acc1, acc5 (where C > 5) and mean_per_class_recall over the classes
    with images.
    """
    size = chunk_rows(len(classes))
    parts = zip(torch.split(images, size), torch.split(labels, size), strict=True)
    found = [class_hits(scores(features, classes), truth) for features, truth in parts]
    return summary(torch.cat(found), labels, len(classes))


def class_hits(values: Tensor, labels: Tensor) -> Tensor:
    """(n, C) scores, (n,) labels -> (n, 1 or 2): is the right class the best, and (where C > 5)
    among the 5 best?
    """
    classes = values.shape[1]
    return hits(
        values, F.one_hot(labels, classes).bool(), tuple(k for k in KS if k == 1 or k < classes)
    )


def summary(hit: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """What `class_hits` found -> CLIP_benchmark's metrics."""
    counts = torch.bincount(labels, minlength=classes)
    per_class = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, hit[:, 0])
    metrics = {f"acc{k}": hit[:, i].mean().item() for i, k in enumerate(KS[: hit.shape[1]])}
    return {**metrics, "mean_per_class_recall": (per_class / counts)[counts > 0].mean().item()}


def class_chance(classes: int) -> dict[str, float]:
    """acc1 and acc5 of a guess among C classes."""
    return {f"acc{k}": k / classes for k in KS if k == 1 or k < classes}


def zero_shot(
    encoder: Encoder,
    catalog: Catalog,
    name: str,
    classes: str = "captions",
    templates: str = "plain",
    label: str = "",
) -> Result:
    """Classify every image of `catalog` among `classes`; exact under several ranks.

    Args:
        classes, templates: see `prompts`. label: see `read_texts`.

    Raises:
        ValueError: labels without a class, templates without {c}, features that are not finite.
    """
    texts = read_texts(catalog, label)
    names = prompts.classes(classes, texts.captions, texts.labels)
    labels = class_indices(texts.labels, names)
    # before images, which may take hours
    weights = class_features(encoder, names, prompts.templates(templates))
    refuse_non_finite(weights, "class")
    images, rows = encoder.images(catalog)
    refuse_non_finite(images, "image")
    return Result(
        dataset=name,
        task="zeroshot_classification",
        metrics=accuracies(images, weights, labels[rows]),
        chance=class_chance(len(names)),
        counts={"images": len(rows), "classes": len(names), "skipped": catalog.total - len(rows)},
    )
