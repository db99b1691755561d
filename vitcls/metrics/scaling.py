"""Probabilities made honest after training: maps that are fitted on a validation split.

Each is a frozen dataclass, called with probabilities float [N, K] -> float64 [N, K], with `fit(labels, probabilities)`.
A softmax's probabilities are its logits but for a constant, so all of them start from log p. The fits count
one example more, of any class (Platt 1999, section 2.2, has two): else a few that are all right make them certain.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

_TINY = float(np.finfo(np.float32).tiny)  # the smallest normal number: what is below, XLA takes for 0
_FOLDS = 5
_RANGE = (0.02, 50.0)  # of the temperature


class Scaling(Protocol):
    """A map of probabilities [N, K] to better ones."""

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """float [N, K] -> float64 [N, K], rows that sum to 1."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """The probabilities as they are."""

    @classmethod
    def fit(cls, labels: np.ndarray, probabilities: np.ndarray) -> "Identity":
        return cls()

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        return _softmax(_log(probabilities))


@dataclasses.dataclass(frozen=True)
class Temperature:
    """softmax(log p / T), the T with the least loss (Guo et al. 2017, section 4.2); no prediction changes."""

    temperature: float

    @classmethod
    def fit(cls, labels: np.ndarray, probabilities: np.ndarray) -> "Temperature":
        from scipy.optimize import minimize_scalar

        log_p = _log(probabilities)
        bounds = tuple(np.log(_RANGE))
        found = minimize_scalar(
            lambda x: _loss(labels, log_p / np.exp(x)), bounds=bounds, method="bounded", options={"xatol": 1e-7}
        )
        return cls(float(np.exp(found.x)))

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        return _softmax(_log(probabilities) / self.temperature)


@dataclasses.dataclass(frozen=True)
class Vector:
    """softmax(w log p + b), a weight and a bias for each class (Guo et al. 2017, section 4.2)."""

    weights: tuple[float, ...]
    biases: tuple[float, ...]

    @classmethod
    def fit(cls, labels: np.ndarray, probabilities: np.ndarray) -> "Vector":
        from scipy.optimize import minimize

        log_p = _log(probabilities)
        count, num_classes = log_p.shape
        targets = (count * np.eye(num_classes)[labels] + 1 / num_classes) / (count + 1)

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            weights, biases = parameters.reshape(2, num_classes)
            z = weights * log_p + biases
            error = (_softmax(z) - targets) / count
            return _loss(labels, z), np.concatenate([(error * log_p).sum(axis=0), error.sum(axis=0)])

        start = np.concatenate([np.ones(num_classes), np.zeros(num_classes)])
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x.reshape(2, num_classes)
        return cls(*(tuple(map(float, row)) for row in found))

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        return _softmax(np.array(self.weights) * _log(probabilities) + np.array(self.biases))


@dataclasses.dataclass(frozen=True)
class Isotonic:
    """A rising step function of p for each class against the rest, then divided by the sum (Zadrozny & Elkan 2002).

    Between the steps the line is straight. No value is below 1 / (2 n + 2) of n examples, since none of n is no proof
    that there will be none.
    """

    places: tuple[tuple[float, ...], ...]  # of each class
    values: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, labels: np.ndarray, probabilities: np.ndarray) -> "Isotonic":
        from sklearn.isotonic import IsotonicRegression

        places, values, least = [], [], 1 / (2 * len(labels) + 2)
        for k in range(probabilities.shape[1]):
            fitted = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip")
            fitted.fit(probabilities[:, k].astype(np.float64), labels == k)
            places.append(tuple(map(float, fitted.X_thresholds_)))
            values.append(tuple(map(float, fitted.y_thresholds_)))
        return cls(tuple(places), tuple(values))

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        columns = [
            np.interp(probabilities[:, k].astype(np.float64), self.places[k], self.values[k])
            for k in range(len(self.places))
        ]
        raised = np.stack(columns, axis=1)
        return raised / raised.sum(axis=1, keepdims=True)


METHODS: dict[str, Any] = {"none": Identity, "temperature": Temperature, "vector": Vector, "isotonic": Isotonic}


def choose(labels: np.ndarray, probabilities: np.ndarray, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The method with the least loss on examples that it was not fitted on, and the loss of each, in nats.

    Five folds; with fewer than two examples in each, the probabilities stay as they are.
    """
    count = len(labels)
    fold = np.random.default_rng(seed).permutation(count) % _FOLDS
    if count < 2 * _FOLDS:
        return "none", {"none": _nll(labels, Identity()(probabilities))}
    losses = {}
    for name, method in METHODS.items():
        out = np.empty((count, probabilities.shape[1]))
        for k in range(_FOLDS):
            held = fold == k
            out[held] = method.fit(labels[~held], probabilities[~held])(probabilities[held])
        losses[name] = _nll(labels, out)
    return min(losses, key=losses.get), losses


def to_json(scaling: Scaling) -> dict[str, Any]:
    """The method's name and its numbers, for `from_json`."""
    (name,) = [name for name, method in METHODS.items() if isinstance(scaling, method)]
    return {"method": name, **dataclasses.asdict(scaling)}


def from_json(values: dict[str, Any]) -> Scaling:
    """The scaling that `to_json` wrote; raises KeyError or TypeError for what it did not."""
    method = METHODS[values["method"]]
    fields = {field.name: values[field.name] for field in dataclasses.fields(method)}
    return method(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), _TINY))


def _softmax(z: np.ndarray) -> np.ndarray:
    raised = np.exp(z - z.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _loss(labels: np.ndarray, z: np.ndarray) -> float:
    """Of logits [n, K], in nats; of n + 1 examples n have the label, and one is shared by all classes."""
    count, top = len(labels), z.max(axis=1)
    wanted = (count * z[np.arange(count), labels] + z.mean(axis=1)) / (count + 1)
    return float(np.mean(np.log(np.exp(z - top[:, None]).sum(axis=1)) + top - wanted))


def _nll(labels: np.ndarray, probabilities: np.ndarray) -> float:
    return float(-np.mean(_log(probabilities)[np.arange(len(labels)), labels]))
