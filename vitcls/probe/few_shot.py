"""Accuracy with a few images of each class: the mean over random draws, with its interval."""

from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.metrics.resampling import LEVEL
from vitcls.probe import classifiers
from vitcls.probe.classifiers import Examples

DRAWS = 10


def check_shots(shots: tuple[int, ...], labels: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Raises UserError for shots that are no numbers, or more than a class has training images."""
    counts = np.bincount(labels, minlength=len(class_names))
    for number in shots:
        if number < 1:
            raise UserError(f"--shots={number} is impossible; it must be numbers of images of each class, such as 1,5")
        if number > counts.min():
            raise UserError(
                f"--shots={number} is more than the {counts.min():,} training images of class "
                f"'{class_names[int(counts.argmin())]}'; give at most {counts.min():,}"
            )


def draw(labels: np.ndarray, shots: int, seed: int, number: int) -> np.ndarray:
    """Places of `shots` images of each class, int [K * shots]; draw `number` is a function of the three numbers."""
    rng = np.random.default_rng((seed, shots, number))
    places = [rng.choice(np.flatnonzero(labels == k), shots, replace=False) for k in np.unique(labels)]
    return np.concatenate(places)


def few_shot(name: str, shots: int, train: Examples, validation: Examples, test: Examples, seed: int) -> dict[str, Any]:
    """The accuracy of the classifier `name` on the test examples after `shots` training images of each class.

    Returns shots, accuracy (the mean), its interval low and high, and that of each draw.
    """
    accuracies = []
    for number in range(DRAWS):
        fitted = classifiers.fit(name, train.take(draw(train.labels, shots, seed, number)), validation)
        accuracies.append(float(np.mean(fitted.predict(test.features).argmax(axis=1) == test.labels)))
    low, high = interval(accuracies)
    return {"shots": shots, "accuracy": float(np.mean(accuracies)), "low": low, "high": high, "draws": accuracies}


def interval(accuracies: list[float]) -> tuple[float, float]:
    """Student's interval of the mean over draws, within 0 .. 1: of other draws, on the same test images."""
    from scipy import stats

    mean, error = np.mean(accuracies), stats.sem(accuracies)
    half = stats.t.ppf((1 + LEVEL) / 2, len(accuracies) - 1) * error
    return float(max(mean - half, 0)), float(min(mean + half, 1))
