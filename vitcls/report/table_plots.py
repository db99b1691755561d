"""The plot of a table of runs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from vitcls.report.comparison_plots import short_names
from vitcls.report.plots import BLUE, GRAY, ORANGE, RED, SKY

_COLORS = (BLUE, ORANGE, "#009E73", RED, SKY, "#CC79A7")
_DASHES = ("-", "--", "-.", ":")  # of more series than colours
Points = Sequence[tuple[str, str, float | None, float]]  # row, series, x, value in [0, 1]


def scores(points: Points, label: str, x_label: str = "") -> Figure:
    """Every run as a dot, and the mean of its row; by `x` with error bars of one deviation where the rows have it."""
    return by_x(points, label, x_label) if x_label else _by_row(points, label)


def _by_row(points: Points, label: str) -> Figure:
    rows = list(dict.fromkeys(row for row, *_ in points))
    shown = short_names(rows, 30)
    figure = Figure(figsize=(10, 0.4 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = 100 * np.array([value for name, _, _, value in points if name == row])
        axes.plot(2 * [values.mean()], [place - 0.3, place + 0.3], color=ORANGE, lw=2.2, clip_on=False)
        axes.plot(values, np.full(len(values), place), "o", color=BLUE, ms=5, alpha=0.8, clip_on=False)
    axes.set_yticks(range(len(rows)), [shown[row] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", color=GRAY, alpha=0.3)
    axes.set_xlabel(f"{label} [%]; a dot is a run, the line their mean")
    return figure


def by_x(points: Points, label: str, x_label: str, *, log: bool = True) -> Figure:
    """A line for each series, with error bars of one deviation; x in powers of two with `log`."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(dict.fromkeys(name for _, name, _, _ in points)):
        places = sorted({x for _, name, x, _ in points if name == series and x is not None})
        values = [[100 * v for _, name, at, v in points if name == series and at == x] for x in places]
        deviations = [np.std(several, ddof=1) if len(several) > 1 else 0.0 for several in values]
        dashes, color = divmod(number, len(_COLORS))
        style = {"color": _COLORS[color], "ls": _DASHES[dashes % len(_DASHES)], "marker": "o", "capsize": 3}
        axes.errorbar(places, [np.mean(v) for v in values], deviations, label=series, **style)
    if log:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks(sorted({x for _, _, x, _ in points if x is not None}))
    axes.set(xlabel=x_label, ylabel=f"{label} [%]")
    axes.grid(color=GRAY, alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure
