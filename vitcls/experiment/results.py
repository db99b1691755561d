"""What came of a table: results.csv, results.md, plots and one page; written at any time, from what has finished."""

import csv
import io
import pathlib
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.core.terminal import printable
from vitcls.experiment.table import Run, Table
from vitcls.experiment.work import State
from vitcls.metrics import METRICS, comparison
from vitcls.report import page
from vitcls.report.comparison import markdown_table
from vitcls.training import run_dir
from vitcls.training.predictions import check_same_images, read_predictions

COLUMNS = (
    *("run", "seed", "status", "accuracy", "top5_accuracy", "precision_macro", "recall_macro", "f1_macro"),
    *("auc_ovr_macro", "auc_ovr_macro_hard", "ece", "loss", "parameters", "flops_per_image", "latency_ms"),
    "train_seconds",
)
States = dict[str, State]


def write(table: Table, runs: Sequence[Run], states: States, directory: pathlib.Path) -> str:
    """Writes all of it into `directory`; returns the text of results.md."""
    compared = compare(runs, states)
    run_dir.write_atomically(directory / "results.csv", to_csv(runs, states))
    text = to_markdown(table, runs, states, compared)
    run_dir.write_atomically(directory / "results.md", text)
    run_dir.write_atomically(directory / "index.html", printable(_to_html(table, runs, states, compared, directory)))
    return text


def to_csv(runs: Sequence[Run], states: States) -> str:
    """One line a run; what a run does not have is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        report = dict(states[run.name].report or {})
        latency = report.get("latency_ms")
        report["latency_ms"] = latency["median"] if isinstance(latency, dict) else latency
        writer.writerow(report | {"run": run.row.name, "seed": run.seed, "status": states[run.name].status})
    return file.getvalue()


def compare(runs: Sequence[Run], states: States) -> dict[str, Any] | None:
    """`metrics.comparison.compare` of the rows with finished runs; None where their test images are not the same."""
    finished = [run for run in runs if states[run.name].status == "finished"]
    if not finished:
        return None
    predictions = [read_predictions(run_dir.open_workdir(run.workdir)) for run in finished]
    try:
        check_same_images(predictions)
    except UserError:  # folds, or rows of several data sets
        return None
    groups: dict[str, list] = {}
    for run, kept in zip(finished, predictions, strict=True):
        groups.setdefault(run.row.name, []).append(comparison.score(kept.labels, kept.probabilities()))
    return comparison.compare(groups)


def to_markdown(table: Table, runs: Sequence[Run], states: States, compared: dict[str, Any] | None) -> str:
    head, rows = main_table(table, runs, states, compared)
    lines = [f"# {table.title}", "", " ".join(table.about.split()), "", markdown_table(head, rows), ""]
    return "\n".join(lines + [f"- {note}" for note in notes(runs, states, compared)]) + "\n"


def main_table(
    table: Table, runs: Sequence[Run], states: States, compared: dict[str, Any] | None
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: mean ± standard deviation over seeds, the letters, and what the paper prints, as the paper's."""
    papers = [name for name in table.metrics if any(name in row.paper for row in table.rows)]
    letters = {group["name"]: group["letters"] for group in compared["groups"]} if compared else {}
    head = ["Run", "n", *([] if not letters else ["Letters"]), *(METRICS[name].label for name in table.metrics)]
    head += [f"{METRICS[name].label}, the paper's" for name in papers]
    rows = []
    for row in dict.fromkeys(run.row.name for run in runs):
        of_row = [run for run in runs if run.row.name == row]
        values = [states[run.name].report for run in of_row if states[run.name].report]
        cells = [row, str(len(values)), *([] if not letters else [letters.get(row, "")])]
        cells += [_mean(name, [value[name] for value in values if name in value]) for name in table.metrics]
        paper = of_row[0].row.paper
        rows.append(cells + [METRICS[name].show(paper[name]) if name in paper else "" for name in papers])
    return head, rows


def _mean(name: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {METRICS[name].show(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return METRICS[name].show(float(np.mean(values))) + spread


def notes(runs: Sequence[Run], states: States, compared: dict[str, Any] | None) -> list[str]:
    """What a reader must know of the numbers: what is missing, what the letters mean, how many seeds more."""
    counts = {name: sum(states[run.name].status == name for run in runs) for name in ("finished", "failed")}
    lines = [f"{counts['finished']} of {len(runs)} runs have finished; mean ± standard deviation over n seeds."]
    lines += [f"{run.name} failed: {states[run.name].error}" for run in runs if states[run.name].status == "failed"]
    if compared and len(compared["groups"]) > 1:
        lines.append(
            f"Rows that share a letter are not separated by a paired test at {compared['alpha']:g}, adjusted for all "
            "pairs (Holm): McNemar's exact test between single runs, a permutation test over seeds."
        )
        lines += _more_seeds(compared)
    return lines


def _more_seeds(compared: dict[str, Any]) -> list[str]:
    """About how many seeds more would separate the best row from those that it shares a letter with, in one line."""
    seeds = {group["name"]: group["num_seeds"] for group in compared["groups"]}
    best = compared["groups"][0]["name"]
    wanted = [
        f"{pair['b']} {max(pair['seeds_needed'] - min(seeds[best], seeds[pair['b']]), 1)}"
        for pair in compared["pairs"]
        if pair["a"] == best and not pair["separated"] and pair["seeds_needed"]
    ]
    if not wanted:
        return []
    return [f"To separate {best} from the others about so many more seeds of both: {', '.join(wanted)}."]


def _to_html(
    table: Table, runs: Sequence[Run], states: States, compared: dict[str, Any] | None, directory: pathlib.Path
) -> str:
    from vitcls.report import comparison_plots, plots

    caption = "Mean and deviation over seeds." if table.x_label else "Every run a dot, the mean of its row a bar."
    drawings = {"scores": ("Scores", caption, lambda: _scores(table, runs, states))}
    if compared and len(compared["groups"]) > 1:
        drawings["intervals"] = (
            "Intervals",
            "95 % intervals of the mean over seeds, on test images drawn anew.",
            lambda: comparison_plots.intervals(compared),
        )
    shown = []
    for name, (title, caption, draw) in drawings.items():
        figure = plots.styled(draw)
        path = directory / f"{name}.png" if figure is not None else None
        if figure is not None:
            figure.savefig(path, dpi=150)
        shown.append((title, caption if path else "no run has finished.", path))
    head, rows = main_table(table, runs, states, compared)
    parts = [
        f'<h1>{escape(table.title)}</h1>\n<p class="soft lead">{escape(" ".join(table.about.split()))}</p>',
        page.table(head, rows),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(runs, states, compared)) + "</ul>",
        page.figures(shown),
        "<h2>All runs</h2>",
        page.table(["Run", "Status", *(METRICS[name].label for name in table.metrics)], _run_rows(table, runs, states)),
    ]
    return page.document(table.title, parts)


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
        (run.row.name, run.row.series, run.row.x, states[run.name].report[table.metrics[0]])
        for run in runs
        if states[run.name].report
    ]
    return table_plots.scores(points, METRICS[table.metrics[0]].label, table.x_label) if points else None
