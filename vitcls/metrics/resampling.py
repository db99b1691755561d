"""Intervals of metrics by the bootstrap over images (Efron & Tibshirani 1993).

A resample is a weight for each image: how often it was drawn. All metrics are computed under many weights at once, as
products of a sparse matrix with them, so that no prediction is ever copied or sorted again.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from vitcls.metrics.calibration import BINS, bins_of
from vitcls.metrics.classification import negative_log_likelihood, ranks_of_true_class

RESAMPLES = 1_000
LEVEL = 0.95  # of intervals
METRICS_OF_PREDICTIONS = (
    "accuracy",
    "top5_accuracy",
    "f1_macro",
    "auc_ovr_macro",
    "ece",
    "loss",
    "precision_macro",
    "recall_macro",
    "auc_ovr_macro_hard",
)
_BLOCK = 2**25  # weights that are in memory at a time


def bootstrap(
    labels: np.ndarray, probabilities: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """The metrics of a classifier on images drawn with replacement: name -> float64 [resamples].

    And 'ece_luck', which `gap_interval` takes.

    The same seed draws the same images, so that two classifiers can be compared resample by resample.

    Args:
      labels: int [N]; probabilities: float32 [N, K].
    """
    parts = [weighted_metrics(labels, probabilities, weights) for weights in draw_weights(len(labels), resamples, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def draw_weights(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, float32 [N, block], some resamples at a time."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = [np.bincount(rng.integers(count, size=count), minlength=count).astype(np.uint16) for _ in range(size)]
        yield np.stack(drawn, axis=1).astype(np.float32)


def bootstrap_interval(replicates: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of a number, from its values in resamples [resamples] (section 13).

    Of the intervals that were tried, percentile, basic and BCa, it holds the truth most nearly as often as it says:
    docs/comparing.md has what was measured.
    """
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(
    values: Mapping[str, np.ndarray], of: Callable[[dict[str, np.ndarray]], np.ndarray], resamples: int = RESAMPLES
) -> dict[str, float | None]:
    """value, low and high of a number that is computed from means over images, by the bootstrap over these.

    Args:
      values: for each name [..., N], bool or numbers of the same N images.
      of: gives the number [R] from the means, for each name float64 [..., R], in R resamples.

    A number that is not finite, as a share of no errors, is None, and so is the interval of a single image.
    """
    count = next(iter(values.values())).shape[-1]
    flat = {name: rows.astype(np.float32) for name, rows in values.items()}
    value = of({name: rows.mean(axis=-1, keepdims=True, dtype=np.float64) for name, rows in flat.items()})[0]
    drawn = [
        of({name: (rows @ weights / count).astype(np.float64) for name, rows in flat.items()})
        for weights in draw_weights(count, resamples, seed=0)
    ]
    replicates = np.concatenate(drawn)
    if not np.isfinite(value) or not np.isfinite(replicates).all() or count < 2:
        return {"value": float(value) if np.isfinite(value) else None, "low": None, "high": None}
    low, high = bootstrap_interval(replicates)
    return {"value": float(value), "low": low, "high": high}


