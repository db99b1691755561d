"""The plots of a data set; each function draws on a new matplotlib figure and returns it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitcls.report.plots import BLUE, ORANGE, SKY, shorten

_COLUMNS = 8  # of pictures
_NAMED = 60  # classes


def class_counts(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """How many images of each class each split has, the rarest on top; of many classes the ends."""
    names = sorted(next(iter(counts.values())), key=lambda name: sum(split[name] for split in counts.values()))
    which = ""
    if len(names) > _NAMED:
        half = _NAMED // 2
        names, which = names[:half] + names[-half:], f", the {half} rarest and the {half} commonest of {len(names):,}"
    figure = Figure(figsize=(10, 0.2 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots()
    start = np.zeros(len(names))
    for (split, per_class), color in zip(counts.items(), (BLUE, SKY, ORANGE), strict=False):
        values = np.array([per_class[name] for name in names])
        axes.barh(range(len(names)), values, left=start, color=color, height=0.75, label=split)
        start = start + values
    axes.set_yticks(range(len(names)), [shorten(name, 24) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set(title=f"Images by class{which}", xlabel="images")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=len(counts))  # beside the title: bars may reach any corner
    return figure


def contact_sheet(by_class: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """A row of images uint8 [H, W, C] for each class."""
    columns = max(map(len, by_class.values()))
    figure = Figure(figsize=(10, 0.86 * len(by_class) + 0.2), layout="constrained")
    panels = figure.subplots(len(by_class), columns, squeeze=False)
    for line, (name, images) in zip(panels, by_class.items(), strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, image in zip(line, images, strict=False):
            _show(axes, image)
        line[0].text(-0.08, 0.5, shorten(name, 16), ha="right", va="center", fontsize=9, transform=line[0].transAxes)
    return figure


def pairs(found: Sequence[tuple[tuple[np.ndarray, str], ...]]) -> Figure | None:
    """Two images side by side, each with its text; None without any."""
    return labelled([picture for pair in found for picture in pair])


def labelled(found: Sequence[tuple[np.ndarray, str]]) -> Figure | None:
    """Images uint8 [H, W, C], each with its text; None without any."""
    if not found:
        return None
    rows = -(-len(found) // _COLUMNS)
    figure = Figure(figsize=(10, 1.6 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, (image, text) in zip(panels, found, strict=False):
        _show(axes, image)
        lines = "\n".join(shorten(line, 18) for line in text.splitlines())
        axes.set_title(lines, fontsize=7.5, fontweight="normal", loc="center", pad=3)
    return figure


def _show(axes: Axes, image: np.ndarray) -> None:
    gray = image.shape[-1] == 1
    axes.imshow(image[..., 0] if gray else image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
