"""Metrics of a classifier: sums on the devices, and what is made of predictions on the host."""

from vitcls.metrics.calibration import Reliability, expected_calibration_error, reliability
from vitcls.metrics.classification import classification_report, negative_log_likelihood
from vitcls.metrics.roc import Curve, RocCurves, roc_curves
from vitcls.metrics.sums import Sums, evaluation_sums, merge, summarize

__all__ = [
    "Curve",
    "Reliability",
    "RocCurves",
    "Sums",
    "classification_report",
    "evaluation_sums",
    "expected_calibration_error",
    "merge",
    "negative_log_likelihood",
    "reliability",
    "roc_curves",
    "summarize",
]
