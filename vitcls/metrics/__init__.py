"""Metrics of a classifier: sums on the devices, and what is made of predictions on the host."""

from vitcls.metrics.calibration import Reliability, expected_calibration_error, reliability
from vitcls.metrics.classification import classification_report, evidence_of, negative_log_likelihood
from vitcls.metrics.roc import Curve, RocCurves, roc_curves
from vitcls.metrics.sums import Sums, evaluation_sums, merge
from vitcls.metrics.table import METRICS, Evidence, Metric, higher_is_better, metric_of, metrics_of, summarize

__all__ = [
    "METRICS",
    "Curve",
    "Evidence",
    "Metric",
    "Reliability",
    "RocCurves",
    "Sums",
    "classification_report",
    "evaluation_sums",
    "evidence_of",
    "expected_calibration_error",
    "higher_is_better",
    "merge",
    "metric_of",
    "metrics_of",
    "negative_log_likelihood",
    "reliability",
    "roc_curves",
    "summarize",
]
