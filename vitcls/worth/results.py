"""What came of it: one table, the curves, and a few sentences that say what to do."""

import csv
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from vitcls.core.terminal import printable
from vitcls.experiment.table import Run
from vitcls.metrics import comparison
from vitcls.metrics.resampling import LEVEL, RESAMPLES, bootstrap_interval
from vitcls.report import page
from vitcls.report.comparison import markdown_table
from vitcls.training import run_dir
from vitcls.training.predictions import Predictions, check_same_images, read_predictions
from vitcls.worth.runs import LEARNED, METHODS

FILES = ("worth.json", "worth.md", "worth.csv", "curves.png", "index.html")


_LITTLE = 0.02  # of accuracy: a gain that is certainly less is not much
_SOON = 60.0  # seconds below which nobody minds the difference


class Cell(NamedTuple):
    """A method with a share of the images."""

    method: str
    share: float  # of the training images
    images: int
    accuracy: float
    low: float  # of its bootstrap interval
    high: float
    seconds: float
    resampled: np.ndarray  # accuracies in resamples of the test images, the same ones for all


def read(runs: Sequence[Run], seconds: Mapping[str, float]) -> tuple[list[Cell], int]:
    """The cells of all runs, and the number of test images; `seconds` are those that a trained run took in all."""
    kept = [read_predictions(run_dir.open_workdir(run.workdir)) for run in runs]
    check_same_images(kept)
    return [_cell(run, one, seconds) for run, one in zip(runs, kept, strict=True)], len(kept[0].labels)


def _cell(run: Run, kept: Predictions, seconds: Mapping[str, float]) -> Cell:
    scores, method = comparison.score(kept.labels, kept.probabilities()), run.row.series
    resampled, images = scores.resampled["accuracy"], kept.run.info.num_examples["train"]
    took = seconds[run.row.name] if method in LEARNED else _seconds_of_probe(run.workdir)
    if method == "fine_tuned" and run.config.init.head == "keep":
        took += _seconds_of_probe(pathlib.Path(run.config.init.weights))
    return Cell(method, run.row.x, images, scores.metrics["accuracy"], *bootstrap_interval(resampled), took, resampled)


def _seconds_of_probe(workdir: pathlib.Path) -> float:
    report = json.loads((workdir / "report" / "metrics.json").read_text(encoding="utf-8"))
    return report["feature_seconds"] + report["train_seconds"]


def advice(cells: Sequence[Cell]) -> list[str]:
    """What to do, in sentences: of the methods that the test images do not separate from the best, the quickest."""
    largest = max(cell.share for cell in cells)
    full = sorted((cell for cell in cells if cell.share == largest), key=lambda cell: -cell.accuracy)
    best = full[0]
    together = [cell for cell in full if cell is best or _difference(best, cell)[1] <= 0]
    chosen = min(together, key=lambda cell: (max(cell.seconds, _SOON), -cell.accuracy))
    lines = [
        f"Use {_words(chosen.method)}: with {chosen.images:,} training images it gets {chosen.accuracy:.1%} of the "
        f"test images right ({_range(chosen)}) and takes {span(chosen.seconds)}."
    ]
    if chosen is not best:
        value, low, high = _difference(best, chosen)
        lines.append(
            f"{METHODS[best.method]} gets {100 * value:.1f} points more, which these test images do not tell from none "
            f"({100 * low:+.1f} to {100 * high:+.1f}), and takes {span(best.seconds)}."
        )
    else:
        lines += [_behind(chosen, cell, cell in together) for cell in full[1:2]]
    return lines + _more_images(cells, chosen)


def _behind(chosen: Cell, other: Cell, alike: bool) -> str:
    """How far the second best is behind; `alike` where the test images do not tell the two apart."""
    value, low, high = _difference(chosen, other)
    less = f"The next, {_words(other.method)}, gets {100 * value:.1f} points less"
    if not alike:
        return f"{less} ({100 * low:.1f} to {100 * high:.1f})."
    return (
        f"{less}, which these test images do not tell from none ({100 * low:+.1f} to {100 * high:+.1f}), and takes "
        f"{span(other.seconds)}."
    )


