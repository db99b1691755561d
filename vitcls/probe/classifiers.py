"""Classifiers of scikit-learn on features, each with its one setting chosen on the validation split."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitcls.metrics.scaling import Temperature


class Examples(NamedTuple):
    """Images as a classifier sees them."""

    features: np.ndarray  # float32 [N, D]
    labels: np.ndarray  # int32 [N], of classes 0 .. K - 1

    def take(self, indices: np.ndarray) -> "Examples":
        return Examples(self.features[indices], self.labels[indices])


class Kind(NamedTuple):
    """A kind of classifier."""

    key: str  # the name of its setting; '' where it has none
    values: Sequence[Any]  # of the setting, from which the validation split chooses; the first of the best is taken
    fit: Callable[[Examples, Any], Callable]  # (training examples, value) -> scores(features) float [N, K]
    scores_are_probabilities: bool
    affine: bool  # whether scores are features times a matrix, and a bias


class Fitted(NamedTuple):
    """A classifier that has been fitted."""

    predict: Callable[[np.ndarray], np.ndarray]  # features [N, D] -> probabilities float32 [N, K]
    choice: str  # in words, such as 'C 0.1'
    head: tuple[np.ndarray, np.ndarray] | None  # kernel [D, K] and bias [K] of its logits, float32; None where none are


def fit(name: str, train: Examples, validation: Examples) -> Fitted:
    """Fits the classifier `name` to the training examples; the validation split chooses its setting by accuracy.

    Scores that are no probabilities become them by a softmax, whose temperature has the least loss on the validation
    split (Guo et al. 2017); that changes no guess. So do those of logistic regression, whose strength is chosen for
    its guesses alone. All K classes must be among the training examples.
    """
    kind = CLASSIFIERS[name]
    values = [value for value in kind.values if kind.key != "k" or value <= len(train.labels)]
    best = None
    for value in values:
        score = kind.fit(train, value)
        scores = score(validation.features)
        accuracy = np.mean(scores.argmax(axis=1) == validation.labels)
        if best is None or accuracy > best[0]:
            best = accuracy, value, score, scores
    _, value, score, scores = best
    choice = f"{kind.key} {value:g}" if kind.key else "nothing to choose"
    if kind.scores_are_probabilities:
        return Fitted(lambda features: score(features).astype(np.float32), choice, None)
    temperature = _temperature(scores, validation.labels)

    def predict(features: np.ndarray) -> np.ndarray:
        return _softmax(score(features) / temperature).astype(np.float32)

    width = train.features.shape[1]
    return Fitted(predict, choice, _head(score, width, temperature) if kind.affine else None)


def _head(score: Callable, width: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The layer whose logits are these scores over the temperature, by what they are of nothing and of each feature."""
    bias = score(np.zeros((1, width)))
    kernel = score(np.eye(width)) - bias
    return (kernel / temperature).astype(np.float32), (bias[0] / temperature).astype(np.float32)


def _temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """That of the least loss, within a factor of 50 around the spread of the scores."""
    spread = max(float(scores.std()), 1e-6)
    return spread * Temperature.fit(labels, _softmax(scores / spread)).temperature


def _softmax(scores: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(scores, axis=1)


def _linear(train: Examples, value: float) -> Callable:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    estimator = make_pipeline(StandardScaler(), LogisticRegression(C=value, max_iter=1_000))
    return _by_class(_fit(estimator, train).decision_function)


def _svm(train: Examples, value: float) -> Callable:
    from sklearn.svm import LinearSVC

    scale = max(float(train.features.std()), 1e-6)  # one for all, so that C means the same whatever the features
    fitted = _fit(LinearSVC(C=value, random_state=0), Examples(train.features / scale, train.labels))
    return _by_class(lambda features: fitted.decision_function(features / scale))


def _by_class(decide: Callable) -> Callable:
    """One score for each class; of two classes scikit-learn gives that of the second alone."""

    def score(features: np.ndarray) -> np.ndarray:
        scores = decide(features)
        return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1) / 2

    return score


def _fit(estimator, train: Examples):
    """The estimator, fitted by one thread: many small products of several wait for one another on a busy machine."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the validation split judges what has come of it
        return estimator.fit(train.features, train.labels)


def _knn(train: Examples, value: int) -> Callable:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(value, metric="cosine").fit(train.features, train.labels).predict_proba


def _centroid(train: Examples, value: None) -> Callable:
    from sklearn.metrics.pairwise import euclidean_distances

    classes = range(train.labels.max() + 1)
    means = np.stack([train.features[train.labels == k].mean(axis=0) for k in classes])
    return lambda features: -euclidean_distances(features, means, squared=True)


CLASSIFIERS = {
    "linear": Kind("C", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0), _linear, False, True),
    "knn": Kind("k", (1, 3, 5, 10, 20), _knn, True, False),
    "svm": Kind("C", (1e-5, 1e-4, 1e-3, 1e-2, 1e-1), _svm, False, True),
    "centroid": Kind("", (None,), _centroid, False, False),
}
