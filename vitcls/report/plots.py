"""The plots of a report; each function draws on a new matplotlib figure and returns it."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from vitcls import metrics
from vitcls.core.terminal import printable
from vitcls.metrics import METRICS
from vitcls.metrics.classification import confusion_of
from vitcls.report import fonts

# Okabe & Ito's colours, which people with any colour vision can tell apart; lines differ in their dashes besides.
BLUE, ORANGE, RED, SKY = "#0072B2", "#E69F00", "#D55E00", "#56B4E9"
GRAY = "#6B7280"
_INK, _FAINT = "#1F2937", "#E5E7EB"
_STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 130,
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9CA3AF",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "xtick.color": "#4B5563",
    "ytick.color": "#4B5563",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_MISTAKES = 24
_MOST_NAMED = 250  # classes; of more a plot names only some, or it would be larger than anyone looks at
_KINDS = {"train": (BLUE, "training"), "eval": (ORANGE, "validation")}
History = list[dict[str, Any]]


def styled(draw: Callable[[], Figure | None]) -> Figure | None:
    """Draws in the style of the report and leaves the style of the process alone."""
    with matplotlib.rc_context({**_STYLE, "font.family": fonts.families()}):
        return draw()


def series(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one name among the events, where the value is finite."""
    points = [(event["step"], event[name]) for event in history if event.get(name) is not None]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def curves(history: History, names: Sequence[str] = ("loss", "accuracy")) -> Figure | None:
    """Numbers over the steps, in training and on the validation split; None without any."""
    drawn = [name for name in names if any(len(series(history, f"{kind}/{name}")[0]) for kind in _KINDS)]
    if not drawn:
        return None
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        title, unit, scale = _axis(name)
        for kind, (color, label) in _KINDS.items():
            steps, values = series(history, f"{kind}/{name}")
            if len(steps):
                axes.plot(steps, scale * values, color=color, label=label, lw=1.8, marker=_marker(steps), ms=3.5)
        axes.set(title=title, ylabel=f"{name.replace('_', ' ')}{f' [{unit}]' if unit else ''}")
        _step_axis(axes)
        axes.legend()
    return figure


def _axis(name: str) -> tuple[str, str, float]:
    """Title, unit and scale of a number that is logged; a mean that only its task knows has no unit."""
    metric = METRICS.get(name)
    if metric is None:
        return name.replace("_", " ").capitalize(), "", 1
    return (metric.label, "%", 100) if metric.format.endswith("%}") else (metric.label, metric.unit.split()[0], 1)


