"""ROC curves and the areas under them, one class against the rest."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """An ROC curve: false and true positive rates in [0, 1], both [points], and the area under it."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    auc: float


class RocCurves(NamedTuple):
    """One class against the rest: the areas of all classes, and the curves that are worth drawing."""

    aucs: np.ndarray  # [K], exact; NaN where a class or its rest is absent
    micro: Curve  # all decisions pooled
    macro: Curve  # the mean over classes
    worst: dict[int, Curve]  # the classes with the least area


def roc_curves(labels: np.ndarray, probabilities: np.ndarray, worst: int = 5) -> RocCurves | None:
    """ROC curves of labels int [N] and probabilities float32 [N, K]; None where all labels are of one class.

    A class's area is that of its exact curve, its Mann-Whitney statistic, in which a tie counts one half. A curve has
    no more than 2,004 points and is exact for up to 1,000 positives; beyond, every point of it is within 1/1000 of the
    exact one. The macro curve is the vertical average of the classes' curves; its area is given as the mean of theirs.
    The micro area is that of its curve, to 1/2000.
    """
    num_examples, num_classes = probabilities.shape
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]  # of the true class: the positives [N]
    pooled, pooled_ahead = _thresholds(np.sort(own)), 0
    aucs = np.full(num_classes, np.nan)
    curves = {}
    for k, scores in _sorted_columns(probabilities):
        pooled_ahead = pooled_ahead + _ahead(scores, pooled)
        positives = np.sort(own[labels == k])
        if 0 < len(positives) < num_examples:
            aucs[k] = _mann_whitney(positives, scores)
            thresholds = _thresholds(positives)
            hits = _ahead(positives, thresholds)
            curves[k] = _curve(hits, _ahead(scores, thresholds), len(positives), num_examples, aucs[k])
    if not curves:
        return None
    micro = _curve(_ahead(np.sort(own), pooled), pooled_ahead, num_examples, probabilities.size)
    grid = np.linspace(0, 1, 1001)
    mean = np.mean([np.interp(grid, x, y) for x, y, _ in curves.values()], axis=0)
    macro = Curve(np.append(0.0, grid), np.append(0.0, mean), mean_auc(aucs))
    least = sorted(curves, key=lambda k: aucs[k])[:worst]
    return RocCurves(aucs, micro, macro, {k: curves[k] for k in least})


def _sorted_columns(probabilities: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(k, the scores of class k from low to high), a few classes at a time, since single columns are slow to read."""
    block = 32
    for start in range(0, probabilities.shape[1], block):
        columns = np.array(probabilities[:, start : start + block].T, order="C")
        columns.sort(axis=1)
        yield from enumerate(columns, start)


def _mann_whitney(positives: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in which the positive has the higher score; a tie is half.

    Both are sorted, and `scores` holds the positives too: of all P^2 pairs among themselves they win one half.
    """
    wins = int(np.searchsorted(scores, positives, "left").sum() + np.searchsorted(scores, positives, "right").sum())
    count = len(positives)
    return (wins - count**2) / (2 * count * (len(scores) - count))


def _thresholds(positives: np.ndarray) -> np.ndarray:
    """Scores of positives, from high to low, so that less than a thousandth of all lies between one and the next.

    Between two of them the curve stays in a box of that height, so no point of it is further from the chord.
    """
    count = len(positives)
    places = np.ceil(np.linspace(0, count, 1001)[1:]).astype(int) if count > 1000 else np.arange(1, count + 1)
    return np.unique(positives[count - places])[::-1]


def _ahead(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many of the sorted `scores` are above each threshold, and how many are not below it: int [thresholds, 2]."""
    return len(scores) - np.stack([np.searchsorted(scores, thresholds, side) for side in ("right", "left")], axis=1)


def _curve(hits: np.ndarray, ahead: np.ndarray, positives: int, total: int, auc: float | None = None) -> Curve:
    """The curve through counts of positives and of all scores at thresholds, both as `_ahead` gives them."""
    y = np.concatenate([[0], hits.ravel(), [positives]]) / positives
    x = np.concatenate([[0], (ahead - hits).ravel(), [total - positives]]) / (total - positives)
    return Curve(x, y, float(np.trapezoid(y, x)) if auc is None else float(auc))


def mean_auc(aucs: np.ndarray) -> float:
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else 0.5
