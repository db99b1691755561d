"""The plots of a comparison; each function draws on a new matplotlib figure and returns it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitcls.metrics import METRICS
from vitcls.report.plots import BLUE, GRAY, ORANGE, RED, SKY, columns, shorten

# The rest of Okabe & Ito's colours; more groups than these differ in their dashes.
_COLORS = (BLUE, ORANGE, "#009E73", RED, "#CC79A7", SKY, "#1F2937")
_DASHES = ("-", "--", "-.", ":")
_SEPARATOR = re.compile(r"(?<!\de)[-_/ ]")  # of the words of a name; not that of 1e-3
_MOST_PAIRS = 28  # that one plot shows, those that differ most
Curves = Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]


def intervals(comparison: dict[str, Any]) -> Figure:
    """The metrics of all groups with their intervals, one panel each; the best accuracy is on top."""
    groups = comparison["groups"]
    shown = list(short_names([group["name"] for group in groups], 22).values())
    names = list(groups[0]["metrics"])
    columns = 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(10, rows * (0.27 * len(groups) + 1.0) + 0.2), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.axis("off")
    for axes, name in zip(panels, names, strict=False):
        metric = METRICS[name]
        scale, unit = _scale(name)
        for place, group in enumerate(groups):
            _interval(axes, place, group["metrics"][name], scale, BLUE if place == 0 else SKY)
        notes = [unit.replace("fraction", ""), "" if metric.higher_is_better else "less is better"]
        note = ", ".join(filter(None, notes))
        axes.set_title(metric.label + (f" [{note}]" if note else ""), fontsize=9)
        _group_axis(axes, shown)
    return figure


def differences(comparison: dict[str, Any]) -> Figure | None:
    """The difference in accuracy of every pair with its interval; None for a single group."""
    pairs = sorted(comparison["pairs"], key=lambda pair: -pair["differences"]["accuracy"]["value"])
    if not pairs:
        return None
    which = "" if len(pairs) <= _MOST_PAIRS else f", the {_MOST_PAIRS} largest of {len(pairs):,}"
    pairs = pairs[:_MOST_PAIRS]
    figure = Figure(figsize=(10, 0.32 * len(pairs) + 1.3), layout="constrained")
    axes = figure.subplots()
    for place, pair in enumerate(pairs):
        _interval(axes, place, pair["differences"]["accuracy"], 100, BLUE if pair["separated"] else GRAY)
    axes.axvline(0, color="#9CA3AF", lw=1, ls=(0, (1, 3)))
    shown = short_names([group["name"] for group in comparison["groups"]], 26)
    _group_axis(axes, [f"{shown[pair['a']]} − {shown[pair['b']]}" for pair in pairs])
    axes.set(title=f"Difference in accuracy{which}", xlabel="percentage points")
    return figure


def _scale(name: str) -> tuple[float, str]:
    """By what a metric is multiplied to be shown, and its unit then."""
    percent = METRICS[name].format.endswith("%}")
    return (100, "%") if percent else (1, METRICS[name].unit.partition(" ")[0])


def _interval(axes: Axes, place: int, numbers: dict[str, float], scale: float, color: str) -> None:
    axes.plot([scale * numbers["low"], scale * numbers["high"]], [place, place], color=color, lw=2.2)
    axes.plot(scale * numbers["value"], place, "o", color=color, ms=5.5)


def _group_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.spines["left"].set_visible(False)


def curves(histories: Mapping[str, Curves]) -> Figure | None:
    """Validation numbers by epoch, the seeds of a group in one colour; None where nothing was logged.

    Args:
      histories: name of a metric -> name of a group -> (epochs, values) of each seed.
    """
    drawn = {name: groups for name, groups in histories.items() if any(len(x) for g in groups.values() for x, _ in g)}
    if not drawn:
        return None
    order = list(next(iter(histories.values())))
    shown = short_names(order, 26)
    figure = Figure(figsize=(10, 4.0), layout="constrained")
    for axes, (name, groups) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        scale, unit = _scale(name)
        for place, group in enumerate(order):
            color, dashes = _COLORS[place % len(_COLORS)], _DASHES[place // len(_COLORS) % len(_DASHES)]
            for i, (epochs, values) in enumerate(groups[group]):
                label = {} if i else {"label": shown[group]}
                mark = "o" if len(epochs) <= 25 else None
                axes.plot(epochs, scale * values, color=color, ls=dashes, lw=1.5, marker=mark, ms=3, **label)
        quantity = f"{name.replace('_', ' ')} [{unit}]"
        axes.set(title=f"{METRICS[name].label}, validation", xlabel="epoch", ylabel=quantity)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.margins(x=0.02)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for ncols in range(min(len(labels), 4), 0, -1):  # as many as there is room for
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(4.0 + 0.2 * (len(order) // min(ncols, 3)))
    return figure


def disagreements(
    rows: Sequence[dict[str, Any]], class_names: Sequence[str], images: Callable[[np.ndarray], np.ndarray]
) -> Figure | None:
    """The images on which groups differ most, with what the two say that are furthest apart; None without any.

    Args:
      rows: as `metrics.comparison.disagreements` gives them; images: gives uint8 [n, H, W, C] for ids [n].
    """
    if not rows:
        return None
    columns = min(6, len(rows))
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(max(1.7 * columns, 3.4), 2.35 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    shown = short_names(list(rows[0]["groups"]), 11)
    for axes in panels:
        axes.axis("off")
    for axes, row, picture in zip(panels, rows, images(np.array([row["id"] for row in rows])), strict=False):
        gray = picture.shape[-1] == 1
        axes.imshow(picture[..., 0] if gray else picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        said = sorted(row["groups"].items(), key=lambda group: -group[1]["true_probability"])
        lines = [f"true: {shorten(class_names[row['label']], 18)}"]
        for name, group in (said[0], said[-1]):
            guess = shorten(class_names[group["predicted"]], 9)
            lines.append(f"{shown[name]}: {guess}, {100 * group['true_probability']:.0f} %")
        axes.set_title("\n".join(lines), fontsize=7, fontweight="normal", pad=4)
    return figure


def short_names(names: Sequence[str], length: int) -> dict[str, str]:
    """Names of groups that fit into `length` characters, each another: what long ones begin with in common is left out.

    Of names that would look the same the start is kept, and the words in which they differ; at the last a number.
    """
    cut = 0
    if len(names) > 1 and max(map(len, names)) > length:
        cut = max((found.end() for found in _SEPARATOR.finditer(_common(names))), default=0)
    short = {name: f"…{name[cut:]}" if cut else name for name in names}
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_squeezed(short[name], length), []).append(name)
    for same in alike.values():
        if len(same) > 1:
            short |= _told_apart(same, length)
    shown: dict[str, str] = {}
    for name in names:
        label, number = _squeezed(short[name], length), 1
        while label in shown.values():
            number += 1
            label = f"{_squeezed(short[name], length - len(f' {number}'))} {number}"
        shown[name] = label
    return shown


def _common(names: Sequence[str]) -> str:
    """What names, which are not all the same, begin with."""
    count = 0
    while len({name[: count + 1] for name in names}) == 1:
        count += 1
    return names[0][:count]


def _told_apart(names: Sequence[str], length: int) -> dict[str, str]:
    """The start of each name, and the words between those that all of them begin and end with."""
    first = _common(names)
    last = _common([name[len(first) :][::-1] for name in names])[::-1]
    start = max((found.end() for found in _SEPARATOR.finditer(first)), default=0)
    end = next((len(last) - found.start() for found in _SEPARATOR.finditer(last)), 0)
    words = {name: name[start : len(name) - end] + ("…" if end else "") for name in names}
    room = length - 1 - max(map(columns, words.values()))
    return {name: f"{name[: min(room, start)]}…{words[name]}" if room > 0 else words[name] for name in names}


def _squeezed(name: str, length: int) -> str:
    """Without its middle where it is too long, and with a first character that no legend hides."""
    if columns(name) > length:
        letters = length * len(name) // columns(name)
        half = (letters - 1) // 2
        name = f"{name[: letters - 1 - half]}…{name[-half:]}"
    return shorten(name, length).replace("_", " ", name.startswith("_"))
