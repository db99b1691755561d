"""What a classifier says of images that it was not fitted to, for every image of a set."""

import numpy as np

from vitcls.core.progress import show_progress
from vitcls.probe.classifiers import CLASSIFIERS, Examples

_STRENGTHS = (1e-3, 1e-2, 1e-1)  # C, from which the first fold chooses by its loss


def cross_validated(examples: Examples, folds: int, seed: int = 0) -> np.ndarray:
    """Probabilities float32 [N, K] by logistic regression, each of a fold by the others; folds have equal classes.

    Every class needs at least `folds` images.
    """
    from scipy.special import softmax
    from sklearn.model_selection import StratifiedKFold

    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(examples.features, examples.labels))

    def scores(strength: float, fold: int) -> np.ndarray:
        train, held = splits[fold]
        return softmax(CLASSIFIERS["linear"].fit(examples.take(train), strength)(examples.features[held]), axis=1)

    def loss(found: np.ndarray) -> float:
        labels = examples.labels[splits[0][1]]
        return float(-np.log(np.maximum(found[np.arange(len(labels)), labels], 1e-12)).mean())

    first = {strength: scores(strength, 0) for strength in show_progress(_STRENGTHS, len(_STRENGTHS), "strengths")}
    best = min(first, key=lambda strength: loss(first[strength]))
    probabilities = np.empty((len(examples.labels), examples.labels.max() + 1), np.float32)
    for fold in show_progress(range(folds), folds, "folds"):
        probabilities[splits[fold][1]] = scores(best, fold) if fold else first[best]
    return probabilities
