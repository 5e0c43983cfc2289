"""Linear probe: a logistic regression on the features of labelled training images."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task
from clipsmall.evaluation.trained import classified
from clipsmall.evaluation.view import DataView

NAME = "linear_probe"
# Candidates for scikit-learn's C: eight per decade, as in CLIP's sweep.
STRENGTHS = np.logspace(-6, 6, 97)


def fit(features: Tensor, labels: Tensor, seed: int = 0) -> tuple[Any, float]:
    """(N, D), (N,) -> scikit-learn's logistic regression and the C it was fitted with.

    CLIP's linear probe (arXiv 2103.00020, §A.3): L-BFGS with at most 1,000 iterations, and C from
    1e-6 to 1e6. C is searched on a log scale: seven values, then half the step around the best one,
    down to eight values per decade. A fifth of the images is held out to choose C (drawn with
    `seed`, stratified if the classes are large enough); then the probe is fitted to all images.

    Raises:
        ValueError: all images are of one class.
    """
    # imported here: takes a second, and only this task needs it
    from sklearn.model_selection import train_test_split

    x = features.double().numpy()
    y = labels.numpy()
    sizes = np.bincount(y)
    sizes = sizes[sizes > 0]
    if len(sizes) < 2:
        raise ValueError(
            f"a linear probe needs at least two classes; all {len(y)} train images are of one"
        )
    # a fifth is held out, rounded up
    held_out = -(-len(y) // 5)
    smaller_part = min(held_out, len(y) - held_out)
    # scikit-learn stratifies only where each part can hold all classes
    can_stratify = sizes.min() > 1 and smaller_part >= len(sizes)
    strata = y if can_stratify else None
    x_fit, x_held, y_fit, y_held = train_test_split(
        x,
        y,
        test_size=held_out,
        random_state=seed,
        stratify=strata,
    )
    # only one class left to fit: C cannot be searched
    if len(set(y_fit.tolist())) < 2:
        return _fitted(x, y, 1.0), 1.0
    accuracy_at = dict[int, float]()

    def accuracy(position: int) -> float:
        # the search visits some positions twice
        if position not in accuracy_at:
            strength = STRENGTHS[position]
            model = _fitted(x_fit, y_fit, strength)
            score = model.score(x_held, y_held)
            accuracy_at[position] = float(score)
        return accuracy_at[position]

    def accurate_and_simple(position: int) -> tuple[float, int]:
        # among equal accuracies the smallest C: the simplest model
        return accuracy(position), -position

    best = max(range(0, 97, 16), key=accuracy)
    for step in (8, 4, 2, 1):
        near = (best - step, best, best + step)
        around = [position for position in near if 0 <= position < 97]
        best = max(around, key=accurate_and_simple)

    strength = STRENGTHS[best]
    return _fitted(x, y, strength), float(strength)


def _fitted(x: Any, y: Any, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # the protocol stops at 1,000 iterations, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=1000).fit(x, y)


def linear_probe(view: DataView) -> Result:
    """Classify images by a logistic regression on the training images' unit features; see `fit`."""
    train, labels, _, _ = view.training
    # fitted once: corrupted images are classified by the same probe
    if NAME not in view.learned:
        view.learned[NAME] = fit(train, labels)
    model, strength = view.learned[NAME]

    features = view.images.double().numpy()
    # (n, C) log-probabilities, which rank as probabilities do
    predicted = model.predict_log_proba(features)
    log_probabilities = torch.from_numpy(predicted)
    result = classified(view, NAME, log_probabilities, {})
    result.details["C"] = strength
    return result


TASK = Task(
    NAME,
    linear_probe,
    learns=True,
    main=(("acc1",),),
    repeatable=True,
    metrics=("acc1", "acc5", "mean_per_class_recall"),
)
