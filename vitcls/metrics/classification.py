"""All that a report says of predictions, on the host, through scikit-learn where it has it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls.core.errors import RunError, UserError
from vitcls.metrics.calibration import expected_calibration_error
from vitcls.metrics.roc import RocCurves, mean_auc


def classification_report(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], roc: "RocCurves | None"
) -> dict[str, Any]:
    """All host-side metrics of predictions, through scikit-learn where it has them; every number is finite.

    Macro averages are over the classes that occur in `labels`; a class that is never predicted has precision 0. Where
    all labels are of one class no AUC is defined, and the two averages are 0.5, as for chance.

    Args:
      labels: int [N].
      probabilities: float32 [N, K], rows sum to 1.
      class_names: [K].
      roc: what `roc_curves` makes of the same predictions.

    Returns:
      num_examples, loss (nats), and as fractions accuracy, top5_accuracy, precision_macro, recall_macro, f1_macro,
      auc_ovr_macro, auc_ovr_macro_hard (the AUC of one-hot predictions), ece, and per_class: rows of class, name,
      num_examples, precision, recall, f1, auc and most_confused_with; in a row, None for what is not defined.

    Raises:
      UserError: where there is no example.
      RunError: for a probability that is not finite.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    if not len(labels):
        raise UserError("there is no example to evaluate: the split is empty; give a split that has some")
    if not np.isfinite(probabilities.sum(axis=1)).all():
        raise RunError("the model gives probabilities that are not finite; evaluate an earlier checkpoint")
    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, labels=np.arange(num_classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(num_classes), average=None, zero_division=0.0
    )
    present = support > 0
    auc = np.full(num_classes, np.nan) if roc is None else roc.aucs
    wrong = confusion - np.diag(np.diag(confusion))

    def defined(value: float, where: bool = True) -> float | None:
        return float(value) if where and np.isfinite(value) else None

    return {
        "num_examples": len(labels),
        "loss": float(negative_log_likelihood(labels, probabilities).mean()),
        "accuracy": float(np.mean(predicted == labels)),
        "top5_accuracy": float(np.mean(_ranks(labels, probabilities) < 5)),
        "precision_macro": float(precision[present].mean()),
        "recall_macro": float(recall[present].mean()),
        "f1_macro": float(f1[present].mean()),
        "auc_ovr_macro": mean_auc(auc),
        "auc_ovr_macro_hard": mean_auc(_hard_aucs(confusion)),
        "ece": expected_calibration_error(labels, probabilities),
        "per_class": [
            {
                "class": k,
                "name": class_names[k],
                "num_examples": int(support[k]),
                "precision": defined(precision[k], present[k]),
                "recall": defined(recall[k], present[k]),
                "f1": defined(f1[k], present[k]),
                "auc": defined(auc[k]),
                "most_confused_with": class_names[int(wrong[k].argmax())] if wrong[k].any() else None,
            }
            for k in range(num_classes)
        ],
    }


def negative_log_likelihood(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """-log p of the true class, nats [N]; p is at least float32's epsilon (16 nats), as in scikit-learn's log_loss."""
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return -np.log(np.clip(true.astype(np.float64), np.finfo(np.float32).eps, 1.0))


def _hard_aucs(confusion: np.ndarray) -> np.ndarray:
    """AUC of one-hot predictions against the rest, [K]: their curve has one corner, so (recall + specificity) / 2."""
    hits, support, guesses = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    rest = confusion.sum() - support
    aucs = (hits / np.maximum(support, 1) + 1 - (guesses - hits) / np.maximum(rest, 1)) / 2
    return np.where((support > 0) & (rest > 0), aucs, np.nan)


def _ranks(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, [N]; of equals the lower class comes first."""
    classes = np.arange(probabilities.shape[1])[None, :]
    ranks = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), 1024):  # by rows, since the comparisons take as much memory as the predictions
        rows = slice(start, start + 1024)
        true_class, scores = labels[rows, None], probabilities[rows]
        true = np.take_along_axis(scores, true_class, axis=1)
        ranks[rows] = np.sum((scores > true) | ((scores == true) & (classes < true_class)), axis=1)
    return ranks