def _more_images(cells: Sequence[Cell], chosen: Cell) -> list[str]:
    """Whether more images would help, by what the last of them have done."""
    fewer = [cell for cell in cells if cell.method == chosen.method and cell.share < chosen.share]
    if not fewer:
        return []
    before = max(fewer, key=lambda cell: cell.share)
    value, low, high = _difference(chosen, before)
    step = f"from {before.images:,} to {chosen.images:,} images it gains {100 * value:.1f} points ({100 * low:+.1f} to "
    step += f"{100 * high:+.1f})"
    if low > 0:
        return [f"More images will help: {step}."]
    if high < _LITTLE:
        return [f"More images of the same kind will not change much: {step}."]
    return [f"These test images do not tell whether more images help: {step}."]


def _difference(a: Cell, b: Cell) -> tuple[float, float, float]:
    """Of the accuracies, with its paired interval."""
    return a.accuracy - b.accuracy, *bootstrap_interval(a.resampled - b.resampled)


def _words(method: str) -> str:
    return {"hog_svm": "HOG + SVM", "from_scratch": "training from scratch", "probe": "the probe"}.get(
        method, "fine-tuning"
    )


def _range(cell: Cell) -> str:
    return f"{100 * cell.low:.1f} to {100 * cell.high:.1f}"


def span(seconds: float) -> str:
    """A time in words.

    >>> [span(0.42), span(42.0), span(420)]
    ['0.4 s', '42 s', '7 min']
    """
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str | tuple[str, str]]]]:
    """Head and rows: methods by shares; the accuracy, and its interval and time in the second part of a cell."""
    shares = sorted({cell.share for cell in cells})
    by = {(cell.method, cell.share): cell for cell in cells}
    sizes = {cell.share: cell.images for cell in cells}
    head = ["Method", *(f"{100 * share:g} %: {sizes[share]:,} images" for share in shares)]
    rows = []
    for method, name in METHODS.items():
        row = [by[method, share] for share in shares]
        rows.append([name, *((f"{cell.accuracy:.1%}", f"{_range(cell)}; {span(cell.seconds)}") for cell in row)])
    return head, rows


def write(directory: pathlib.Path, title: str, cells: Sequence[Cell], num_test: int, steps: int) -> list[str]:
    """Writes FILES; returns the advice."""
    lines, notes = advice(cells), _notes(num_test, steps)
    rows = [{key: value for key, value in cell._asdict().items() if key != "resampled"} for cell in cells]
    kept = {"advice": lines, "num_test_images": num_test, "steps": steps, "level": LEVEL, "rows": rows}
    units = {"accuracy": "fraction", "low": "fraction", "high": "fraction", "share": "fraction", "seconds": "seconds"}
    run_dir.write_atomically(directory / "worth.json", json.dumps(kept | {"units": units}, indent=2) + "\n")
    run_dir.write_atomically(directory / "worth.csv", _csv(rows))
    text = [f"# {title}", " ".join(lines), markdown_table(*table(cells)), *notes]
    run_dir.write_atomically(directory / "worth.md", printable("\n\n".join(text)) + "\n")
    parts = [
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(" ".join(lines))}</p>',
        page.table(*table(cells)),
        page.figures([("Accuracy", "Of the test images, with 95 % intervals.", _draw(directory, cells))]),
        "\n".join(f"<p>{escape(note)}</p>" for note in notes),
    ]
    run_dir.write_atomically(directory / "index.html", printable(page.document(title, parts)))
    return lines


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _draw(directory: pathlib.Path, cells: Sequence[Cell]) -> pathlib.Path | None:
    from vitcls.report import plots
    from vitcls.report.learning_curves import learning_curves

    lines = {
        name: [(cell.images, cell.accuracy, cell.low, cell.high) for cell in cells if cell.method == method]
        for method, name in METHODS.items()
    }
    figure = plots.styled(lambda: learning_curves(lines, "training images"))
    if figure is None:
        return None
    figure.savefig(directory / "curves.png", dpi=150)
    return directory / "curves.png"


def _notes(num_test: int, steps: int) -> list[str]:
    return [
        f"Accuracy on the {num_test:,} images of the test split. Intervals of {LEVEL:.0%} are of {RESAMPLES:,} "
        "resamples of these images; they are of one run each, without what another seed would change. The images of a "
        "share are drawn for it alone, of every class alike.",
        f"From scratch and fine-tuned take {steps:,} steps whatever the share, and the best of four looks at the "
        "validation split, which is the same for all; what more steps would give is not known from this.",
        "Times are those of this machine: of the features of training and validation images and the fit, or of the "
        "whole process that trained, to which that of the probe is added where fine-tuning goes on from it.",
    ]
