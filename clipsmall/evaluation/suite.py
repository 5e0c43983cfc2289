"""The suite: tasks by name, and the cells of one model, each measured once and kept as a file."""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipsmall.data import ShardError
from clipsmall.distributed import world
from clipsmall.evaluation.calibration import calibration, draw
from clipsmall.evaluation.candidates import candidates
from clipsmall.evaluation.classification import accuracies, class_chance
from clipsmall.evaluation.corruptions import COMMON, SEVERITIES
from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.geometry import geometry
from clipsmall.evaluation.matching import matching
from clipsmall.evaluation.multilabel import average_precisions
from clipsmall.evaluation.probe import knn, linear_probe
from clipsmall.evaluation.results import Result, cell_path, write_cell
from clipsmall.evaluation.retrieval import retrieval_of
from clipsmall.evaluation.robustness import MAIN, robustness
from clipsmall.evaluation.sets import DataSet
from clipsmall.evaluation.top1 import top1
from clipsmall.evaluation.view import DataView

# to be raised when a task's numbers change
VERSION = 2
# by their names in cells, of which the first three are CLIP_benchmark's
TASKS = {
    "zero_shot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "linear_probe": "linear_probe",
    "knn": "knn",
    "robustness": "robustness",
    "calibration": "calibration",
    "geometry": "geometry",
    "matching": "matching",
    "top1": "top1",
    "candidates": "candidates",
}
# task -> the settings that change its numbers
DEPENDS = {
    "zero_shot": ("empty_classes",),
    "calibration": ("empty_classes",),
    "knn": ("k", "temperature"),
    "robustness": ("corruptions", "severities"),
    "top1": ("corruptions", "severities"),
    "candidates": ("candidates",),
}
# the tasks that a multi-label set without captions has
OF_SEVERAL_LABELS = ("zero_shot", "top1")


