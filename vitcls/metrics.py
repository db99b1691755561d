"""Metrics: sums on the device under a mask, and what scikit-learn makes of predictions on the host."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.errors import RunError, UserError

BINS = 15  # of the expected calibration error (Guo et al. 2017)
Sums = dict[str, jax.Array]


def evaluation_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Sums over a batch; an example with mask 0 is nowhere in them, whatever its logits and label.

    The first of equal logits is the prediction. A logit that is not a number ranks above all, so that a model which
    has diverged gets nothing right.

    Args:
      logits: [B, K].
      labels: int32 [B].
      mask: float32 [B], 0 or 1.

    Returns:
      float32 scalars loss, correct, correct_top5 (of the top min(5, K)) and count, and confusion int32 [K, K]
      (rows: true class, columns: predicted).
    """
    num_classes = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    kept = mask > 0
    log_p = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]  # cross-entropy, without smoothing
    # The number of classes ahead of the true one says all that a sort of the logits would.
    classes = jnp.arange(num_classes)[None, :]
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    behind = (logits < true_logit) | ((logits == true_logit) & (classes >= labels[:, None]))
    rank = jnp.sum(~behind, axis=-1)  # [B, K] -> [B]
    predicted = jnp.argmax(logits, axis=-1)
    return {
        "loss": jnp.sum(jnp.where(kept, mask * losses, 0.0)),
        "correct": jnp.sum(mask * (rank == 0)),
        "correct_top5": jnp.sum(mask * (rank < 5)),
        "count": jnp.sum(mask),
        "confusion": jnp.zeros((num_classes, num_classes), jnp.int32).at[labels, predicted].add(kept.astype(jnp.int32)),
    }


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over both."""
    return jax.tree.map(jnp.add, a, b)


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Loss, accuracy and top-5 accuracy from sums on the host; raises UserError where nothing was counted."""
    count = float(sums["count"])
    if not count:
        raise UserError("there is no example to evaluate: every one is masked; give a split that has some")
    return {
        "loss": float(sums["loss"]) / count,
        "accuracy": float(sums["correct"]) / count,
        "top5_accuracy": float(sums["correct_top5"]) / count,
    }


def classification_report(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All host-side metrics of predictions, through scikit-learn where it has them; every number is finite.

    Macro averages are over the classes that occur in `labels`; a class that is never predicted has precision 0. Where
    all labels are of one class no AUC is defined, and the two averages are 0.5, as for chance.

    Args:
      labels: int [N].
      probabilities: float32 [N, K], rows sum to 1.
      class_names: [K].

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
    if not np.isfinite(probabilities).all():
        raise RunError("the model gives probabilities that are not finite; evaluate an earlier checkpoint")
    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, labels=np.arange(num_classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(num_classes), average=None, zero_division=0.0
    )
    present = support > 0
    auc = class_aucs(labels, probabilities)
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
        "auc_ovr_macro": _mean_auc(auc),
        "auc_ovr_macro_hard": _mean_auc(_hard_aucs(confusion)),
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


def class_aucs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every class against the rest, [K]; NaN where a class or its rest is absent."""
    from sklearn.metrics import roc_auc_score

    aucs = np.full(scores.shape[1], np.nan)
    for k in _separable(labels, scores.shape[1]):
        aucs[k] = roc_auc_score(labels == k, scores[:, k])
    return aucs


class Curve(NamedTuple):
    """An ROC curve: false and true positive rates in [0, 1], both [points], and the area under it."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    auc: float


class RocCurves(NamedTuple):
    """One class against the rest: all decisions pooled, the mean over classes, and the classes with the least area."""

    micro: Curve
    macro: Curve
    worst: dict[int, Curve]


def roc_curves(labels: np.ndarray, probabilities: np.ndarray, worst: int = 5) -> RocCurves | None:
    """ROC curves of labels int [N] and probabilities [N, K]; None where all labels are of one class.

    The macro curve is the vertical average of the classes' curves; its area is given as the mean of theirs.
    """
    from sklearn.metrics import roc_curve

    def curve(positive: np.ndarray, scores: np.ndarray) -> Curve:
        x, y, _ = roc_curve(positive, scores)
        return Curve(x, y, float(np.trapezoid(y, x)))

    num_classes = probabilities.shape[1]
    classes = {int(k): curve(labels == k, probabilities[:, k]) for k in _separable(labels, num_classes)}
    if not classes:
        return None
    micro = curve((labels[:, None] == np.arange(num_classes)[None, :]).ravel(), probabilities.ravel())
    grid = np.linspace(0, 1, 1001)
    mean = np.mean([np.interp(grid, x, y) for x, y, _ in classes.values()], axis=0)
    area = float(np.mean([auc for *_, auc in classes.values()]))
    macro = Curve(np.append(0.0, grid), np.append(0.0, mean), area)
    least = sorted(classes, key=lambda k: classes[k].auc)[:worst]
    return RocCurves(micro, macro, {k: classes[k] for k in least})


class Reliability(NamedTuple):
    """Of each bin of confidence, [bins]: mean confidence and accuracy in [0, 1] (0 where empty), examples."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Confidence and accuracy by bins of equal width, (i / bins, (i + 1) / bins] (Guo et al. 2017, section 2)."""
    confidence, predicted = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    safe = np.maximum(count, 1)
    return Reliability(
        confidence=np.bincount(which, confidence, bins) / safe,
        accuracy=np.bincount(which, predicted == labels, bins) / safe,
        count=count,
    )


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """sum over bins of count / N * |accuracy - confidence| (Guo et al. 2017, equation 3)."""
    confidence, accuracy, count = reliability(labels, probabilities, bins)
    return float(np.sum(count / count.sum() * np.abs(accuracy - confidence)))


def _hard_aucs(confusion: np.ndarray) -> np.ndarray:
    """AUC of one-hot predictions against the rest, [K]: their curve has one corner, so (recall + specificity) / 2."""
    hits, support, guesses = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    rest = confusion.sum() - support
    aucs = (hits / np.maximum(support, 1) + 1 - (guesses - hits) / np.maximum(rest, 1)) / 2
    return np.where((support > 0) & (rest > 0), aucs, np.nan)


def _separable(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The classes that have examples, and other classes too: those whose ROC curve is defined."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.flatnonzero((counts > 0) & (counts < len(labels)))


def _ranks(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, [N]; of equals the lower class comes first."""
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)
    before = np.arange(probabilities.shape[1])[None, :] < labels[:, None]
    return np.sum((probabilities > true) | ((probabilities == true) & before), axis=1)


def _mean_auc(aucs: np.ndarray) -> float:
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else 0.5
