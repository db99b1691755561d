"""The numbers of a table, part by part, and what may be said of their differences."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data.corruptions import SEVERITIES
from vitcls.experiment.table import FACTS, Run, Table
from vitcls.experiment.work import State
from vitcls.metrics import METRICS, comparison
from vitcls.metrics.table import Metric
from vitcls.training import run_dir
from vitcls.training.predictions import Predictions, check_same_images, read_predictions

States = dict[str, State]
_SPREAD = "Mean ± standard deviation over n seeds."


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a table that belong together, as a table with what is said of it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]
    compared: dict[str, Any] | None = None  # by `metrics.comparison.compare`, where rows are compared


def numbers(state: State) -> dict[str, Any]:
    """metrics.json of a run, with the median for the latency; {} where it has not finished."""
    report = dict(state.report or {})
    if isinstance(report.get("latency_ms"), dict):
        report["latency_ms"] = report["latency_ms"]["median"]
    return report


def parts_of(table: Table, runs: Sequence[Run], states: States) -> list[Part]:
    """The rows by part or the folds as one, then accuracy under each corruption that was measured."""
    scored = _scored(runs, states)
    if table.pooled:
        parts = [_pooled(table, runs, states, scored)]
    else:
        titles = dict.fromkeys(run.row.part for run in runs)
        parts = [
            _part(table, title, [run for run in runs if run.row.part == title], states, scored) for title in titles
        ]
    names = {name: None for state in states.values() for name in (state.report or {}).get("corrupted_accuracy", ())}
    return parts + [_corrupted(name, runs, states) for name in names]


def _scored(runs: Sequence[Run], states: States) -> dict[str, Predictions]:
    """The predictions of the finished runs, by name."""
    return {
        run.name: read_predictions(run_dir.open_workdir(run.workdir))
        for run in runs
        if states[run.name].status == "finished"
    }


def _compare(runs: Sequence[Run], predictions: Mapping[str, Predictions]) -> dict[str, Any] | None:
    """`metrics.comparison.compare` of the rows with finished runs; None where their test images are not the same."""
    finished = [run for run in runs if run.name in predictions]
    if not finished:
        return None
    try:
        check_same_images([predictions[run.name] for run in finished])
    except UserError:  # rows of several data sets
        return None
    groups: dict[str, list] = {}
    for run in finished:
        kept = predictions[run.name]
        groups.setdefault(run.row.name, []).append(comparison.score(kept.labels, kept.probabilities()))
    return comparison.compare(groups)


def _part(
    table: Table, title: str, runs: Sequence[Run], states: States, predictions: Mapping[str, Predictions]
) -> Part:
    """Mean ± standard deviation over seeds, the letters, and what the paper prints, as the paper's."""
    compared = _compare(runs, predictions)
    papers = [name for name in table.metrics if any(name in run.row.paper for run in runs)]
    letters = {group["name"]: group["letters"] for group in compared["groups"]} if compared else {}
    head = ["Run", "n", *(["Letters"] if letters else []), *(METRICS[name].label for name in table.metrics)]
    head += [FACTS[name][0] for name in table.facts]
    head += [f"{METRICS[name].label}, the paper's" for name in papers]
    rows = []
    for row, of_row in _by_row(runs).items():
        values = [numbers(states[run.name]) for run in of_row if states[run.name].report]
        cells = [row, str(len(values)), *([letters.get(row, "")] if letters else [])]
        cells += [_mean(METRICS[name].show, [value[name] for value in values]) for name in table.metrics]
        cells += [_fact(name, [v[name] for v in values if name in v]) for name in table.facts]
        paper = of_row[0].row.paper
        rows.append(cells + [METRICS[name].show(paper[name]) if name in paper else "" for name in papers])
    finished = [predictions[run.name] for run in runs if run.name in predictions]
    notes = [*_trained(finished), *_count(runs, states), _SPREAD, *_letters(compared)]
    return Part(title, head, rows, notes, compared)


def _by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.row.name, []).append(run)
    return rows