def learning_rate(history: History) -> Figure | None:
    """The learning rate over the steps; None where it was not logged."""
    steps, rates = series(history, "train/learning_rate")
    if not len(steps):
        return None
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, rates, color=BLUE, lw=1.8, marker=_marker(steps), ms=3.5)
    axes.set(title="Learning rate", ylabel="learning rate [per step]")
    axes.set_ylim(0, 1.08 * max(rates.max(), 1e-12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    _step_axis(axes)
    return figure


def confusion_matrix(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Rows: true classes, each summing to 100 %; columns: predictions. Readable from 2 to some hundred classes.

    Up to 20 classes every cell says its share. The colours follow the square root of the share: rare confusions show.
    """
    num_classes = len(class_names)
    counts = confusion_of(labels, probabilities)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = num_classes <= 20
    many = num_classes > _MOST_NAMED
    side = 20.0 if many else float(np.clip((0.55 if few else 0.15) * num_classes + 1.8, 4.2, 40))
    figure = Figure(figsize=(side + 1.2, side), layout="compressed", dpi=None if few else 110)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100), interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    ticks = np.arange(0, num_classes, -(-num_classes // (100 if many else num_classes)))
    names = [shorten(class_names[k], 20) for k in ticks]
    size = 9 if few else 6.5
    axes.set_xticks(ticks, names, rotation=45 if few else 90, ha="right" if few else "center", fontsize=size)
    if few:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0 if few else 2)
    axes.set(title="Confusion matrix", xlabel="predicted class", ylabel="true class")
    if few:
        for row, column in np.argwhere(counts > 0):
            share = shares[row, column]
            text, color = f"{share:.0f}" if share >= 1 else "<1", "white" if share > 30 else _INK
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    bar = figure.colorbar(picture, ax=axes, label="share of the true class [%]", fraction=0.04, pad=0.02)
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    bar.outline.set_visible(False)
    return figure


def roc(curves: metrics.RocCurves | None, class_names: Sequence[str]) -> Figure:
    """ROC curves: all decisions pooled (micro), the mean over classes (macro), and the classes with the least area."""
    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="#9CA3AF", lw=1, ls=(0, (1, 3)))
    if curves is None:
        axes.text(50, 56, "not defined: all images are of one class", ha="center", color=GRAY)
    else:
        lines = [
            ("mean of the classes (macro)", ORANGE, "--", 2, curves.macro),
            ("all decisions (micro)", BLUE, "-", 2, curves.micro),
        ]
        grays = zip(("#374151", "#4B5563", GRAY, "#808895", "#9CA3AF"), ("-", "--", "-.", ":", "-"), strict=True)
        for (k, curve), (color, dashes) in zip(curves.worst.items(), grays, strict=False):
            lines.append((shorten(class_names[k], 20), color, dashes, 1.3, curve))
        for depth, (name, color, dashes, width, (x, y, auc)) in enumerate(lines):
            label = f"{name}: AUC {auc:.4f}"
            axes.plot(100 * x, 100 * y, color=color, ls=dashes, lw=width, label=label, zorder=3 - 0.1 * depth)
        axes.legend(loc="lower right")
    axes.set(
        title="ROC, one class against the rest",
        xlabel="false positive rate [%]",
        ylabel="true positive rate [%]",
        xlim=(-1, 100),
        ylim=(0, 101),
    )
    return figure


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Accuracy against confidence by bin, and how many examples each bin has (Guo et al. 2017, figure 1)."""
    confidence, accuracy, count = metrics.reliability(labels, probabilities)
    ece = metrics.expected_calibration_error(labels, probabilities)
    edges = np.linspace(0, 100, len(count) + 1)[:-1]
    width = 100 / len(count)
    filled = count > 0
    bar = {"width": 0.9 * width, "align": "center"}
    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(edges[filled] + width / 2, 100 * accuracy[filled], **bar, color=BLUE, label="accuracy")
    above.hlines(
        100 * confidence[filled],
        edges[filled] + 0.05 * width,
        edges[filled] + 0.95 * width,
        colors=ORANGE,
        lw=2.6,
        label="mean confidence",
    )
    above.plot([0, 100], [0, 100], color="#9CA3AF", lw=1, ls=(0, (1, 3)))
    above.set(title=f"Reliability: calibration error (ECE) {100 * ece:.2f} %", ylabel="accuracy [%]")
    above.set(xlim=(0, 100), ylim=(0, 101))
    above.legend(loc="upper left")
    below.bar(edges + width / 2, 100 * count / max(count.sum(), 1), **bar, color=GRAY)
    below.set(xlabel="confidence, the probability of the predicted class [%]", ylabel="images [%]")
    figure.align_ylabels()
    return figure


def class_accuracy(per_class: list[dict[str, Any]]) -> Figure:
    """Accuracy of the classes that occur, best first; more than 50 are spread over several panels.

    Of more than 250 the best half of 250 and the worst are shown; the page's table has them all.
    """
    every = sorted((row for row in per_class if row["num_examples"]), key=lambda row: -row["recall"])
    half = _MOST_NAMED // 2
    rows, which = every, ""
    if len(every) > _MOST_NAMED:
        rows, which = every[:half] + every[-half:], f", the {half} best and the {half} worst of {len(every):,}"
    panels = 1 if len(rows) <= 50 else 2 if len(rows) <= 200 else 4
    height = -(-len(rows) // panels)
    few = len(rows) <= 20
    figure = Figure(
        figsize=(10, float(np.clip((0.3 if few else 0.185) * height + 1.1, 2.0, 60))), layout="constrained", dpi=110
    )
    mean = 100 * np.mean([row["recall"] for row in every])
    for panel, axes in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        part = rows[panel * height : (panel + 1) * height]
        accuracy = np.array([100 * row["recall"] for row in part])
        axes.barh(range(len(part)), accuracy, color=[BLUE if value >= mean else SKY for value in accuracy], height=0.7)
        axes.axvline(mean, color=RED, lw=1.2, ls="--")
        for place, value in enumerate(accuracy):
            axes.text(101, place, f"{value:.0f}", va="center", fontsize=9 if few else 7, color=GRAY)
        axes.set_yticks(range(len(part)), [shorten(row["name"], 20) for row in part], fontsize=9 if few else 7.5)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="accuracy [%]", xlim=(0, 100), ylim=(height - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
    title = f"Accuracy by class, best first{which}; dashed: the mean, {mean:.1f} %"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
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
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(max(1.7 * columns, 3.4), 2.05 * rows + 0.4), layout="constrained")
    figure.suptitle("Most confident mistakes", x=0.01, ha="left", fontweight="bold", fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, index, picture in zip(panels, chosen, images(chosen), strict=False):
        gray = picture.shape[-1] == 1
        axes.imshow(picture[..., 0] if gray else picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        true, guess = shorten(class_names[labels[index]], 18), shorten(class_names[predicted[index]], 18)
        text = f"{true}\n→ {guess}, {100 * confidence[index]:.0f} %"
        axes.set_title(text, fontsize=8, fontweight="normal", pad=4)
    return figure


def shorten(name: str, length: int = 24) -> str:
    """A class name that fits on an axis: one line, no formula, and a box for what no font here can draw."""
    name = " ".join(printable(name).split())
    if columns(name) > length:
        widths = np.cumsum([columns(letter) for letter in name])
        name = f"{name[: np.searchsorted(widths, length - 1, side='right')]}…"
    return "".join(c if fonts.can_draw(c) else "□" for c in name).replace("$", r"\$")


def columns(text: str) -> int:
    """How many letters of the Latin alphabet have the width of a text: those of East Asia are as wide as two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) <= 40 else None


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}" if step == int(step) else ""))
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.02)
