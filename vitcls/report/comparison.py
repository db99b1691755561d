"""A comparison of runs as Markdown, as JSON and as a page; what it shows is what `metrics.comparison.compare` found."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from vitcls.core.terminal import printable
from vitcls.metrics import METRICS
from vitcls.report.part import Part

FILES = (
    "compare.md",
    "compare.json",
    "index.html",
    "intervals.png",
    "differences.png",
    "curves.png",
    "disagreements.png",
)
Table = tuple[list[str], list[list[str | tuple[str, str]]]]  # of a pair the second stands in brackets, or below
_MOST_NAMED = 6  # pairs, in a line of text
_MINUS = str.maketrans("-", "−")


def group_table(comparison: dict[str, Any]) -> Table:
    """Head and rows: every group with its seeds, its letters and its accuracy."""
    head = ["Group", "Seeds", "Letters", METRICS["accuracy"].label]
    rows = [
        [group["name"], str(group["num_seeds"]), group["letters"], _value("accuracy", group["metrics"]["accuracy"])]
        for group in comparison["groups"]
    ]
    return head, rows


def metric_table(comparison: dict[str, Any]) -> Table:
    """Head and rows: every group with its other metrics."""
    names = _other_metrics(comparison)
    rows = [
        [group["name"], *(_value(name, group["metrics"][name]) for name in names)] for group in comparison["groups"]
    ]
    return ["Group", *(METRICS[name].label for name in names)], rows


def _other_metrics(comparison: dict[str, Any]) -> list[str]:
    return [name for name in comparison["groups"][0]["metrics"] if name != "accuracy"]


def _value(name: str, numbers: dict[str, float | None]) -> tuple[str, str]:
    """Such as ('98.61% ± 0.12%', '97.22 to 99.72'); the deviation is that between seeds, where there are several."""
    low, high = (METRICS[name].show(numbers[key]).rstrip("%") for key in ("low", "high"))
    spread = "" if numbers["deviation"] is None else f" ± {METRICS[name].show(numbers['deviation'])}"
    return f"{METRICS[name].show(numbers['value'])}{spread}", f"{low} to {high}"


def pair_table(comparison: dict[str, Any]) -> Table:
    """Head and rows: every pair with its test and its difference in accuracy."""
    head = ["Pair", _difference_label("accuracy"), "Test", "p", "p, Holm", "Separated"]
    rows = [
        [
            _name(pair),
            _difference("accuracy", pair["differences"]["accuracy"]),
            _test(pair),
            _p(pair["p"]),
            _p(pair["p_holm"]),
            "yes" if pair["separated"] else "no",
        ]
        for pair in comparison["pairs"]
    ]
    return head, rows


def difference_table(comparison: dict[str, Any]) -> Table:
    """Head and rows: every pair with its differences in the other metrics."""
    names = _other_metrics(comparison)
    rows = [
        [_name(pair), *(_difference(name, pair["differences"][name]) for name in names)] for pair in comparison["pairs"]
    ]
    return ["Pair", *map(_difference_label, names)], rows


def _name(pair: dict[str, Any]) -> str:
    return f"{pair['a']} − {pair['b']}"


def _test(pair: dict[str, Any]) -> str:
    if pair["test"] == "mcnemar":
        return f"McNemar, {pair['only_a']:,} : {pair['only_b']:,}"
    if pair["test"] == "permutation":
        return f"permutation, {'all ' if pair['exact'] else ''}{pair['permutations']:,}"
    if pair["test"] == "welch":
        return f"Welch, t({pair['freedom']:.1f}) = {pair['t']:.2f}"
    return "none: one of them has one seed"


def _p(p: float | None) -> str:
    if p is None:
        return "n/a"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _difference(name: str, numbers: dict[str, float]) -> tuple[str, str]:
    signed = METRICS[name].format.replace("{:", "{:+")  # points are what is left of percent without its sign
    value, low, high = (signed.format(numbers[key]).rstrip("%").translate(_MINUS) for key in ("value", "low", "high"))
    return value, f"{low} to {high}"


def _difference_label(name: str) -> str:
    return METRICS[name].label + (", points" if METRICS[name].format.endswith("%}") else "")


def more_seeds(comparison: dict[str, Any]) -> list[str]:
    """About how many more seeds would separate the pairs that differ in the mean and are not: a line for each.

    Pairs of which one group has a single seed have one line together.
    """
    seeds = {group["name"]: group["num_seeds"] for group in comparison["groups"]}
    together = [
        pair
        for pair in comparison["pairs"]
        if not pair["separated"] and abs(pair["differences"]["accuracy"]["value"]) > 1e-9
    ]
    known = [pair for pair in together if min(seeds[pair["a"]], seeds[pair["b"]]) > 1]
    lines = [
        f"{pair['a']} and {pair['b']} differ by {100 * abs(pair['differences']['accuracy']['value']):.2f} points of "
        f"accuracy: {_more(pair, seeds)}."
        for pair in known
    ]
    unknown = [f"{pair['a']} and {pair['b']}" for pair in together if pair not in known]
    if unknown:
        names = "; ".join(unknown[:_MOST_NAMED]) + ("; ..." if len(unknown) > _MOST_NAMED else "")
        lines.append(f"More seeds to separate {names}: n/a, the deviation between seeds is not known from one.")
    return lines


def _more(pair: dict[str, Any], seeds: Mapping[str, int]) -> str:
    needed = pair["seeds_needed"]
    if needed is None:
        return "no number of seeds that can be trained would separate them"
    more = {name: needed - seeds[name] for name in (pair["a"], pair["b"]) if needed > seeds[name]}
    if not more:
        return f"such a difference needs about {needed} seeds each, which are there; chance or the correction hides it"
    return "about " + " and ".join(f"{count:,} more of {name}" for name, count in more.items()) + " would separate them"


def explanation(comparison: dict[str, Any]) -> list[str]:
    """Which number answers which question, one paragraph each."""
    tests = {pair["test"] for pair in comparison["pairs"]}
    tested = sum(pair["p"] is not None for pair in comparison["pairs"])
    level, alpha = f"{100 * comparison['level']:.0f} %", f"{comparison['alpha']:g}"
    texts = {
        "mcnemar": "McNemar's exact test asks whether two trained models, with the weights that they have, differ in "
        "accuracy on images like these; a : b are the images that only the first and only the second gets right. It "
        "says nothing of the recipe: another seed may turn it around.",
        "permutation": "The permutation test asks whether two recipes differ when they are trained anew, by the "
        "accuracies of their seeds on these images.",
        "welch": "Welch's t test asks whether two recipes differ when they are trained anew, by the accuracies of "
        "their seeds on these images, and takes these as normal. It stands where a permutation test, which takes "
        "nothing for granted, has too few seeds to separate any pair: of n each, its p cannot be less than "
        "2 / C(2n, n), 0.33 for 2, 0.1 for 3, 0.029 for 4, before Holm's correction.",
        None: "A group of one seed against one of several has no test here: train more seeds of the former.",
    }
    resampling = (
        f"Intervals of {level} are of the bootstrap: {comparison['resamples']:,} times the images were drawn anew, the "
        "same ones for all. They are of these trained models, without what another seed would change, and each for "
        "itself, not adjusted for their number; ± is the standard deviation between seeds."
    )
    if not tests:
        return [resampling]
    return [
        *(text for test, text in texts.items() if test in tests),
        resampling,
        f"Groups share a letter unless their test separates them: p, by Holm's correction over all pairs that have a "
        f"test ({tested}), at most {alpha}. To share a letter is not to be equal. More seeds are estimated for a power "
        "of 0.8 at the first level of that correction, from the pooled deviation between seeds.",
    ]


def to_markdown(comparison: dict[str, Any]) -> str:
    """compare.md: tables and what they mean."""
    parts = [f"# {_plain(_title(comparison))}", _plain(_lead(comparison))]
    parts += [markdown_table(*table) for _, table in _tables(comparison)]
    if lines := more_seeds(comparison):
        parts.append("\n".join(f"- {_plain(line)}" for line in lines))
    return "\n\n".join([*parts, *explanation(comparison)]) + "\n"


def _tables(comparison: dict[str, Any]) -> list[tuple[str, Table]]:
    """All tables with their headings, in order."""
    tables = [("Groups", group_table(comparison)), ("Other metrics", metric_table(comparison))]
    if comparison["pairs"]:
        tables += [("Pairs", pair_table(comparison)), ("Differences", difference_table(comparison))]
    return tables


def _title(comparison: dict[str, Any]) -> str:
    groups = len(comparison["groups"])
    return f"{groups} {'group' if groups == 1 else 'groups'} of runs on {comparison['dataset']}"


def _lead(comparison: dict[str, Any]) -> str:
    return (
        f"{comparison['num_examples']:,} images of the {comparison['split']} split, {len(comparison['runs']):,} runs; "
        "the best accuracy first."
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> str:
    """Columns are padded, so that it can be read on a terminal too."""
    lines = [[_plain(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def _plain(text: str | tuple[str, str]) -> str:
    """A text that stays in its cell and its line."""
    text = text if isinstance(text, str) else f"{text[0]} ({text[1]})"
    return " ".join(printable(text).split()).replace("|", "\\|")


def write(
    part: Part,
    comparison: dict[str, Any],
    *,
    class_names: Sequence[str],
    curves: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]],
    images: Callable[[np.ndarray], np.ndarray] | str,
) -> None:
    """Writes FILES; a comparison that was there is replaced in one move.

    Args:
      comparison: what `metrics.comparison.compare` gives, and level, resamples, dataset, split, num_examples, runs,
        config_differences and disagreements; every number finite or None.
      curves: as `comparison_plots.curves` takes them.
      images: gives uint8 [n, H, W, C] for places [n] in the split; or why there are none.
    """
    from vitcls.report import plots

    new = part.new
    text = json.dumps(comparison | {"units": _units(comparison)}, indent=2, allow_nan=False)
    (new / "compare.json").write_text(text + "\n", encoding="utf-8")
    (new / "compare.md").write_text(to_markdown(comparison), encoding="utf-8")
    shown = []
    for name, (title, caption, missing, draw) in _drawings(comparison, class_names, curves, images).items():
        figure = plots.styled(draw)
        path = new / f"{name}.png" if figure is not None else None
        if figure is not None:
            figure.savefig(path, dpi=150)
        shown.append((title, caption if path else missing, path))
    (new / "index.html").write_text(printable(to_html(comparison, class_names, shown)), encoding="utf-8")
    part.replace()


def _drawings(
    comparison: dict[str, Any],
    class_names: Sequence[str],
    curves: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]],
    images: Callable[[np.ndarray], np.ndarray] | str,
) -> dict[str, tuple[str, str, str, Callable]]:
    """The plots, in order: name of the file -> title, caption, what is said without a plot, and what draws it."""
    from vitcls.report import comparison_plots

    rows = comparison["disagreements"]
    missing = images if isinstance(images, str) and rows else "the groups agree on all images."
    return {
        "intervals": (
            "Metrics",
            "All metrics with their intervals.",
            "there is no metric.",
            lambda: comparison_plots.intervals(comparison),
        ),
        "differences": (
            "Differences in accuracy",
            "Every pair with the interval of these trained models; blue where its test separates it.",
            "there is one group.",
            lambda: comparison_plots.differences(comparison),
        ),
        "curves": (
            "Training",
            "On the validation split, one line a seed.",
            "nothing was logged.",
            lambda: comparison_plots.curves(curves),
        ),
        "disagreements": (
            "Where they differ most",
            "True class; then of the two groups furthest apart the prediction and the probability of the true class.",
            missing,
            lambda: None if isinstance(images, str) else comparison_plots.disagreements(rows, class_names, images),
        ),
    }


def _units(comparison: dict[str, Any]) -> dict[str, str]:
    return {name: METRICS[name].unit for name in comparison["groups"][0]["metrics"]}


def to_html(
    comparison: dict[str, Any],
    class_names: Sequence[str],
    plots: Sequence[tuple[str, str, pathlib.Path | None]],
) -> str:
    """index.html: one file that needs nothing else; every text in it is escaped."""
    from vitcls.report import page

    title = _title(comparison)
    runs = [[run["workdir"], run["group"], str(run["seed"]), str(run["checkpoint_step"])] for run in comparison["runs"]]
    keys = [[key, *map(str, values)] for key, values in comparison["config_differences"].items()]
    names = [group["name"] for group in comparison["groups"]]
    notes = [*more_seeds(comparison), *explanation(comparison)]
    return page.document(
        title,
        [
            f'<h1>{escape(title)}</h1>\n<p class="soft lead">{escape(_lead(comparison))}</p>',
            *(f"<h2>{heading}</h2>\n{page.table(*table)}" for heading, table in _tables(comparison)),
            "<h2>What this says</h2>\n" + "\n".join(f"<p>{escape(note)}</p>" for note in notes),
            page.figures(plots),
            f"<h2>How the configs differ</h2>\n{page.table(['Key', *names], keys)}" if keys else "",
            f"<h2>Images on which they differ most</h2>\n{_disagreement_table(comparison, class_names)}",
            f"<h2>Runs</h2>\n{page.table(['Workdir', 'Group', 'Seed', 'Step'], runs)}",
        ],
    )


def _disagreement_table(comparison: dict[str, Any], class_names: Sequence[str]) -> str:
    from vitcls.report import page

    rows = comparison["disagreements"]
    names = list(rows[0]["groups"]) if rows else []
    cells = [
        [
            str(row["id"]),
            class_names[row["label"]],
            *(
                f"{class_names[said['predicted']]}, {said['true_probability']:.0%}"
                for said in (row["groups"][name] for name in names)
            ),
        ]
        for row in rows
    ]
    return page.table(["Place in the split", "True class", *names], cells)
