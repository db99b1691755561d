"""Classifiers of features, of scikit-learn; whatever there is to choose is chosen by the validation images.

Each is fit(train, validation) -> Fitted, both a pair of features float32 [N, D] and labels int [N].
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitcls.metrics import scaling

Examples = tuple[np.ndarray, np.ndarray]  # features float32 [N, D], labels int [N]
_SEARCHED = 10_000  # training examples among which strengths are compared
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_NEIGHBORS = (1, 3, 5, 10, 20, 50)


class Fitted(NamedTuple):
    """A classifier, and what was chosen."""

    predict: Callable[[np.ndarray], np.ndarray]  # features [N, D] -> probabilities float32 [N, K]
    chosen: dict[str, Any]


class Candidate(NamedTuple):
    """A scikit-learn estimator to be tried."""

    chosen: dict[str, Any]
    make: Callable[[], Any]
    scores: Callable[[Any, np.ndarray], np.ndarray]  # (estimator, features) -> logits [N, K of those that occur]


def linear(train: Examples, validation: Examples, num_classes: int) -> Fitted:
    """Logistic regression with L2 regularisation on standardised features."""
    from sklearn.linear_model import LogisticRegression

    return _best(
        [
            Candidate(
                {"C": c},
                lambda c=c: LogisticRegression(C=c, max_iter=300),
                lambda model, x: np.log(np.maximum(model.predict_proba(x), 1e-30)),
            )
            for c in _STRENGTHS
        ],
        train,
        validation,
        num_classes,
    )


def svm(train: Examples, validation: Examples, num_classes: int) -> Fitted:
    """A support vector machine on standardised features: linear, and up to 10,000 examples one with Gaussian kernel."""
    from sklearn.svm import SVC, LinearSVC

    candidates = [
        Candidate({"kernel": "linear", "C": c}, lambda c=c: LinearSVC(C=c, max_iter=2_000), _decisions)
        for c in _STRENGTHS[:5]
    ]
    if len(train[1]) <= _SEARCHED:
        candidates += [
            Candidate({"kernel": "rbf", "C": c}, lambda c=c: SVC(C=c, cache_size=1000), _decisions)
            for c in (1.0, 10.0, 100.0)
        ]
    return _best(candidates, train, validation, num_classes)


def _decisions(model: Any, features: np.ndarray) -> np.ndarray:
    values = model.decision_function(features)
    return values if values.ndim == 2 else np.stack([-values, values], axis=1)  # of two classes


def knn(train: Examples, validation: Examples, num_classes: int) -> Fitted:
    """The votes of the nearest by cosine; of equal votes the class with the nearest neighbour wins."""
    from sklearn.neighbors import NearestNeighbors

    features, labels = train
    most = [k for k in _NEIGHBORS if k <= len(labels)]
    model = NearestNeighbors(n_neighbors=most[-1], algorithm="brute", metric="cosine").fit(_unit(features))

    def votes(features: np.ndarray, wanted: Sequence[int]) -> list[np.ndarray]:
        nearest = labels[model.kneighbors(_unit(features), return_distance=False)]  # [N, most]
        counts, found = np.zeros((len(features), num_classes)), {}
        for k in range(most[-1]):
            counts[np.arange(len(features)), nearest[:, k]] += 1 + 1e-6 / (k + 1)
            if k + 1 in wanted:
                found[k + 1] = (counts + 1 / num_classes) / (counts + 1 / num_classes).sum(axis=1, keepdims=True)
        return [found[k] for k in wanted]

    accuracies = [np.mean(p.argmax(axis=1) == validation[1]) for p in votes(validation[0], most)]
    best = most[int(np.argmax(accuracies))]
    fitted = _tempered(lambda x: np.log(votes(x, [best])[0]), validation, np.arange(num_classes), num_classes)
    return Fitted(fitted, {"k": best})


def centroid(train: Examples, validation: Examples, num_classes: int) -> Fitted:
    """The nearest mean of a class, by cosine."""
    features, labels = train
    means = np.zeros((num_classes, features.shape[1]), np.float32)
    for k in np.unique(labels):
        means[k] = _unit(features[labels == k]).mean(axis=0)
    means = _unit(means)
    fitted = _tempered(lambda x: _unit(x) @ means.T, validation, np.unique(labels), num_classes)
    return Fitted(fitted, {})


CLASSIFIERS = {"linear": linear, "knn": knn, "svm": svm, "centroid": centroid}


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _best(candidates: Sequence[Candidate], train: Examples, validation: Examples, num_classes: int) -> Fitted:
    """The candidate with the best accuracy on the validation images, the first of equals, fitted on all of `train`."""
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    std = np.where(std > 1e-6, std, 1.0)

    def standard(features: np.ndarray) -> np.ndarray:
        return (features - mean) / std

    rows = np.random.default_rng(0).permutation(len(train[1]))[:_SEARCHED]
    some = standard(train[0][rows]), train[1][rows]
    held = standard(validation[0])
    accuracies = [np.mean(_fit(each, some).predict(held) == validation[1]) for each in candidates]
    best = candidates[int(np.argmax(accuracies))]
    model = _fit(best, (standard(train[0]), train[1]))
    scores = lambda x: best.scores(model, standard(x))  # noqa: E731
    return Fitted(_tempered(scores, validation, model.classes_, num_classes), best.chosen)


def _fit(candidate: Candidate, examples: Examples) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it would go on converging
        return candidate.make().fit(*examples)


def _tempered(
    scores: Callable[[np.ndarray], np.ndarray], validation: Examples, classes: np.ndarray, num_classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Scores of `classes` as probabilities of all, at the temperature that fits the validation images."""

    def probabilities(features: np.ndarray) -> np.ndarray:
        z = scores(features).astype(np.float64)
        raised = np.exp(z - z.max(axis=1, keepdims=True))
        full = np.full((len(features), num_classes), 1e-12)
        full[:, classes] += raised / raised.sum(axis=1, keepdims=True)
        return full / full.sum(axis=1, keepdims=True)

    temper = scaling.Temperature.fit(validation[1], probabilities(validation[0]))
    return lambda features: temper(probabilities(features)).astype(np.float32)
