"""The page of a run's groups."""

from collections.abc import Sequence
from typing import Any

from vitcls.metrics.groups import SMALL
from vitcls.report.findings import ENDS, Block, Plot, Table, Text, ends, ends_of, interval

_WORDS = {
    "accuracy": "accuracy",
    "demographic_parity": "share of images that get class {} (demographic parity)",
    "true_positive_rate": "class {} recognised (equalised odds, true positives)",
    "false_positive_rate": "others taken for class {} (equalised odds, false positives)",
}


def blocks(found: dict[str, Any], class_names: Sequence[str]) -> list[Block]:
    """Tables and plot of what `metrics.groups.by_group` found."""
    differences = found["differences"] or {}
    rows = sorted(found["groups"], key=lambda row: (row["small"], row["accuracy"]["value"]))
    return [
        Table(
            "By group",
            [
                "Group",
                "Images",
                "Accuracy [95 % interval]",
                "ECE [95 % interval]",
                "Mean confidence [95 % interval]",
                "p against the rest",
            ],
            [
                [
                    row["group"] + (f" (under {SMALL} images: not ranked)" if row["small"] else ""),
                    f"{row['num_examples']:,}",
                    interval(row["accuracy"], "{:.2%}"),
                    interval(row["ece"], "{:.2%}"),
                    interval(row["mean_confidence"], "{:.2%}"),
                    "" if row["small"] else f"{row['p_holm']:.4f}",
                ]
                for row in rows
            ],
            "groups",
            _numbers(rows),
        ),
        Plot(
            "groups",
            "Accuracy by group",
            "Accuracy by group with 95 % intervals; the worst is on top, small groups are grey.",
            lambda: _drawn(rows),
        ),
        *([] if differences else [Text(f"No two groups have {SMALL} images each: no differences are measured.")]),
        Table(
            "Largest differences between groups",
            ["Difference", "Value [95 % interval]", "p", "Highest in", "Lowest in"],
            [_difference(name, row, class_names) for name, row in differences.items()],
            "differences",
            [
                ["difference", "class", *ENDS, "p", "highest", "lowest"],
                *(_difference_cells(name, row, class_names) for name, row in differences.items() if row),
            ],
        ),
        Text(
            "p against the rest is of Fisher's exact test, adjusted for all groups (Holm). p of a difference is how "
            "often groups that are dealt anew differ as much, in any class."
        ),
    ]


def _numbers(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """The CSV of the groups."""
    numbers = ("accuracy", "ece", "mean_confidence")
    head = ["group", "num_examples", "small", *ends_of(*numbers), "p_holm"]
    return [head] + [
        [row["group"], row["num_examples"], row["small"], *ends(*(row[name] for name in numbers)), row.get("p_holm")]
        for row in rows
    ]


def _difference(name: str, row: dict[str, Any] | None, class_names: Sequence[str]) -> list[str]:
    if row is None:
        return [_WORDS[name].format("of any kind"), f"no class has {SMALL} images in two groups", "", "", ""]
    words = _WORDS[name].format("" if row["class"] is None else f"'{class_names[row['class']]}'")
    return [words, interval(row, "{:.2%}"), f"{row['p']:.4f}", row["highest"], row["lowest"]]


def _difference_cells(name: str, row: dict[str, Any], class_names: Sequence[str]) -> list[Any]:
    """The same for the CSV."""
    of = "" if row["class"] is None else class_names[row["class"]]
    return [name, of, *ends(row), row["p"], row["highest"], row["lowest"]]


def _drawn(rows: Sequence[dict[str, Any]]):
    from vitcls.report import group_plots

    return group_plots.accuracy(rows)