def _mean(show: Callable[[float], str], values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return show(float(np.mean(values))) + spread


def _fact(name: str, values: Sequence[float]) -> str:
    """As `_mean`, without a spread where there cannot be one."""
    return _mean(FACTS[name][1].format, values if len(set(values)) > 1 else values[:1])


def _pooled(table: Table, runs: Sequence[Run], states: States, predictions: Mapping[str, Predictions]) -> Part:
    """Each fold, and all that have finished as one evaluation, of each seed; with intervals over images."""
    groups = {run.name: [predictions[run.name]] for run in runs if run.name in predictions}
    for seed in dict.fromkeys(run.seed for run in runs):
        of_seed = [predictions[run.name] for run in runs if run.seed == seed and run.name in predictions]
        if len(of_seed) > 1:
            groups[f"all {len(of_seed)} folds, seed {seed}"] = of_seed
    rows = []
    for name, kept in groups.items():
        labels = np.concatenate([each.labels for each in kept])
        scores = comparison.score(labels, np.concatenate([each.probabilities() for each in kept]))
        (group,) = comparison.compare({name: [scores]})["groups"]
        cells = [_interval(METRICS[metric], **group["metrics"][metric]) for metric in table.metrics]
        rows.append([name, f"{len(labels):,}", *cells])
    head = ["Run", "Images", *(f"{METRICS[name].label} [95 % interval]" for name in table.metrics)]
    said = (
        "The intervals are of these models, on images drawn anew. Folds share most of their training images, so they "
        "do not say how accuracy differs between training sets (Bengio & Grandvalet 2004)."
    )
    return Part("", head, rows, [*_trained([*predictions.values()]), *_count(runs, states), said])


def _interval(metric: Metric, value: float, low: float | None, high: float | None, **_) -> str:
    return f"{metric.show(value)} [{metric.show(low)}, {metric.show(high)}]"


def _corrupted(name: str, runs: Sequence[Run], states: States) -> Part:
    """Accuracy on clean and on corrupted test images, by severity."""
    words, show = name.replace("_", " "), METRICS["accuracy"].show
    rows = []
    for row, of_row in _by_row(runs).items():
        reports = [states[run.name].report for run in of_row if states[run.name].report]
        lines = [[r["accuracy"], *r["corrupted_accuracy"][name]] for r in reports if name in r["corrupted_accuracy"]]
        rows.append([row, *(_mean(show, values) for values in zip(*lines, strict=True))] if lines else [row])
    head = ["Run", "Clean", *(f"Severity {severity}" for severity in SEVERITIES)]
    width = len(head)
    rows = [cells + ["-"] * (width - len(cells)) for cells in rows]
    return Part(f"Accuracy under {words}", head, rows, [_SPREAD])


def _trained(finished: Sequence[Predictions]) -> list[str]:
    """On what the finished runs were trained, for how long, and how many images judge them."""
    if not finished:
        return []
    names = _either(each.run.info.name for each in finished)
    images = _either(f"{each.run.info.num_examples['train']:,}" for each in finished)
    total = _either(each.run.config.total for each in finished)
    batch = _either(each.run.config.batch_size for each in finished)
    judges = _either(f"{len(each.labels):,}" for each in finished)
    return [f"Trained on {names}: {images} images, for {total} in batches of {batch}; judged by {judges} others."]


def _either(values: Iterable[Any]) -> str:
    *others, last = dict.fromkeys(map(str, values))
    return f"{', '.join(others)} or {last}" if others else last


def _count(runs: Sequence[Run], states: States) -> list[str]:
    """What is missing."""
    finished = sum(states[run.name].status == "finished" for run in runs)
    lines = [f"{finished} of {len(runs)} runs have finished."]
    return lines + [
        f"{run.name} failed: {states[run.name].error}" for run in runs if states[run.name].status == "failed"
    ]


def _letters(compared: dict[str, Any] | None) -> list[str]:
    """What the letters mean, and about how many seeds more would separate the best row from those that share its."""
    if not compared or len(compared["groups"]) < 2:
        return []
    names = {
        "mcnemar": "McNemar's exact test between single runs",
        "permutation": "a permutation test over seeds",
        "welch": "Welch's t test over seeds, of which there are too few for a permutation test",
    }
    used = {pair["test"] for pair in compared["pairs"]}
    tests = "; ".join(text for test, text in names.items() if test in used)
    line = (
        f"Rows that share a letter are not separated at {compared['alpha']:g}, adjusted for all pairs (Holm): "
        f"{tests or 'a row of one seed against one of several has no test'}."
    )
    seeds = {group["name"]: group["num_seeds"] for group in compared["groups"]}
    best = compared["groups"][0]["name"]
    wanted = [
        f"{pair['b']} {max(pair['seeds_needed'] - min(seeds[best], seeds[pair['b']]), 1)}"
        for pair in compared["pairs"]
        if pair["a"] == best and not pair["separated"] and pair["seeds_needed"]
    ]
    if not wanted:
        return [line]
    return [line, f"To separate {best} from the others about so many more seeds of both: {', '.join(wanted)}."]
