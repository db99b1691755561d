"""The plot of what attacks leave of the accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from vitcls.report.plots import BLUE, GRAY, ORANGE, RED, SKY

_LOOKS = ((BLUE, "--"), (ORANGE, "-."), (SKY, ":"), (GRAY, (0, (3, 1, 1, 1))))


def accuracy_by_eps(
    curve: Sequence[Mapping[str, Any]], labels: Mapping[str, str], certified: Sequence[Mapping[str, Any]]
) -> Figure:
    """Accuracy against eps under each attack and under the worst of them for each image, with intervals.

    Below it, where that is known, the share that no attack can take.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    places = [point["eps"] for point in curve]
    for (name, _), (color, dashes) in zip(curve[0]["attacks"].items(), _LOOKS, strict=False):
        values = [100 * point["attacks"][name]["value"] for point in curve]
        axes.plot(places, values, color=color, ls=dashes, lw=1.5, marker="o", ms=3, label=labels[name])
    if certified:
        values = [100 * each["accuracy"]["value"] for each in certified]
        axes.plot(
            [each["eps"] for each in certified], values, color="black", lw=1.5, marker="o", ms=3, label="certified"
        )
    worst = {key: [100 * point["worst"][key] for point in curve] for key in ("value", "low", "high")}
    axes.fill_between(places, worst["low"], worst["high"], color=RED, alpha=0.15, lw=0)
    axes.plot(places, worst["value"], color=RED, lw=2, marker="o", ms=4, label="worst of all, 95 % interval")
    axes.set(xlabel="eps, of images in [0, 1]", ylabel="accuracy [%]", ylim=(0, 102), xlim=(0, None))
    axes.legend(loc="best")
    return figure
