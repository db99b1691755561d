"""The plots of a search."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitcls.report.plots import BLUE, GRAY, ORANGE

Points = Sequence[tuple[int, Mapping[str, Any], float, bool]]  # number, values, score, pruned


def history(points: Points, metric: str, *, maximize: bool) -> Figure:
    """The score of each trial, and the best so far."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    numbers, scores = [number for number, *_ in points], [score for _, _, score, _ in points]
    best = (np.maximum if maximize else np.minimum).accumulate(scores)
    colors = [GRAY if pruned else BLUE for *_, pruned in points]
    axes.scatter(numbers, scores, c=colors, s=24, label="a trial (grey: pruned)")
    axes.step(numbers, best, where="post", color=ORANGE, label="best so far")
    axes.set(xlabel="trial", ylabel=metric)
    axes.legend(frameon=False)
    return figure


def importance(shares: Mapping[str, float]) -> Figure | None:
    """How much of the score's variance each key explains; None where too few trials have ended."""
    if not shares:
        return None
    ordered = sorted(shares.items(), key=lambda item: item[1])
    figure = Figure(figsize=(10, 0.4 * len(ordered) + 1.0), layout="constrained")
    axes = figure.subplots()
    axes.barh([key for key, _ in ordered], [100 * share for _, share in ordered], color=BLUE)
    axes.set_xlabel("share of the explained variance [%]")
    return figure


def pareto(points: Points, costs: Sequence[float], front: Sequence[int], metric: str, cost: str) -> Figure:
    """The score of each trial against its cost; `front` are the numbers of those on the front, the cheapest first."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    places = {number: (price, score) for (number, _, score, _), price in zip(points, costs, strict=True)}
    axes.scatter(*zip(*places.values(), strict=True), color=BLUE, s=24, label="a trial")
    x, y = zip(*(places[number] for number in front), strict=True)
    axes.step(x, y, where="post", color=ORANGE, marker="o", ms=6, label="Pareto front")
    for number in front:
        axes.annotate(f"{number:04d}", places[number], xytext=(5, -11), textcoords="offset points", fontsize=8)
    if min(costs) > 0 and max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    axes.set(xlabel=cost, ylabel=metric)
    axes.legend(frameon=False)
    return figure


def slices(points: Points, metric: str, logs: Collection[str]) -> Figure:
    """The score against each key."""
    keys = list(dict.fromkeys(key for _, values, *_ in points for key in values))
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(10, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(keys) :]:
        axes.axis("off")
    for axes, key in zip(panels, keys, strict=False):
        shown = [(values[key], score, pruned) for _, values, score, pruned in points if key in values]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, *_ in shown)
        places = [value if numeric else str(value) for value, *_ in shown]
        axes.scatter(places, [score for _, score, _ in shown], c=[GRAY if p else BLUE for *_, p in shown], s=18)
        if key in logs:
            axes.set_xscale("log")
        axes.set_xlabel(key)
    for axes in panels[::columns]:
        axes.set_ylabel(metric)
    return figure
