"""The plots of a calibration; each function draws on a new matplotlib figure and returns it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitcls import metrics
from vitcls.metrics.promises import percent
from vitcls.metrics.promises import risk_coverage as curve_of
from vitcls.report.plots import BLUE, GRAY, ORANGE, SKY, shorten

_MOST_CLASSES = 100  # that are named


def reliability(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> Figure:
    """Accuracy by bin of confidence, and below how many images each bin has."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (name, probabilities) in enumerate((("before", before), ("after", after))):
        confidence, accuracy, count = metrics.reliability(labels, probabilities)
        above, below = panels[:, column]
        filled = count > 0
        width = 100 / len(count)
        centers = width * (np.arange(len(count)) + 0.5)
        above.bar(centers[filled], 100 * accuracy[filled], 0.9 * width, color=BLUE, label="accuracy")
        marks = {"colors": ORANGE, "lw": 2.6, "label": "mean confidence"}
        above.hlines(100 * confidence[filled], centers[filled] - 0.45 * width, centers[filled] + 0.45 * width, **marks)
        above.plot([0, 100], [0, 100], color="#9CA3AF", lw=1, ls=(0, (1, 3)))
        ece = metrics.expected_calibration_error(labels, probabilities)
        above.set(title=f"{name}: ECE {100 * ece:.2f} %", xlim=(0, 100), ylim=(0, 101))
        below.bar(centers, 100 * count / count.sum(), 0.9 * width, color=GRAY)
        below.set(xlabel="confidence [%]")
    panels[0, 0].set(ylabel="accuracy [%]")
    panels[0, 0].legend(loc="upper left")
    panels[1, 0].set(ylabel="images [%]")
    figure.align_ylabels()
    return figure


def coverage(sets: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> Figure | None:
    """The coverage of each class with its interval, for the promise nearest to 95 %; the worst class is on top."""
    if not sets:
        return None
    promise = min(sets, key=lambda row: abs(row["coverage"] - 0.95))
    found = [
        (name, row) for name, row in zip(class_names, promise["per_class"], strict=True) if row["value"] is not None
    ]
    rows = sorted(found, key=lambda pair: pair[1]["value"])[:_MOST_CLASSES]
    figure = Figure(figsize=(10, 0.2 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    value, low, high = (100 * np.array([row[key] for _, row in rows]) for key in ("value", "low", "high"))
    axes.errorbar(value, places, xerr=[value - low, high - value], fmt="o", color=BLUE, ecolor=SKY, ms=4)
    axes.axvline(100 * promise["coverage"], color=ORANGE, lw=1.5, ls="--")
    axes.set_yticks(places, [shorten(name, 24) for name, _ in rows])
    axes.invert_yaxis()
    which = f", the {len(rows)} worst of {len(found):,}" if len(found) > len(rows) else ""
    axes.set(
        title=f"Sets for {percent(promise['coverage'])}: coverage by class{which}",
        xlabel="sets that hold the truth [%]",
    )
    axes.grid(axis="y", visible=False)
    return figure


def risk_coverage(named: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """The share of wrong answers against that of images answered, for labels and probabilities by name."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, (labels, probabilities)), color, dashes in zip(named.items(), (GRAY, BLUE), ("--", "-"), strict=True):
        curve = curve_of(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
        axes.plot(
            100 * curve.coverage, 100 * curve.risk, color=color, ls=dashes, label=f"{name}: area {curve.area:.4f}"
        )
    axes.set(xlabel="images answered, the surest first [%]", ylabel="wrong answers [%]", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    return figure
