"""Which labels are probably wrong: confident learning (Northcutt, Jiang & Chuang 2021, section 3)."""

from typing import NamedTuple

import numpy as np


class LabelErrors(NamedTuple):
    """The labels that are doubted, the surest errors first."""

    indices: np.ndarray  # int64 [E]
    suggested: np.ndarray  # int32 [E], the class that the images rather are of
    joint: np.ndarray  # int64 [K, K]: how many images with label i seem to be of class j


def confident_learning(labels: np.ndarray, probabilities: np.ndarray) -> LabelErrors:
    """Prunes by noise rate: of the images with label i, those that are most like j, as many as seem to be of class j.

    Args:
      labels: int [N], as given; probabilities: float [N, K], of a classifier that has not seen the image itself.
    """
    joint = _calibrated(confident_joint(labels, probabilities), labels)
    own = probabilities[np.arange(len(labels)), labels]
    suggested, margin = np.full(len(labels), -1), np.zeros(len(labels))
    for i, j in zip(*np.nonzero(joint), strict=True):
        if i == j:
            continue
        rows = np.flatnonzero(labels == i)
        less = own[rows] - probabilities[rows, j]
        chosen = np.argsort(less, kind="stable")[: joint[i, j]]
        chosen = chosen[less[chosen] < 0]
        better = (suggested[rows[chosen]] < 0) | (less[chosen] < margin[rows[chosen]])
        rows, less = rows[chosen][better], less[chosen][better]
        suggested[rows], margin[rows] = j, less
    doubted = np.flatnonzero(suggested >= 0)
    doubted = doubted[np.argsort(margin[doubted], kind="stable")]
    return LabelErrors(doubted, suggested[doubted].astype(np.int32), joint)


def confident_joint(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How many images with label i are surely of class j, int64 [K, K] (equations 1 and 2).

    Surely means that their probability of j reaches the mean that the images labelled j have of it; of several such
    classes the most probable one counts.
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    counts = np.bincount(labels, minlength=num_classes)
    thresholds = np.bincount(labels, weights=own, minlength=num_classes) / np.maximum(counts, 1)
    sure = (probabilities >= thresholds - 1e-6) & (counts > 0)
    counted = sure.any(axis=1)
    joint = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(joint, (labels[counted], np.where(sure, probabilities, -1).argmax(axis=1)[counted]), 1)
    return joint


def _calibrated(joint: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The joint with as many images of each label as there are (equation 3), in whole numbers."""
    counts = np.bincount(labels, minlength=len(joint))
    known = joint.sum(axis=1)
    return np.rint(joint * (counts / np.maximum(known, 1))[:, None]).astype(np.int64)