def gap_interval(value: float, replicates: np.ndarray, luck: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The interval of what noise alone makes larger, such as the calibration error; it holds the value.

    Drawing anew adds noise to the gap of every bin, so that most resamples have more of it than the images themselves,
    which have more than the truth. So only the upper end is that of the percentile interval; the lower one takes off
    what luck may have added, and is 0 where that may be all.

    Args:
      replicates, luck: the value and the most that luck may have added, in each resample, such as of `gaps`.
    """
    _, high = bootstrap_interval(replicates, level)
    return max(value - bootstrap_interval(luck, level)[1], 0.0), max(value, high)


def gaps(differences, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the sum over bins of |gap|, the most that luck may have added to it) under weights [N, R]: [R] each.

    Luck moves the gap of a bin as resamples move it from that of the images, and where these have seen too little, as
    of what seldom happens, as far as it would if the predictions were right. What is far from 0 it may raise or lower;
    what is within sqrt(ln N) standard deviations counts as 0 (as Andrews & Soares 2010 select moments, section 4.2),
    from where luck only raises.

    Args:
      differences: sparse [bins, N], what happened less what was predicted of each image, in its bin.
    """
    count = differences.shape[1]
    own, sizes, squares = (
        np.asarray(each.sum(axis=1), np.float64)[:, None] for each in (differences, abs(differences), differences**2)
    )
    of_resamples = np.sqrt(np.maximum(squares - own**2 / count, 0))
    # Of a prediction p the difference is -p or 1 - p, whose variance p (1 - p) its size says, whichever it was.
    deviation = np.maximum(of_resamples, np.sqrt(np.maximum(sizes - squares, 0)))
    drawn = differences @ weights
    moved = drawn - own
    raised = np.abs(moved) * np.divide(deviation, of_resamples, out=np.ones_like(own), where=of_resamples > 0)
    luck = np.where(np.abs(own) > np.sqrt(np.log(count)) * deviation, np.sign(own) * moved, raised)
    return np.abs(drawn).sum(axis=0), luck.sum(axis=0)


def weighted_metrics(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of the table where image i counts weights[i, r] times, in each of R ways: name -> float64 [R].

    Args:
      labels: int [N]; probabilities: float32 [N, K]; weights: whole numbers, float32 [N, R].
    """
    num_classes = probabilities.shape[1]
    total = weights.sum(axis=0, dtype=np.float64)
    statistics = _linear_statistics(labels, probabilities)
    sums = statistics @ weights
    correct, top5, loss = sums[:3] / total
    ece, ece_luck = gaps(statistics[3 : 3 + BINS], weights)
    support, guesses, hits = sums[3 + BINS :].reshape(3, num_classes, -1)
    occurs = support > 0
    recall, precision = hits / np.maximum(support, 1), hits / np.maximum(guesses, 1)
    false_positive_rate = (guesses - hits) / np.maximum(total - support, 1)
    ranked = occurs & (support < total)
    return {
        "accuracy": correct,
        "top5_accuracy": top5,
        "f1_macro": _macro(2 * hits / np.maximum(guesses + support, 1), occurs),
        "auc_ovr_macro": _macro(_aucs(labels, probabilities, weights), ranked, otherwise=0.5),
        "ece": ece / total,
        "ece_luck": ece_luck / total,
        "loss": loss,
        "precision_macro": _macro(precision, occurs),
        "recall_macro": _macro(recall, occurs),
        "auc_ovr_macro_hard": _macro((recall + 1 - false_positive_rate) / 2, ranked, otherwise=0.5),
    }


def _macro(values: np.ndarray, which: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    """The mean over the classes of `which`, both [K, R] -> [R]."""
    count = which.sum(axis=0)
    return np.where(count, np.where(which, values, 0).sum(axis=0) / np.maximum(count, 1), otherwise)


def _linear_statistics(labels: np.ndarray, probabilities: np.ndarray):
    """What is a sum over images, float64 [3 + BINS + 3 K, N], sparse.

    Rows: right, right among five guesses, loss; by bin of confidence, right less confidence; by class, images, guesses
    and hits.
    """
    from scipy.sparse import csr_array, vstack

    count, num_classes = probabilities.shape
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1).astype(np.float64)
    right, every = predicted == labels, np.arange(count)
    top5 = ranks_of_true_class(labels, probabilities) < 5

    def by(group: np.ndarray, groups: int, values: np.ndarray):
        return csr_array((values.astype(np.float64), (group, every)), shape=(groups, count))

    plain = [by(0 * every, 1, values) for values in (right, top5, negative_log_likelihood(labels, probabilities))]
    classes = [(labels, np.ones(count)), (predicted, np.ones(count)), (labels, right)]
    return vstack(
        [*plain, by(bins_of(confidence), BINS, right - confidence), *(by(k, num_classes, x) for k, x in classes)],
        format="csr",
    )


def _aucs(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The area of each class against the rest, [K, R]; 0 where a class or its rest is absent."""
    aucs = np.zeros((probabilities.shape[1], weights.shape[1]))
    for k in np.unique(labels):
        aucs[k] = _auc(np.ascontiguousarray(probabilities[:, k]), labels == k, weights)
    return aucs


def _auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of pairs of a positive and a negative in which the positive has the higher score; a tie is half: [R].

    Only a negative's place among the positives counts: the scores of positives are the edges of a histogram.
    """
    from scipy.sparse import csr_array

    edges = np.unique(scores[positive])
    # 2 i between the edges i - 1 and i, 2 i + 1 on edge i.
    place = np.searchsorted(edges, scores, "left") + np.searchsorted(edges, scores, "right")
    one, count, places = np.float32(1), len(scores), 2 * len(edges) + 1

    def histogram(which: np.ndarray) -> np.ndarray:
        entries = (np.full(len(which), one), (place[which], which))
        return (csr_array(entries, shape=(places, count)) @ weights).astype(np.float64)

    negatives, positives = histogram(np.flatnonzero(~positive)), histogram(np.flatnonzero(positive))[1::2]
    behind = np.cumsum(negatives, axis=0)[1::2] - negatives[1::2] / 2
    wins = np.einsum("er,er->r", positives, behind)
    pairs = positives.sum(axis=0) * negatives.sum(axis=0)
    return wins / np.maximum(pairs, 1)
