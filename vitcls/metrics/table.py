"""The table of metrics: what each is called, measured in, and computed from; everything that shows a metric reads it.

A new metric is one entry. It then appears in metrics.json and on the report page, and `config.checkpoint.metric`,
`early_stopping.metric` and `schedule.metric` can name it as 'eval/NAME'.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vitcls.core.errors import UserError
from vitcls.metrics.calibration import BINS, expected_calibration_error
from vitcls.metrics.roc import RocCurves, mean_auc, roc_curves


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of an evaluation, on the host; raises UserError where no example was evaluated."""

    sums: Mapping[str, np.ndarray]  # metrics.evaluation_sums
    labels: np.ndarray | None = None  # int [N]; with the predictions, for the metrics that need them
    probabilities: np.ndarray | None = None  # float32 [N, K]

    def __post_init__(self):
        if not self.count:
            raise UserError("there is no example to evaluate: the split is empty; give a split that has some")

    @property
    def count(self) -> float:
        return float(self.sums["count"])

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """int [K, K]; rows are true classes, columns predictions."""
        return np.asarray(self.sums["confusion"], np.int64)

    @functools.cached_property
    def support(self) -> np.ndarray:
        """Examples of each class, [K]."""
        return self.confusion.sum(axis=1)

    @functools.cached_property
    def precision(self) -> np.ndarray:
        """Of each class, [K]; 0 where it is never predicted."""
        return np.diag(self.confusion) / np.maximum(self.confusion.sum(axis=0), 1)

    @functools.cached_property
    def recall(self) -> np.ndarray:
        """Of each class, [K]; 0 where it does not occur."""
        return np.diag(self.confusion) / np.maximum(self.support, 1)

    @functools.cached_property
    def f1(self) -> np.ndarray:
        """Of each class, [K]: the harmonic mean of precision and recall, 0 where both are."""
        both = self.confusion.sum(axis=0) + self.support
        return 2 * np.diag(self.confusion) / np.maximum(both, 1)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that these sums allow: all but those of another task."""
        return metrics_of(self.sums)

    @functools.cached_property
    def roc(self) -> RocCurves | None:
        return roc_curves(self.labels, self.probabilities)

    def mean(self, name: str) -> float:
        """sums[name] / count."""
        return float(self.sums[name]) / self.count

    def macro(self, values: np.ndarray) -> float:
        """The mean over the classes that occur."""
        return float(values[self.support > 0].mean())


class Metric(NamedTuple):
    """One number that describes a classifier."""

    name: str  # key of metrics.json
    unit: str
    label: str  # on the page
    format: str
    higher_is_better: bool
    compute: Callable[[Evidence], float]
    meaning: str = ""  # in a few words, for the head of the page; without them it stands among the details
    headline: str = ""  # its name in the last line of a command; empty: not there
    needs_predictions: bool = False  # more than the sums
    task_sum: str = ""  # which of Task.eval_sums it is of; without it, every evaluation has it

    def show(self, value: float | None) -> str:
        """The value in words; None is not defined."""
        return "–" if value is None else self.format.format(value)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "accuracy",
            "fraction",
            "Accuracy",
            "{:.2%}",
            True,
            lambda evidence: evidence.mean("correct"),
            "of the images, first guess right",
            "accuracy",
        ),
        Metric(
            "top5_accuracy",
            "fraction",
            "Top-5 accuracy",
            "{:.2%}",
            True,
            lambda evidence: evidence.mean("correct_top5"),
            "of the images, true class among five guesses",
            "top-5",
        ),
        Metric(
            "f1_macro",
            "fraction",
            "F1, macro",
            "{:.4f}",
            True,
            lambda evidence: evidence.macro(evidence.f1),
            "mean over classes, 0 to 1",
            "macro F1",
        ),
        Metric(
            "auc_ovr_macro",
            "fraction (from probabilities)",
            "AUC, macro",
            "{:.4f}",
            True,
            lambda evidence: 0.5 if evidence.roc is None else mean_auc(evidence.roc.aucs),
            "one class against the rest, 0.5 is chance",
            "AUC",
            needs_predictions=True,
        ),
        Metric(
            "ece",
            f"fraction ({BINS} equal-width bins)",
            "Calibration error",
            "{:.2%}",
            False,
            lambda evidence: expected_calibration_error(evidence.labels, evidence.probabilities),
            "mean gap of confidence and accuracy",
            "ECE",
            needs_predictions=True,
        ),
        Metric(
            "loss",
            "nats (cross-entropy)",
            "Loss",
            "{:.4f}",
            False,
            lambda evidence: evidence.mean("loss"),
            "nats per image, cross-entropy",
            "loss",
        ),
        Metric(
            "precision_macro",
            "fraction",
            "Precision, macro",
            "{:.4f}",
            True,
            lambda evidence: evidence.macro(evidence.precision),
        ),
        Metric(
            "recall_macro",
            "fraction",
            "Recall, macro",
            "{:.4f}",
            True,
            lambda evidence: evidence.macro(evidence.recall),
        ),
        Metric(
            "auc_ovr_macro_hard",
            "fraction (from one-hot predictions)",
            "AUC of one-hot predictions, macro",
            "{:.4f}",
            True,
            lambda evidence: mean_auc(_hard_aucs(evidence.confusion)),
        ),
        Metric(
            "neighbor_similarity",
            "cosine",
            "Similarity to the neighbours that vote",  # 1 where all features have collapsed into one
            "{:.4f}",
            True,
            lambda evidence: evidence.mean("neighbor_similarity"),
            task_sum="neighbor_similarity",
        ),
    )
}


def add(metric: Metric) -> None:
    """Adds a metric from elsewhere; raises ValueError where its name is taken."""
    if metric.name in METRICS:
        raise ValueError(f"there is a metric '{metric.name}' already")
    METRICS[metric.name] = metric


ALWAYS_LOGGED = ("loss", "accuracy", "top5_accuracy")  # as eval/NAME


def metrics_of(sums: Container[str]) -> list[str]:
    """The names of the metrics of an evaluation in which a task gives these sums."""
    return [name for name, metric in METRICS.items() if not metric.task_sum or metric.task_sum in sums]


def metric_of(key: str) -> Metric:
    """The metric of an 'eval/NAME' (or a NAME)."""
    return METRICS[key.removeprefix("eval/")]


def higher_is_better(key: str) -> bool:
    """Whether more of 'eval/NAME' is better."""
    return metric_of(key).higher_is_better


def summarize(evidence: Evidence, names: Iterable[str] = ALWAYS_LOGGED) -> dict[str, float]:
    """The metrics of these names."""
    return {name: METRICS[name].compute(evidence) for name in names}


def _hard_aucs(confusion: np.ndarray) -> np.ndarray:
    """AUC of one-hot predictions against the rest, [K]: their curve has one corner, so (recall + specificity) / 2."""
    hits, support, guesses = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    rest = confusion.sum() - support
    aucs = (hits / np.maximum(support, 1) + 1 - (guesses - hits) / np.maximum(rest, 1)) / 2
    return np.where((support > 0) & (rest > 0), aucs, np.nan)
