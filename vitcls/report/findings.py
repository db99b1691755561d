"""What a question to a trained run has found: metrics.json, CSV files, plots and one page, written in one move."""

import csv
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from vitcls.core.terminal import printable
from vitcls.report.part import Part


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph of the page."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page, and with `file` a CSV beside it; a row's first cell is its name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    file: str = ""
    values: Sequence[Sequence[Any]] = ()  # of the CSV with its head; head and rows where left out


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the page and its PNG; `draw` returns a matplotlib Figure, or None where there is nothing to draw."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A photo of the page and its PNG, or with shown=False the PNG alone; `image` is one of Pillow."""

    name: str
    title: str
    caption: str
    image: Any
    shown: bool = True


Block = Text | Table | Plot | Picture


def write(part: Part, *, title: str, lead: str, metrics: Mapping[str, Any], blocks: Sequence[Block]) -> None:
    """Writes all of it; what was in the directory is replaced once the new is whole. Numbers are finite or None."""
    from vitcls.report import page

    new = part.new
    text = json.dumps(metrics, indent=2, allow_nan=False)
    (new / "metrics.json").write_text(text + "\n", encoding="utf-8")
    html = [f'<h1>{escape(title)}</h1>\n<p class="soft lead">{escape(lead)}</p>']
    for block in blocks:
        html.append(_html(block, new))
        if isinstance(block, Table) and block.file:
            # The name of a file need not be UTF-8; its bytes are kept.
            (new / f"{block.file}.csv").write_text(_csv(block), encoding="utf-8", errors="surrogateescape")
    (new / "index.html").write_text(printable(page.document(title, html)), encoding="utf-8")
    part.replace()


def _html(block: Block, new: pathlib.Path) -> str:
    from vitcls.report import page, plots

    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Table):
        rows = [[first, *map(_in_two_lines, cells)] for first, *cells in block.rows]
        return f"<h2>{escape(block.title)}</h2>\n{page.table(block.head, rows)}"
    if isinstance(block, Picture):
        path = new / f"{block.name}.png"
        block.image.save(path, optimize=True)
        return page.figures([(block.title, block.caption, path)]) if block.shown else ""
    figure = plots.styled(block.draw)
    path = new / f"{block.name}.png" if figure is not None else None
    if figure is not None:
        figure.savefig(path, dpi=150)
    return page.figures([(block.title, block.caption, path)])


def _in_two_lines(cell: str) -> str | tuple[str, str]:
    """What `interval` says, with its interval below the value: a table of many columns is as narrow as that."""
    number = r"[-+]?[\d.,]+%?"
    found = re.fullmatch(rf"({number}) (\[{number}, {number}\].*)", cell)
    return found.groups() if found else cell


def _csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows(table.values or [table.head, *table.rows])
    return file.getvalue()


ENDS = ("value", "low", "high")


def ends_of(*names: str) -> list[str]:
    """The columns of a CSV for numbers with intervals, that `ends` fills."""
    return [f"{name}_{end}" for name in names for end in ENDS]


def ends(*found: Mapping[str, Any]) -> list[Any]:
    """The cells of numbers with intervals."""
    return [number.get(end) for number in found for end in ENDS]


def interval(found: Mapping[str, Any], form: str) -> str:
    """'value [low, high]', each in a format such as '{:.2%}'; 'none' where there is no value."""
    if found["value"] is None:
        return "none"
    value = form.format(found["value"])
    return value if found.get("low") is None else f"{value} [{form.format(found['low'])}, {form.format(found['high'])}]"
