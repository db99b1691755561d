"""The plot of a run's groups."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitcls.report.plots import BLUE, GRAY, shorten

_MOST = 60  # groups


def accuracy(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy of each group with its interval, in the order of `rows`; of more than 60 the first."""
    rows = rows[:_MOST]
    figure = Figure(figsize=(10, 0.28 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        value, low, high = (100 * row["accuracy"][key] for key in ("value", "low", "high"))
        color = GRAY if row["small"] else BLUE
        axes.plot([low, high], [place, place], color=color, lw=3, alpha=0.5)
        axes.plot(value, place, "o", color=color, ms=5)
    axes.set_yticks(np.arange(len(rows)), [shorten(row["group"], 30) for row in rows])
    axes.set(xlabel="accuracy [%]", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    return figure
