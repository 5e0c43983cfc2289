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
# values of C: eight per decade, as CLIP's sweep had
STRENGTHS = np.logspace(-6, 6, 97)


def fit(features: Tensor, labels: Tensor, seed: int = 0) -> tuple[Any, float]:
    """(N, D), (N,) -> scikit-learn's logistic regression and the C it was fitted with.

    As CLIP's linear probe (arXiv 2103.00020, §A.3): L-BFGS, at most 1,000 iterations, C from 1e-6
    to 1e6 by a search on log scale: seven of them, then half the way around the best, down to eight
    per decade. A fifth of the images judges it (chosen by `seed`, stratified where classes are
    large enough); then it is fitted to all.

    Raises:
        ValueError: a single class.
    """
    # a second of imports that only this task needs
    from sklearn.model_selection import train_test_split

    x = features.double().numpy()
    y = labels.numpy()
    sizes = np.bincount(y)
    sizes = sizes[sizes > 0]
    if len(sizes) < 2:
        raise ValueError(
            f"a linear probe needs two classes at least; all {len(y)} train images are of one"
        )
    # a fifth judges, rounded up
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
    # nothing to search with
    if len(set(y_fit.tolist())) < 2:
        return _fitted(x, y, 1.0), 1.0
    accuracy_at = dict[int, float]()

    def accuracy(position: int) -> float:
        # the search comes to some positions twice
        if position not in accuracy_at:
            strength = STRENGTHS[position]
            model = _fitted(x_fit, y_fit, strength)
            score = model.score(x_held, y_held)
            accuracy_at[position] = float(score)
        return accuracy_at[position]

    def accurate_and_simple(position: int) -> tuple[float, int]:
        # of equals the smallest C, the simplest model
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
        # 1,000 iterations are the protocol
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=1000).fit(x, y)


def linear_probe(view: DataView) -> Result:
    """Classify images by a logistic regression on the training images' unit features; see `fit`."""
    train, labels, _, _ = view.training
    # fitted once: changed images are classified by the same model
    if NAME not in view.learned:
        view.learned[NAME] = fit(train, labels)
    model, strength = view.learned[NAME]

    features = view.images.double().numpy()
    # (n, C); they rank as probabilities do
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
