"""How far confidence can be trusted: reliability and the expected calibration error (Guo et al. 2017)."""

from typing import NamedTuple

import numpy as np

BINS = 15  # of the expected calibration error (Guo et al. 2017)


class Reliability(NamedTuple):
    """Of each bin of confidence, [bins]: mean confidence and accuracy in [0, 1] (0 where empty), examples."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Confidence and accuracy by bins of equal width, (i / bins, (i + 1) / bins] (Guo et al. 2017, section 2)."""
    confidence, predicted = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1)
    which = bins_of(confidence, bins)
    count = np.bincount(which, minlength=bins)
    safe = np.maximum(count, 1)
    return Reliability(
        confidence=np.bincount(which, confidence, bins) / safe,
        accuracy=np.bincount(which, predicted == labels, bins) / safe,
        count=count,
    )


def bins_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each confidence, float64 [N] in [0, 1]: int [N]."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """sum over bins of count / N * |accuracy - confidence| (Guo et al. 2017, equation 3)."""
    confidence, accuracy, count = reliability(labels, probabilities, bins)
    return float(np.sum(count / count.sum() * np.abs(accuracy - confidence)))
