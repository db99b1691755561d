"""The plot of what is known and what is not."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitcls.report.plots import BLUE, GRAY, ORANGE, RED


def histograms(scores: Mapping[str, tuple[np.ndarray, np.ndarray]], chosen: str, threshold: float) -> Figure:
    """A panel for each score: known images against unknown ones, in the range of all but the outermost 0.5 %."""
    figure = Figure(figsize=(10, 2.6 * ((len(scores) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(scores) + 1) // 2, 2, squeeze=False).ravel()
    for axes, (name, (known, unknown)) in zip(panels, scores.items(), strict=False):
        both = np.concatenate([known, unknown])
        edges = np.linspace(*np.quantile(both, [0.005, 0.995]), 41)
        for values, color, label in ((known, BLUE, "test images"), (unknown, ORANGE, "unknown images")):
            shares = 100 * np.histogram(values, edges)[0] / len(values)
            axes.stairs(shares, edges, color=color, fill=True, alpha=0.35)
            axes.stairs(shares, edges, color=color, lw=1.5, label=label)
        if name == chosen:
            axes.axvline(threshold, color=RED, lw=1.5, ls="--", label="threshold")
        axes.set(title=f"{name}{', chosen' if name == chosen else ''}", ylabel="images [%]")
        axes.tick_params(colors=GRAY)
    panels[0].legend(loc="upper left")
    for axes in panels[-2:]:
        axes.set_xlabel("score, higher is more like the training images")
    return figure
