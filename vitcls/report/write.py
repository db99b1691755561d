"""Writes a report directory atomically."""

import json
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.core.terminal import printable
from vitcls.metrics import METRICS, RocCurves
from vitcls.report.part import Part

Drawings = dict[str, tuple[str, str, Callable]]  # name of the file -> title, caption and what draws it
UNITS = {  # of what is no metric of the table
    "num_examples": "images",
    "checkpoint_step": "steps",
    "parameters": "parameters",
    "flops_per_image": "FLOPs (2 per multiply-add, forward pass)",
    "corrupted_accuracy": "fraction, by severity 1 to 5",
    "learned_weights": "fractions that sum to 1",
    "latency_ms": "milliseconds (batch of 1, from host to host)",
    "images_per_second": "images/s (inference, all devices)",
    "feature_seconds": "seconds (features of the training and validation images, once)",
    "train_seconds": "seconds (without compilation, evaluation and saving)",
}


def write(
    part: Part,
    *,
    metrics: dict[str, Any],
    labels: np.ndarray,
    probabilities: np.ndarray,
    roc: RocCurves | None,
    class_names: Sequence[str],
    images: Callable[[np.ndarray], np.ndarray],
    history: list[dict[str, Any]] | None,
    facts: dict[str, Any],
    curves: Sequence[str] = ("loss", "accuracy"),
    first: Drawings | None = None,
) -> None:
    """Writes metrics.json, predictions.npz, the plots and index.html; a report that was there is replaced in one move.

    Args:
      metrics: what metrics.json will hold; every number finite or None, its unit in UNITS.
      labels: int [N]; probabilities: float32 [N, K]; roc: what metrics.roc_curves makes of them.
      images: gives uint8 [n, H, W, C] for indices [n] of the split.
      history: the events of metrics.jsonl, None where nothing was trained step by step.
      facts: rows for the page, see `page.render`.
      curves: names of `history` that are drawn, without 'train/' and 'eval/'.
      first: plots before all others.
    """
    from vitcls.report import page, plots

    new = part.new
    units = {name: metric.unit for name, metric in METRICS.items()} | UNITS
    named = {name: unit for name, unit in units.items() if name in metrics}
    text = json.dumps(metrics | {"units": named}, indent=2, allow_nan=False)
    (new / "metrics.json").write_text(text + "\n", encoding="utf-8")
    np.savez(
        new / "predictions.npz",
        labels=np.asarray(labels, np.int32),
        probabilities=np.asarray(probabilities, np.float32),
        ids=np.arange(len(labels), dtype=np.int64),  # places in the split
    )

    shown = []
    drawings = (first or {}) | _training(history, curves)
    drawings |= _drawings(metrics, labels, probabilities, roc, class_names, images)
    for name, (title, caption, draw) in drawings.items():
        figure = plots.styled(draw)
        path = new / f"{name}.png" if figure is not None else None
        if figure is not None:
            figure.savefig(path, dpi=figure.dpi if name in ("confusion_matrix", "class_accuracy") else 150)
        shown.append((title, caption if path or name == "mistakes" else "nothing was logged.", path))
    (new / "index.html").write_text(printable(page.render(metrics, facts, shown)), encoding="utf-8")
    part.replace()


def _training(history: list[dict[str, Any]] | None, curves: Sequence[str]) -> Drawings:
    """The plots of a training, in order."""
    from vitcls.report import plots

    if history is None:
        return {}
    return {
        "curves": (
            "Training",
            "In training and on the validation split.",
            lambda: plots.curves(history, curves),
        ),
        "learning_rate": (
            "Learning rate",
            "The rate of the update at each step.",
            lambda: plots.learning_rate(history),
        ),
    }


def _drawings(
    metrics: dict[str, Any],
    labels: np.ndarray,
    probabilities: np.ndarray,
    roc: RocCurves | None,
    class_names: Sequence[str],
    images: Callable[[np.ndarray], np.ndarray],
) -> Drawings:
    """The plots of predictions, in order."""
    from vitcls.report import plots

    return {
        "confusion_matrix": (
            "Confusion matrix",
            "Each row shows what became of the images of one class.",
            lambda: plots.confusion_matrix(labels, probabilities, class_names),
        ),
        "mistakes": (
            "Most confident mistakes",
            "True class, prediction and its probability." if metrics["accuracy"] < 1 else "every prediction is right.",
            lambda: plots.mistakes(labels, probabilities, class_names, images),
        ),
        "class_accuracy": (
            "Accuracy by class",
            "The share of the images of a class that were recognised.",
            lambda: plots.class_accuracy(metrics["per_class"]),
        ),
        "roc": (
            "ROC curves",
            "Micro pools all decisions, macro averages the classes; in grey the classes with the least area.",
            lambda: plots.roc(roc, class_names),
        ),
        "reliability": (
            "Reliability",
            "Where accuracy lies below confidence, the model is too sure of itself.",
            lambda: plots.reliability(labels, probabilities),
        ),
    }


def check_out(out: pathlib.Path, files: Collection[str], what: str) -> None:
    """Raises UserError where `out` exists and holds more than `files`, those of `what`: it would be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; name a directory")
    other = sorted(path.name for path in out.iterdir() if path.name not in files) if out.is_dir() else []
    if other:
        raise UserError(f"--out={out} holds {other[0]}, which is no file of {what}; name another directory")
