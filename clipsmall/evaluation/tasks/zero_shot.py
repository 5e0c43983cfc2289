"""Zero-shot classification: an image goes to the class whose prompts are nearest."""

from clipsmall.evaluation.classification import accuracies, class_chance
from clipsmall.evaluation.multilabel import average_precisions
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import PageTable, Task
from clipsmall.evaluation.view import DataView

NAME = "zeroshot_classification"


def zero_shot(view: DataView) -> Result:
    """acc1, acc5 and mean_per_class_recall; for a multi-label set, mean average precision.

    Raises:
        ValueError: labels without a class, classes without an image (unless allowed), templates
            without {c}, features that are not finite.
    """
    if view.data.kind == "multilabel":
        return mean_average_precision(view)
    # classes first: images may take hours, and a wrong class list should fail at once
    classes = view.class_features
    labels = view.labels
    return Result(
        view.data.name,
        NAME,
        accuracies(view.images, classes, labels),
        class_chance(len(view.classes)),
        {"images": len(view.images), "classes": len(view.classes), "skipped": view.skipped},
    )


def mean_average_precision(view: DataView) -> Result:
    """`mean_average_precision` over the classes that have an image (CLIP_benchmark's name).

    See `average_precisions`.

    Raises:
        ValueError: invalid targets, classes without an image (unless allowed), or no class that
            has an image.
    """
    classes = view.classes
    features = view.class_features
    targets = view.targets
    precisions = average_precisions(view.images, features, targets)
    with_image = ~precisions.isnan()
    if not with_image.any():
        raise ValueError(f"{view.data.name}: no class has an image; check its .npy members")
    # chance level: the fraction of positives
    positives = targets[:, with_image].double().mean().item()
    counts = {
        "images": len(targets),
        "classes": len(classes),
        "labels": int(targets.sum()),
        "skipped": view.skipped,
    }
    return Result(
        view.data.name,
        NAME,
        {"mean_average_precision": precisions[with_image].mean().item()},
        {"mean_average_precision": positives},
        counts,
    )


TASK = Task(
    NAME,
    zero_shot,
    matches="classes",
    default_for=lambda data: data.has_classes,
    multilabel=True,
    main=(("acc1",), ("mean_average_precision",)),
    repeatable=True,
    metrics=("acc1", "acc5", "mean_per_class_recall"),
    short_in_log=True,
    datacomp_key="{dataset}",
    page_table=PageTable(
        "Zero-shot classification",
        metrics=("acc1", "acc5", "mean_per_class_recall"),
        with_chance=("acc1", "acc5"),
        counts=("images", "classes"),
    ),
)