@dataclass(frozen=True)
class Settings:
    """What tasks can be told; what a task depends on is part of its cell's key."""

    k: int = 20
    # of kNN's votes; 0 = majority
    temperature: float = 0.07
    corruptions: tuple[str, ...] = COMMON
    severities: tuple[int, ...] = SEVERITIES
    empty_classes: bool = False
    # of a hard set
    candidates: int = 32

    def told(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Those that these tasks depend on, for the key of a cell."""
        names = {name for task in tasks for name in DEPENDS.get(task, ())}
        return {name: value for name, value in asdict(self).items() if name in names}


def zero_shot(view: DataView) -> Result:
    """As `classification.zero_shot`, of features that other tasks share; of a multi-label set, its
    mAP.
    """
    if view.data.kind == "multilabel":
        return ranked(view)
    # before images: a wrong list is told at once
    classes = view.class_features
    labels = view.labels
    return Result(
        view.data.name,
        TASKS["zero_shot"],
        accuracies(view.images, classes, labels),
        class_chance(len(view.classes)),
        {"images": len(view.images), "classes": len(view.classes), "skipped": view.skipped},
    )


def ranked(view: DataView) -> Result:
    """`mean_average_precision` over the classes that have an image (CLIP_benchmark's name); see
    `average_precisions`.

    Raises:
        ValueError: targets that are none, classes without an image (unless allowed), or none at all
            with one.
    """
    classes = view.classes
    features = view.class_features
    targets = view.targets
    found = average_precisions(view.images, features, targets)
    here = ~found.isnan()
    if not here.any():
        raise ValueError(f"{view.data.name}: no class has an image; check its .npy members")
    return Result(
        view.data.name,
        TASKS["zero_shot"],
        {"mean_average_precision": found[here].mean().item()},
        {"mean_average_precision": targets[:, here].double().mean().item()},
        {
            "images": len(targets),
            "classes": len(classes),
            "labels": int(targets.sum()),
            "skipped": view.skipped,
        },
    )


def retrieval(view: DataView) -> Result:
    """As `retrieval.retrieval`, of features that other tasks share."""
    images = view.images[view.captioned]
    texts = view.texts
    belongs = view.captions[1]
    return retrieval_of(images, texts, belongs, view.data.name, view.uncaptioned)


def evaluations(settings: Settings, base: Sequence[str]) -> dict[str, Callable[[DataView], Result]]:
    """Task -> what measures it. `base`: the tasks that robustness repeats on corrupted pictures."""
    found: dict[str, Callable[[DataView], Result]] = {
        "zero_shot": zero_shot,
        "retrieval": retrieval,
        "linear_probe": linear_probe,
        "knn": partial(knn, k=settings.k, temperature=settings.temperature),
        "calibration": calibration,
        "geometry": geometry,
        "matching": matching,
        "candidates": partial(candidates, size=settings.candidates),
        "top1": partial(top1, corruptions=settings.corruptions, severities=settings.severities),
    }
    repeated = {task: found[task] for task in base}
    found["robustness"] = partial(
        robustness, tasks=repeated, corruptions=settings.corruptions, severities=settings.severities
    )
    return found


@dataclass
class NamedModel:
    """A model under its name in the results."""

    name: str
    # a weight tag, or "" and the first digits of the weights' digest stand in
    pretrained: str
    encoder: Encoder

    def __post_init__(self) -> None:
        self.digest = self.encoder.digest()
        self.pretrained = self.pretrained or self.digest[:8]


def evaluate(
    model: NamedModel, sets: Sequence[DataSet], tasks: Sequence[str], settings: Settings, out: Path
) -> list[str]:
    """Fill the cells of a model that are not filled yet; returns what went wrong, a line a cell.

    A cell is done when its file says that it was made from these weights, these data and these
    settings. One that fails is told and left out, the others go on. Every rank must call; the first
    one writes.
    """
    asked = [(data, task) for data in sets for task in dict.fromkeys(tasks or data.tasks)]
    done = _done(model, asked, settings, tasks, out)
    failures = list[str]()
    views = dict[str, DataView]()
    for (data, task), key in zip(asked, done, strict=True):
        if not key:
            continue
        if data.name not in views:
            # features of one set at a time
            views = {data.name: DataView(model.encoder, data, settings.empty_classes)}
        try:
            if data.kind == "multilabel" and task not in OF_SEVERAL_LABELS:
                raise ValueError(
                    f"a multi-label set has no such cell, only {' and '.join(OF_SEVERAL_LABELS)}"
                )
            cell = evaluations(settings, _base(data, tasks))[task](views[data.name])
        except Exception as error:
            if world.size() > 1 and (
                not isinstance(error, ValueError) or isinstance(error, ShardError)
            ):
                # perhaps of this rank alone, and then the others are waiting for it
                raise
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            failures.append(f"{model.name} on {data.name}, {task}: {kind}{error}")
            continue
        cell.key = key
        if world.rank() == 0:
            # first: a cell that is there counts as done
            if task == "calibration":
                path = cell_path(out, data.name, model.pretrained, model.name, cell.task)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(cell, path.with_suffix(".png"))
            print(
                f"written to {write_cell(cell, out, model.name, model.pretrained)}", file=sys.stderr
            )
    return failures


def _base(data: DataSet, tasks: Sequence[str]) -> list[str]:
    return sorted({task for task in tasks if task in MAIN}) or data.tasks


def _done(
    model: NamedModel,
    asked: list[tuple[DataSet, str]],
    settings: Settings,
    tasks: Sequence[str],
    out: Path,
) -> list[str]:
    """For each cell its key, or "" where it is done: as the first rank finds it, so that all go the
    same way.
    """
    keys = list[str]()
    for data, task in asked:
        base = _base(data, tasks) if task == "robustness" else []
        learns = bool({task, *base} & {"knn", "linear_probe"})
        parts = [
            VERSION,
            model.digest,
            data.digest(learns),
            task,
            base,
            settings.told([task, *base]),
        ]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        path = cell_path(out, data.name, model.pretrained, model.name, TASKS[task])
        keys.append("" if _key_of(path) == key else key)
    first: list[str] = json.loads(
        world.gather_bytes(json.dumps(keys).encode(), model.encoder.device)[0]
    )
    return first


def _key_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("key", ""))
    except (OSError, ValueError):
        return ""
