"""How honest probabilities are, in six numbers with intervals."""

import numpy as np

from vitcls.metrics.calibration import BINS, bins_of
from vitcls.metrics.classification import negative_log_likelihood
from vitcls.metrics.resampling import RESAMPLES, bootstrap_interval, draw_weights, gap_interval, gaps

MEANINGS = {
    "loss": "negative log-likelihood, nats",
    "brier": "mean squared distance to the truth, 0 to 2 (Brier 1950)",
    "ece": f"mean gap of confidence and accuracy in {BINS} bins of equal width",
    "ece_equal_mass": f"the same in {BINS} bins with as many images each",
    "ece_classwise": f"mean over classes of the gap of p and frequency, {BINS} bins of equal width (Kull et al. 2019)",
    "aurc": "mean share of wrong answers over coverages (Geifman et al. 2019)",
}
_COLUMNS = 50  # of resamples, that are summed up at a time


def calibration_scores(
    labels: np.ndarray, probabilities: np.ndarray, resamples: int = RESAMPLES
) -> dict[str, dict[str, float | None]]:
    """name -> value, low and high, of the 95 % bootstrap interval, for labels int [N] and probabilities [N, K].

    A single image has no interval: low and high are None.
    """
    values = weighted_scores(labels, probabilities, np.ones((len(labels), 1), np.float32))
    parts = [weighted_scores(labels, probabilities, weights) for weights in draw_weights(len(labels), resamples, 0)]
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in values}
    scores = {}
    for name in MEANINGS:
        value = float(values[name][0])
        if f"{name}_luck" in values:
            low, high = gap_interval(value, drawn[name], drawn[f"{name}_luck"])
        else:
            low, high = bootstrap_interval(drawn[name])
        scores[name] = {"value": value} | (
            {"low": low, "high": high} if len(labels) > 1 else {"low": None, "high": None}
        )
    return scores


def weighted_scores(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The scores where image i counts weights[i, r] times, float32 [N, R]: name -> float64 [R].

    And NAME_luck of those that are gaps, which `gap_interval` takes.
    """
    total = weights.sum(axis=0, dtype=np.float64)
    p = probabilities.astype(np.float64)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    brier = (p**2).sum(axis=1) - 2 * p[np.arange(len(labels)), labels] + 1
    by_mass = np.argsort(np.argsort(confidence, kind="stable"), kind="stable") * BINS // len(labels)
    found = {
        "loss": negative_log_likelihood(labels, probabilities) @ weights / total,
        "brier": brier @ weights / total,
        "aurc": _area(confidence, right, weights),
    }
    gaps_of = {
        "ece": calibration_gaps(confidence, right, weights),
        "ece_equal_mass": calibration_gaps(confidence, right, weights, by_mass),
        "ece_classwise": np.mean([calibration_gaps(p[:, k], labels == k, weights) for k in range(p.shape[1])], axis=0),
    }
    for name, (value, luck) in gaps_of.items():
        found |= {name: value / total, f"{name}_luck": luck / total}
    return found


def calibration_gaps(
    predicted: np.ndarray, happened: np.ndarray, weights: np.ndarray, bins: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`resampling.gaps` by bins of `predicted` [N], by default those of equal width."""
    from scipy.sparse import csr_array

    bins = bins_of(predicted) if bins is None else bins
    differences = csr_array((happened - predicted, (bins, np.arange(len(bins)))), shape=(BINS, len(bins)))
    return gaps(differences, weights)


def _area(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean share of wrong answers over the coverages, [R]."""
    order = np.argsort(-confidence, kind="stable")
    wrong = ~right[order, None]
    areas = []
    for start in range(0, weights.shape[1], _COLUMNS):
        counts = weights[order, start : start + _COLUMNS].astype(np.float64)
        answered = np.cumsum(counts, axis=0)
        risk = np.cumsum(counts * wrong, axis=0) / np.maximum(answered, 1)
        areas.append(np.sum(counts * risk, axis=0) / answered[-1])
    return np.concatenate(areas)
