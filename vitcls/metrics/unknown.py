"""Is an image unlike anything seen in training? Scores that are higher for what is known, and how well they separate.

Each score is a frozen dataclass with `fit(Outputs of training images, labels)`, called with Outputs -> float64 [N].
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vitcls.metrics.promises import proportion
from vitcls.metrics.resampling import bootstrap_interval

_MOST = 10_000  # training images that neighbours are looked for among
_NEIGHBORS = 50  # Sun et al. 2022, section 4.1, for CIFAR
_TPR = 0.95
_RESAMPLES = 200
FEWEST = 10  # images of which a resample says something


class Outputs(NamedTuple):
    """What a model says of N images."""

    logits: np.ndarray  # float [N, K]
    features: np.ndarray  # float [N, D], before the classifier


@dataclasses.dataclass(frozen=True)
class MaximumSoftmax:
    """The largest probability (Hendrycks & Gimpel 2017)."""

    @classmethod
    def fit(cls, outputs: Outputs, labels: np.ndarray) -> "MaximumSoftmax":
        return cls()

    def __call__(self, outputs: Outputs) -> np.ndarray:
        z = outputs.logits.astype(np.float64)
        return np.exp(z.max(axis=1) - _log_sum_exp(z))


@dataclasses.dataclass(frozen=True)
class Energy:
    """log sum exp of the logits (Liu et al. 2020)."""

    @classmethod
    def fit(cls, outputs: Outputs, labels: np.ndarray) -> "Energy":
        return cls()

    def __call__(self, outputs: Outputs) -> np.ndarray:
        return _log_sum_exp(outputs.logits.astype(np.float64))


@dataclasses.dataclass(frozen=True)
class Mahalanobis:
    """Less the squared distance to the nearest class, by the covariance within classes (Lee et al. 2018)."""

    means: np.ndarray  # float64 [K, D]
    whiten: np.ndarray  # float64 [D, D]; its square is the inverse of the covariance

    @classmethod
    def fit(cls, outputs: Outputs, labels: np.ndarray) -> "Mahalanobis":
        features = outputs.features.astype(np.float64)
        classes = np.unique(labels)
        means = np.stack([features[labels == k].mean(axis=0) for k in classes])
        centered = features - means[np.searchsorted(classes, labels)]
        values, vectors = np.linalg.eigh(centered.T @ centered / len(features))
        kept = values > 1e-6 * values.max()  # directions without variance say nothing
        return cls(means, (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T)

    def __call__(self, outputs: Outputs) -> np.ndarray:
        features, means = outputs.features.astype(np.float64) @ self.whiten, self.means @ self.whiten
        squared = (features**2).sum(axis=1)[:, None] - 2 * features @ means.T + (means**2).sum(axis=1)[None, :]
        return -squared.min(axis=1)


@dataclasses.dataclass(frozen=True)
class NearestNeighbors:
    """Less the distance to the 50th nearest of up to 10,000 training images, normalised (Sun et al. 2022)."""

    bank: np.ndarray  # float32 [M, D], normalised
    neighbors: int

    @classmethod
    def fit(cls, outputs: Outputs, labels: np.ndarray) -> "NearestNeighbors":
        chosen = np.random.default_rng(0).permutation(len(labels))[:_MOST]
        return cls(_normalized(outputs.features[chosen]), min(_NEIGHBORS, len(chosen)))

    def __call__(self, outputs: Outputs) -> np.ndarray:
        distances = []
        for start in range(0, len(outputs.features), 1024):
            cosines = _normalized(outputs.features[start : start + 1024]) @ self.bank.T
            nearest = -np.partition(-cosines, self.neighbors - 1, axis=1)[:, self.neighbors - 1]
            distances.append(np.sqrt(np.maximum(2 - 2 * nearest.astype(np.float64), 0)))
        return -np.concatenate(distances)


SCORES = {"msp": MaximumSoftmax, "energy": Energy, "mahalanobis": Mahalanobis, "knn": NearestNeighbors}


def _log_sum_exp(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=1)
    return top + np.log(np.exp(z - top[:, None]).sum(axis=1))


def _normalized(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def separation(known: np.ndarray, unknown: np.ndarray) -> dict[str, dict[str, float | None]]:
    """How well scores [n] and [m] separate what is known from what is not, with 95 % bootstrap intervals.

    auroc; aupr_known and aupr_unknown, of average precision with the one or the other as the positives; fpr95, the
    share of unknown images above the threshold that 95 % of the known ones pass. Its interval is no shorter than the
    exact one of a share of [m]; of fewer than ten images on a side the others have none.
    """
    rng = np.random.default_rng(0)
    scores, places = np.unique(np.concatenate([known, unknown]), return_inverse=True)
    sides = places[: len(known)], places[len(known) :]

    def separated(sides: Iterable[np.ndarray]) -> dict[str, float]:
        return _separation(*(np.bincount(side, minlength=len(scores)) for side in sides))

    found = separated(sides)
    drawn = [separated([rng.choice(side, len(side)) for side in sides]) for _ in range(_RESAMPLES)]
    few = min(len(known), len(unknown)) < FEWEST
    result = {}
    for name, value in found.items():
        low, high = (None, None) if few else bootstrap_interval(np.array([each[name] for each in drawn]))
        result[name] = {"value": value, "low": low, "high": high}
    rate = proportion(np.arange(len(unknown)) < round(found["fpr95"] * len(unknown)))
    if not few:
        rate |= {"low": min(rate["low"], result["fpr95"]["low"]), "high": max(rate["high"], result["fpr95"]["high"])}
    result["fpr95"] = rate
    return result


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """How often a known image's score is above an unknown one's; a tie is half."""
    from sklearn.metrics import roc_auc_score

    is_known = np.arange(len(known) + len(unknown)) < len(known)
    return float(roc_auc_score(is_known, np.concatenate([known, unknown])))


def _separation(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """Of how many known and unknown images have each of the scores, which ascend: int [S]."""
    all_known, all_unknown = known.sum(), unknown.sum()
    known_up_to, unknown_up_to = np.cumsum(known), np.cumsum(unknown)
    known_from, unknown_from = all_known - known_up_to + known, all_unknown - unknown_up_to + unknown
    passed = np.searchsorted(known_up_to, _below_threshold(all_known), side="right")
    precision_known = known_from / np.maximum(known_from + unknown_from, 1)
    precision_unknown = unknown_up_to / np.maximum(known_up_to + unknown_up_to, 1)
    return {
        "auroc": float(np.sum(known * (unknown_up_to - unknown / 2)) / (all_known * all_unknown)),
        "aupr_known": float(np.sum(known * precision_known) / all_known),
        "aupr_unknown": float(np.sum(unknown * precision_unknown) / all_unknown),
        "fpr95": float(unknown_from[passed] / all_unknown),
    }


def threshold(known: np.ndarray, share: float = _TPR) -> float:
    """The score that this share of known images reach."""
    return float(np.sort(known)[_below_threshold(len(known), share)])


def _below_threshold(count: int, share: float = _TPR) -> int:
    """How many of so many known images may lie below the threshold."""
    return int(np.floor((1 - share) * count))
