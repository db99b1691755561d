"""Metrics: sums on the device under a mask, and what scikit-learn makes of predictions on the host."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BINS = 15  # of the expected calibration error (Guo et al. 2017)
Sums = dict[str, jax.Array]


def evaluation_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Sums over a batch; an example with mask 0 is nowhere in them.

    Args:
      logits: [B, K]; labels: int32 [B]; mask: float32 [B], 0 or 1.
    Returns:
      float32 scalars loss (cross-entropy, without smoothing), correct, correct_top5 and count, and confusion int32
      [K, K] (rows: true class, columns: predicted).
    """
    num_classes = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    true_log_p = jnp.take_along_axis(log_p, labels[:, None], axis=-1)
    # The rank of the true class; of equal logits the lower class comes first, as with argmax.
    classes = jnp.arange(num_classes)[None, :]
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    rank = jnp.sum((logits > true_logit) | ((logits == true_logit) & (classes < labels[:, None])), axis=-1)
    predicted = jnp.argmax(logits, axis=-1)
    kept = mask > 0
    confusion = jnp.zeros((num_classes, num_classes), jnp.int32).at[labels, predicted].add(kept.astype(jnp.int32))
    return {
        "loss": jnp.sum(jnp.where(kept, -true_log_p[:, 0], 0.0)),
        "correct": jnp.sum(mask * (rank == 0)),
        "correct_top5": jnp.sum(mask * (rank < 5)),
        "count": jnp.sum(mask),
        "confusion": confusion,
    }


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over both."""
    return jax.tree.map(jnp.add, a, b)


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Loss, accuracy and top-5 accuracy from sums on the host; raises ValueError where nothing was counted."""
    count = float(sums["count"])
    if not count:
        raise ValueError("there is no example to evaluate: every one of them is masked")
    return {
        "loss": float(sums["loss"]) / count,
        "accuracy": float(sums["correct"]) / count,
        "top5_accuracy": float(sums["correct_top5"]) / count,
    }


def classification_report(
    labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """All host-side metrics of predictions, through scikit-learn where it has them; every number is finite.

    Macro averages are over the classes that occur in `labels`; the AUC of a class needs examples of other classes too.

    Args:
      labels: int [N]; probabilities: float32 [N, K], rows sum to 1.
    Returns:
      num_examples, accuracy, top5_accuracy, precision_macro, recall_macro, f1_macro, auc_ovr_macro,
      auc_ovr_macro_hard (the AUC of one-hot predictions), ece, and per_class: rows of class, name, num_examples,
      precision, recall, f1, auc (None where undefined) and most_confused_with.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    present = np.flatnonzero(np.bincount(labels, minlength=num_classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(num_classes), average=None, zero_division=0.0
    )
    auc = class_aucs(labels, probabilities)
    hard_auc = class_aucs(labels, np.eye(num_classes, dtype=np.float32)[predicted])
    confusion = confusion_matrix(labels, predicted, labels=np.arange(num_classes))
    wrong = confusion - np.diag(np.diag(confusion))
    return {
        "num_examples": len(labels),
        "accuracy": float(np.mean(predicted == labels)),
        "top5_accuracy": float(np.mean(_ranks(labels, probabilities) < 5)),
        "precision_macro": float(precision[present].mean()),
        "recall_macro": float(recall[present].mean()),
        "f1_macro": float(f1[present].mean()),
        "auc_ovr_macro": _mean_defined(auc),
        "auc_ovr_macro_hard": _mean_defined(hard_auc),
        "ece": expected_calibration_error(labels, probabilities),
        "per_class": [
            {
                "class": k,
                "name": class_names[k],
                "num_examples": int(support[k]),
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "auc": None if np.isnan(auc[k]) else float(auc[k]),
                "most_confused_with": class_names[int(wrong[k].argmax())] if wrong[k].any() else None,
            }
            for k in range(num_classes)
        ],
    }


def class_aucs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every class against the rest, [K]; NaN where a class or its rest is absent."""
    from sklearn.metrics import roc_auc_score

    counts = np.bincount(labels, minlength=scores.shape[1])
    defined = (counts > 0) & (counts < len(labels))
    aucs = np.full(scores.shape[1], np.nan)
    for k in np.flatnonzero(defined):
        aucs[k] = roc_auc_score(labels == k, scores[:, k])
    return aucs


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean confidence, accuracy, count) of each of `bins` equal ranges of confidence; 0 where a range is empty."""
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # ranges are open on the left
    count = np.bincount(which, minlength=bins)
    safe = np.maximum(count, 1)
    mean_confidence = np.bincount(which, confidence, bins) / safe
    accuracy = np.bincount(which, predicted == labels, bins) / safe
    return mean_confidence, accuracy, count


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """sum over bins of count / N * |accuracy - confidence| (Guo et al. 2017, equation 3)."""
    confidence, accuracy, count = reliability(labels, probabilities, bins)
    return float(np.sum(count / count.sum() * np.abs(accuracy - confidence)))


def _ranks(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, [N]; of equals the lower class comes first."""
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)
    before = np.arange(probabilities.shape[1])[None, :] < labels[:, None]
    return np.sum((probabilities > true) | ((probabilities == true) & before), axis=1)


def _mean_defined(values: np.ndarray) -> float:
    """The mean of what is not NaN; 0.5, the AUC of chance, where nothing is defined."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.5
