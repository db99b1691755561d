"""The plots of robustness; each function draws on a new matplotlib figure and returns it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitcls.data.corruptions import FAMILIES, SEVERITIES
from vitcls.data.corruptions.curves import CURVES
from vitcls.report.plots import BLUE, GRAY, ORANGE, RED, SKY

_COLORS = (BLUE, ORANGE, RED, SKY, "#009E73")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_LEVELS_SHOWN = 5


def means(metrics: Mapping[str, Any]) -> Figure:
    """Mean accuracy under each corruption with its interval, the hardest on top; the clean one as a line."""
    names = sorted(metrics["corruptions"], key=lambda name: -metrics["corruptions"][name]["mean_error"]["value"])
    figure = Figure(figsize=(10, 0.27 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    for found, color, label, down in _models(metrics):
        rows = [found["corruptions"][name]["mean_error"] for name in names]
        value, left, right = (100 - _percent(rows, key) for key in ("value", "high", "low"))
        places = np.arange(len(names)) + down
        axes.errorbar(value, places, xerr=[value - left, right - value], fmt="o", color=color, ms=4, label=label)
        clean = 100 * found["clean"]["value"]
        axes.axvline(clean, color=color, lw=1.2, ls="--", label=f"{label}, clean images" if label else "clean images")
    axes.set_yticks(np.arange(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set(title="Accuracy over five severities", xlabel="accuracy [%]", xlim=(0, 101))
    axes.legend(loc="lower left")
    return figure


def _models(metrics: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str, str, float]]:
    """The figures of each run, its colour, its name, and how far its marks are moved down."""
    if "against" not in metrics:
        return [(metrics, BLUE, "", 0.0)]
    return [(metrics, BLUE, "this run", -0.12), (metrics["against"], ORANGE, "the other", 0.12)]


def severities(metrics: Mapping[str, Any]) -> Figure:
    """A panel for each family that was measured: accuracy by severity, a line for each corruption."""
    measured = {
        family: [name for name in names if name in metrics["corruptions"]] for family, names in FAMILIES.items()
    }
    measured = {family: names for family, names in measured.items() if names}
    rows = -(-len(measured) // 2)
    figure = Figure(figsize=(10, 3.5 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, sharey=True, squeeze=False).ravel()
    for axes, (family, names) in zip(panels, measured.items(), strict=False):
        for name, color, dashes in zip(names, _COLORS, _DASHES, strict=False):
            levels = [metrics["clean"], *metrics["corruptions"][name]["accuracy"]]
            _band(axes, [0, *SEVERITIES], levels, color, name.replace("_", " "), dashes)
        axes.set(title=family.capitalize(), xlabel="severity", ylim=(0, 101))
        axes.legend(loc="lower left")
    for axes in panels[len(measured) :]:
        axes.set_axis_off()
    for axes in panels[::2]:
        axes.set_ylabel("accuracy [%]")
    return figure


def curves(metrics: Mapping[str, Any]) -> Figure:
    """A panel for each curve: accuracy, and how many answers stay."""
    names = list(metrics["curves"])
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(10, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        points = metrics["curves"][name]
        levels = [point["level"] for point in points]
        _band(axes, levels, [point["accuracy"] for point in points], BLUE, "accuracy", "-")
        _band(axes, levels, [point["consistency"] for point in points], SKY, "same answer", "--")
        if "against" in metrics:
            others = metrics["against"]["curves"][name]
            _band(axes, levels, [point["accuracy"] for point in others], ORANGE, "accuracy of the other", "-.")
        axes.axhline(100 * metrics["clean"]["value"], color=GRAY, lw=1, ls=":", label="accuracy, unchanged")
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        if levels[0] > levels[-1]:  # the weakest on the left
            axes.invert_xaxis()
        axes.set(title=CURVES[name].title, xlabel=CURVES[name].meaning, ylim=(0, 101))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[::2]:
        axes.set_ylabel("images [%]")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(lines))
    return figure


def _percent(rows: Sequence[Mapping[str, float | None]], key: str) -> np.ndarray:
    """float [N]; NaN where there is none, as an interval of one image."""
    return 100 * np.array([row[key] for row in rows], float)


def _band(axes: Axes, x: Sequence[float], rows: Sequence[Mapping[str, float]], color: str, label: str, ls: Any) -> None:
    value, low, high = (_percent(rows, key) for key in ("value", "low", "high"))
    axes.plot(x, value, color=color, ls=ls, lw=1.8, marker="o", ms=3, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def examples(images: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """A row for each change: the image uint8 [H, W, C] at some of its levels; the first column is unchanged."""
    columns = 2  # of rows side by side
    wide = _LEVELS_SHOWN + 1
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(10, 0.92 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, columns * wide, squeeze=False)
    for axes in panels.ravel():
        axes.set_axis_off()
    for i, (name, row) in enumerate(images.items()):
        shown = np.unique(np.linspace(1, len(row) - 1, _LEVELS_SHOWN).round().astype(int))
        line, first = panels[i % rows], (i // rows) * wide
        for axes, image in zip(line[first : first + wide], [row[0], *(row[j] for j in shown)], strict=False):
            axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
        line[first].set_title(name.replace("_", " "), fontsize=7.5, fontweight="normal", pad=2)
    return figure
