"""How honest probabilities are, in five numbers with intervals."""

import numpy as np

from vitcls.metrics.calibration import BINS, bins_of
from vitcls.metrics.classification import negative_log_likelihood
from vitcls.metrics.resampling import RESAMPLES, basic_interval, bootstrap_interval, draw_weights

MEANINGS = {
    "loss": "negative log-likelihood, nats",
    "brier": "mean squared distance to the truth, 0 to 2 (Brier 1950)",
    "ece": f"mean gap of confidence and accuracy in {BINS} bins of equal width",
    "ece_equal_mass": f"the same in {BINS} bins with as many images each",
    "ece_classwise": f"mean over classes of the gap of p and frequency, {BINS} bins of equal width (Kull et al. 2019)",
}
_GAPS = ("ece", "ece_equal_mass", "ece_classwise")  # which resampling makes larger


def calibration_scores(
    labels: np.ndarray, probabilities: np.ndarray, resamples: int = RESAMPLES
) -> dict[str, dict[str, float]]:
    """name -> value, low and high, of the 95 % bootstrap interval, for labels int [N] and probabilities [N, K]."""
    values = weighted_scores(labels, probabilities, np.ones((len(labels), 1), np.float32))
    parts = [weighted_scores(labels, probabilities, weights) for weights in draw_weights(len(labels), resamples, 0)]
    scores = {}
    for name, value in values.items():
        replicates = np.concatenate([part[name] for part in parts])
        low, high = basic_interval(float(value[0]), replicates) if name in _GAPS else bootstrap_interval(replicates)
        scores[name] = {"value": float(value[0]), "low": low, "high": high}
    return scores


def weighted_scores(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The scores where image i counts weights[i, r] times, float32 [N, R]: name -> float64 [R]."""
    total = weights.sum(axis=0, dtype=np.float64)
    p = probabilities.astype(np.float64)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    brier = (p**2).sum(axis=1) - 2 * p[np.arange(len(labels)), labels] + 1
    by_mass = np.argsort(np.argsort(confidence, kind="stable"), kind="stable") * BINS // len(labels)
    classwise = [gap(p[:, k], labels == k, bins_of(p[:, k]), weights) for k in range(p.shape[1])]
    return {
        "loss": negative_log_likelihood(labels, probabilities) @ weights / total,
        "brier": brier @ weights / total,
        "ece": gap(confidence, right, bins_of(confidence), weights) / total,
        "ece_equal_mass": gap(confidence, right, by_mass, weights) / total,
        "ece_classwise": np.mean(classwise, axis=0) / total,
    }


def gap(predicted: np.ndarray, happened: np.ndarray, bins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum over bins of |what happened less what was predicted|, [R]."""
    from scipy.sparse import csr_array

    differences = csr_array((happened - predicted, (bins, np.arange(len(bins)))), shape=(BINS, len(bins)))
    return np.abs(differences @ weights).sum(axis=0)
