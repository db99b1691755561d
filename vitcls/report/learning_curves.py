"""Accuracy against the number of training images, with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from vitcls.report.plots import BLUE, ORANGE, RED

_LINES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), ("#009E73", "-.", "^"), (RED, ":", "D"))
Line = Sequence[tuple[float, float, float, float]]  # images, accuracy, low, high


def learning_curves(lines: Mapping[str, Line], x_label: str) -> Figure:
    """One line for each name, its interval as a band; accuracies are in [0, 1], the axis of images is logarithmic."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, line), (color, dashes, marker) in zip(lines.items(), _LINES, strict=False):
        images, *values = np.array(line, np.float64).T
        accuracy, low, high = (100 * value for value in values)
        axes.fill_between(images, low, high, color=color, alpha=0.15, lw=0)
        axes.errorbar(images, accuracy, (accuracy - low, high - accuracy), color=color, lw=0, elinewidth=1, capsize=3)
        axes.plot(images, accuracy, color=color, ls=dashes, marker=marker, ms=5, lw=1.8, label=name)
    axes.set_xscale("log")
    axes.set_xticks(sorted({images for line in lines.values() for images, *_ in line}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda images, _: f"{images:,.0f}"))
    axes.set(title="Accuracy", xlabel=x_label, ylabel="accuracy [%]")
    if len(lines) > 1:
        figure.legend(loc="outside right upper")
    return figure
