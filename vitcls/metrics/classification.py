"""All that a report says of predictions, on the host."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls.core.errors import RunError
from vitcls.metrics.table import Evidence, summarize


def classification_report(evidence: Evidence, class_names: Sequence[str]) -> dict[str, Any]:
    """Every metric that there is and the scores of each class; None for a number that is not finite.

    Macro averages are over the classes that occur; a class that is never predicted has precision 0. Where all labels
    are of one class no AUC is defined, and the two averages are 0.5, as for chance.

    Args:
      evidence: with labels and probabilities.
      class_names: [K].

    Returns:
      num_examples, the metrics by their names, and per_class: rows of class, name, num_examples, precision, recall, f1,
      auc and most_confused_with; in a row, None for what is not defined.

    Raises RunError for a probability that is not finite.
    """
    if not np.isfinite(evidence.probabilities.sum(axis=1)).all():
        raise RunError("the model gives probabilities that are not finite; evaluate an earlier checkpoint")
    scores = summarize(evidence, evidence.metrics)
    return {
        "num_examples": len(evidence.labels),
        **{name: value if math.isfinite(value) else None for name, value in scores.items()},
        "per_class": _per_class(evidence, class_names),
    }


def _per_class(evidence: Evidence, class_names: Sequence[str]) -> list[dict[str, Any]]:
    wrong = evidence.confusion - np.diag(np.diag(evidence.confusion))
    aucs = np.full(len(class_names), np.nan) if evidence.roc is None else evidence.roc.aucs

    def row(k: int, name: str) -> dict[str, Any]:
        scores = {"precision": evidence.precision[k], "recall": evidence.recall[k], "f1": evidence.f1[k]}
        return {
            "class": k,
            "name": name,
            "num_examples": int(evidence.support[k]),
            **{key: float(score) if evidence.support[k] else None for key, score in scores.items()},
            "auc": float(aucs[k]) if np.isfinite(aucs[k]) else None,
            "most_confused_with": class_names[int(wrong[k].argmax())] if wrong[k].any() else None,
        }

    return [row(k, name) for k, name in enumerate(class_names)]


def confusion_of(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How many examples of each true class (rows) were taken for each class, int64 [K, K]."""
    confusion = np.zeros((probabilities.shape[1],) * 2, np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
    return confusion


def evidence_of(labels: np.ndarray, probabilities: np.ndarray) -> Evidence:
    """What predictions alone say, labels int [N] and probabilities float32 [N, K] whose rows sum to 1."""
    ranks = ranks_of_true_class(labels, probabilities)
    sums = {
        "loss": negative_log_likelihood(labels, probabilities).sum(),
        "correct": np.sum(ranks == 0),
        "correct_top5": np.sum(ranks < 5),
        "count": len(labels),
        "confusion": confusion_of(labels, probabilities),
    }
    return Evidence(sums, labels, probabilities)


def negative_log_likelihood(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """-log p of the true class, nats [N]; p is at least float32's epsilon (16 nats), as in scikit-learn's log_loss."""
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return -np.log(np.clip(true.astype(np.float64), np.finfo(np.float32).eps, 1.0))


def ranks_of_true_class(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, [N]; of equals the lower class comes first."""
    classes = np.arange(probabilities.shape[1])[None, :]
    ranks = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), 1024):  # by rows, since the comparisons take as much memory as the predictions
        rows = slice(start, start + 1024)
        true_class, scores = labels[rows, None], probabilities[rows]
        true = np.take_along_axis(scores, true_class, axis=1)
        ranks[rows] = np.sum((scores > true) | ((scores == true) & (classes < true_class)), axis=1)
    return ranks
