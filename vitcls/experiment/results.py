"""What came of a table: results.csv, results.md, plots and one page; written at any time, from what has finished."""

import csv
import functools
import io
import pathlib
from collections.abc import Sequence
from html import escape

from vitcls.core.errors import UserError
from vitcls.core.terminal import printable
from vitcls.experiment.parts import Part, States, numbers, parts_of
from vitcls.experiment.table import Run, Table
from vitcls.metrics import METRICS
from vitcls.report import page
from vitcls.report.comparison import markdown_table
from vitcls.training import run_dir

COLUMNS = (
    *("run", "seed", "status", "accuracy", "top5_accuracy", "precision_macro", "recall_macro", "f1_macro"),
    *("auc_ovr_macro", "auc_ovr_macro_hard", "ece", "loss", "parameters", "flops_per_image", "latency_ms"),
    "train_seconds",
)


def write(table: Table, runs: Sequence[Run], states: States, directory: pathlib.Path) -> str:
    """Writes all of it into `directory`; returns the text of results.md. Raises UserError where it may not write."""
    parts = parts_of(table, runs, states)
    text = to_markdown(table, parts)
    try:
        run_dir.write_atomically(directory / "results.csv", to_csv(runs, states))
        run_dir.write_atomically(directory / "results.md", text)
        run_dir.write_atomically(directory / "index.html", printable(_to_html(table, runs, states, parts, directory)))
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{error.filename2 or error.filename} cannot be written: {error.strerror}") from None
    return text


def to_csv(runs: Sequence[Run], states: States) -> str:
    """One line a run; what a run does not have is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        state = states[run.name]
        writer.writerow(numbers(state) | {"run": run.row.name, "seed": run.seed, "status": state.status})
    return file.getvalue()


def to_markdown(table: Table, parts: Sequence[Part]) -> str:
    lines = [f"# {table.title}", "", " ".join(table.about.split()), ""]
    for part in parts:
        lines += [f"## {part.title}", ""] if part.title else []
        lines += [markdown_table(part.head, part.rows), "", *(f"- {note}" for note in part.notes), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _to_html(table: Table, runs: Sequence[Run], states: States, parts: Sequence[Part], directory: pathlib.Path) -> str:
    html = [f'<h1>{escape(table.title)}</h1>\n<p class="soft lead">{escape(" ".join(table.about.split()))}</p>']
    for part in parts:
        html.append(f"<h2>{escape(part.title)}</h2>" if part.title else "")
        html.append(page.table(part.head, part.rows))
        html.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in part.notes) + "</ul>")
    html += [
        page.figures(_drawn(table, runs, states, parts, directory)),
        "<h2>All runs</h2>",
        page.table(["Run", "Status", *(METRICS[name].label for name in table.metrics)], _run_rows(table, runs, states)),
    ]
    return page.document(table.title, html)


def _drawn(
    table: Table, runs: Sequence[Run], states: States, parts: Sequence[Part], directory: pathlib.Path
) -> list[tuple[str, str, pathlib.Path | None]]:
    """The plots, as `page.figures` takes them; each is a PNG in `directory` too."""
    from vitcls.report import comparison_plots, plots, table_plots

    caption = "Mean and deviation over seeds." if table.x_label else "Every run a dot, the mean of its row a bar."
    drawings = {"scores": ("Scores", caption, lambda: _scores(table, runs, states))}
    for number, part in enumerate(parts, 1):
        if part.compared and len(part.compared["groups"]) > 1:
            drawings["intervals" if number == 1 else f"intervals_{number}"] = (
                f"Intervals. {part.title}".rstrip(". "),
                f"{part.title or 'All rows'}: 95 % intervals of the mean over seeds, on test images drawn anew.",
                functools.partial(comparison_plots.intervals, part.compared),
            )
    for name, points in _corruption_points(runs, states).items():
        words = name.replace("_", " ")
        drawings[name] = (
            f"Accuracy under {words}",
            f"Accuracy under {words}, by severity; 0 is clean. Mean and deviation over seeds.",
            functools.partial(table_plots.by_x, points, "Accuracy", "severity", log=False),
        )
    shown = []
    for name, (title, caption, draw) in drawings.items():
        figure = plots.styled(draw)
        path = directory / f"{name}.png" if figure is not None else None
        if figure is not None:
            figure.savefig(path, dpi=150)
        shown.append((title, caption if path else "no run has finished.", path))
    return shown


def _corruption_points(runs: Sequence[Run], states: States) -> dict[str, list[tuple[str, str, float, float]]]:
    points: dict[str, list] = {}
    for run in runs:
        report = states[run.name].report or {}
        for name, values in report.get("corrupted_accuracy", {}).items():
            accuracies = enumerate([report["accuracy"], *values])
            points.setdefault(name, []).extend((run.row.name, run.row.name, x, value) for x, value in accuracies)
    return points


def _run_rows(table: Table, runs: Sequence[Run], states: States) -> list[list[str]]:
    reports = {run.name: states[run.name].report or {} for run in runs}
    return [
        [
            run.name,
            states[run.name].status,
            *(METRICS[m].show(reports[run.name][m]) if m in reports[run.name] else "" for m in table.metrics),
        ]
        for run in runs
    ]


def _scores(table: Table, runs: Sequence[Run], states: States):
    from vitcls.report import table_plots

    points = [
        (run.row.name, series, run.row.x, states[run.name].report[table.metrics[0]])
        for run in runs
        for series in run.row.series
        if states[run.name].report
    ]
    return table_plots.scores(points, METRICS[table.metrics[0]].label, table.x_label) if points else None
