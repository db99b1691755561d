"""Metrics: sums on the device under a mask, and what scikit-learn makes of predictions on the host."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.errors import RunError, UserError

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
    macro = Curve(np.append(0.0, grid), np.append(0.0, mean), _mean_auc(aucs))
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


def _mean_auc(aucs: np.ndarray) -> float:
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else 0.5
