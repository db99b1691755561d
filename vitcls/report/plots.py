"""The plots of a report; each function draws on a new matplotlib figure and returns it."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vitcls import metrics

# Okabe & Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, RED, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6B7280"
_WORST = 5  # classes whose ROC curves are drawn
_MISTAKES = 24
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E7EB",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
History = list[dict[str, Any]]


def styled(draw: Callable[[], Figure]) -> Figure:
    """Draws in the style of the report and leaves the style of the process alone."""
    with matplotlib.rc_context(_STYLE):
        return draw()


def series(history: History, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one name among the events."""
    points = [(event["step"], event[name]) for event in history if event.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def curves(history: History) -> Figure | None:
    """Loss and accuracy over the steps, in training and on the validation split; None without any."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    drawn = False
    for axes, metric, unit in ((panels[0], "loss", "nats"), (panels[1], "accuracy", "%")):
        for kind, color, label in (("train", BLUE, "training"), ("eval", ORANGE, "validation")):
            steps, values = series(history, f"{kind}/{metric}")
            if steps:
                drawn = True
                scaled = np.asarray(values) * (100 if unit == "%" else 1)
                axes.plot(steps, scaled, color=color, label=label, marker="o" if len(steps) < 40 else None, ms=3)
        axes.set(title=metric.capitalize(), xlabel="step", ylabel=f"{metric} [{unit}]")
        if axes.lines:
            axes.legend()
    return figure if drawn else None


def learning_rate(history: History) -> Figure | None:
    """The learning rate over the steps; None where it was not logged."""
    steps, rates = series(history, "train/learning_rate")
    if not steps:
        return None
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, rates, color=BLUE)
    axes.set(title="Learning rate", xlabel="step", ylabel="learning rate", ylim=(0, None))
    return figure


def confusion_matrix(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Rows: true classes, each summing to 100 %; columns: predictions. Readable from 2 to some hundred classes."""
    from sklearn.metrics import confusion_matrix as count

    num_classes = len(class_names)
    counts = count(labels, probabilities.argmax(axis=1), labels=np.arange(num_classes))
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.16 * num_classes + 2, 4.5, 40))
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=100)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    ticks = np.arange(num_classes) if num_classes <= 250 else np.arange(0, num_classes, num_classes // 100)
    names = [shorten(class_names[k]) for k in ticks]
    size = 9 if num_classes <= 20 else 6
    axes.set_xticks(ticks, names, rotation=90, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set(title="Confusion matrix", xlabel="predicted class", ylabel="true class")
    if num_classes <= 20:
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 55 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(picture, ax=axes, label="share of the true class [%]", fraction=0.04, pad=0.02)
    return figure


def roc(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Figure:
    """ROC curves: all decisions pooled (micro), the mean over classes (macro), and the classes with the least AUC."""
    from sklearn.metrics import roc_curve

    def auc(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.trapezoid(y, x))

    aucs = metrics.class_aucs(labels, probabilities)
    defined = np.flatnonzero(~np.isnan(aucs))
    figure = Figure(figsize=(6.2, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=GRAY, lw=1, ls=":", label="chance")
    if len(defined):
        one_hot = np.eye(probabilities.shape[1], dtype=bool)[labels]
        grid = np.linspace(0, 1, 1001)
        classes = [roc_curve(one_hot[:, k], probabilities[:, k]) for k in defined]
        macro = np.mean([np.interp(grid, x, y) for x, y, _ in classes], axis=0)
        macro[0] = 0.0
        x, y, _ = roc_curve(one_hot.ravel(), probabilities.ravel())
        axes.plot(100 * x, 100 * y, color=BLUE, lw=2, label=f"micro, AUC {auc(x, y):.4f}")
        axes.plot(100 * grid, 100 * macro, color=ORANGE, lw=2, label=f"macro, AUC {aucs[defined].mean():.4f}")
        shades = matplotlib.colormaps["Greys"](np.linspace(0.8, 0.4, _WORST))
        for color, place in zip(shades, np.argsort(aucs[defined])[:_WORST], strict=False):
            x, y, _ = classes[place]
            name = shorten(class_names[defined[place]])
            axes.plot(100 * x, 100 * y, color=color, lw=1, label=f"{name}, AUC {aucs[defined[place]]:.4f}")
    axes.set(
        title="ROC, one class against the rest",
        xlabel="false positive rate [%]",
        ylabel="true positive rate [%]",
        xlim=(0, 100),
        ylim=(0, 100.5),
    )
    axes.legend(loc="lower right", fontsize=8)
    return figure


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Accuracy against confidence by bin, and how many examples each bin has (Guo et al. 2017, figure 1)."""
    confidence, accuracy, count = metrics.reliability(labels, probabilities)
    ece = metrics.expected_calibration_error(labels, probabilities)
    edges = np.linspace(0, 100, len(count) + 1)
    figure = Figure(figsize=(5.4, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = count > 0
    width = edges[1]
    above.bar(edges[:-1][filled], 100 * accuracy[filled], width, align="edge", color=BLUE, ec="white", label="accuracy")
    above.plot(100 * confidence[filled], 100 * confidence[filled], "_", color=RED, ms=14, mew=2, label="confidence")
    above.plot([0, 100], [0, 100], color=GRAY, lw=1, ls=":")
    above.set(title=f"Reliability, ECE {100 * ece:.2f} %", ylabel="accuracy [%]", xlim=(0, 100), ylim=(0, 100))
    above.legend(loc="upper left")
    below.bar(edges[:-1], 100 * count / max(count.sum(), 1), width, align="edge", color=GRAY, ec="white")
    below.set(xlabel="confidence [%]", ylabel="examples [%]")
    return figure


def class_accuracy(per_class: list[dict[str, Any]]) -> Figure:
    """Accuracy of every class that occurs, best first."""
    rows = sorted((row for row in per_class if row["num_examples"]), key=lambda row: row["recall"])
    figure = Figure(figsize=(8, float(np.clip(0.17 * len(rows) + 1.2, 2.5, 60))), layout="constrained", dpi=100)
    axes = figure.subplots()
    mean = 100 * np.mean([row["recall"] for row in rows])
    axes.barh(range(len(rows)), [100 * row["recall"] for row in rows], color=BLUE, height=0.75)
    axes.axvline(mean, color=RED, lw=1.2, label=f"mean {mean:.1f} %")
    axes.set_yticks(range(len(rows)), [shorten(row["name"]) for row in rows], fontsize=9 if len(rows) <= 30 else 7)
    axes.set(title="Accuracy by class", xlabel="accuracy [%]", xlim=(0, 100), ylim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    return figure


def mistakes(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    images: Callable[[np.ndarray], np.ndarray],
) -> Figure | None:
    """The wrong predictions that were surest of themselves; None where all are right."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    if not len(wrong):
        return None
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:_MISTAKES]
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(max(1.45 * columns, 4.0), 1.95 * rows + 0.4), layout="constrained")
    figure.suptitle("Most confident mistakes", fontweight="bold", fontsize=11)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, index, picture in zip(panels, chosen, images(chosen), strict=False):
        axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        true, guess = shorten(class_names[labels[index]], 16), shorten(class_names[predicted[index]], 16)
        axes.set_title(f"{true}\n→ {guess}\n{100 * confidence[index]:.1f} %", fontsize=8, fontweight="normal")
    return figure


def shorten(name: str, length: int = 24) -> str:
    """A class name that fits on an axis; dollar signs would start a formula."""
    name = name if len(name) <= length else f"{name[: length - 1]}…"
    return name.replace("$", r"\$")
