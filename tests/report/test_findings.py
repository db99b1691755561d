"""The page, the CSV files and the metrics of a question to a run."""

import os

import pytest

from vitcls.core.errors import UserError
from vitcls.report import findings, fonts, plots
from vitcls.report.findings import Table, Text, interval
from vitcls.report.part import Part

FOUND = {"value": 0.5, "low": 0.25, "high": 0.75}


def written(tmp_path, *blocks):
    with Part(tmp_path / "out") as made:
        findings.write(made, title="T", lead="L", metrics={}, blocks=blocks)
    return tmp_path / "out"


def test_an_interval_stands_below_its_value(tmp_path):
    """So that a table of ten columns fits the page; what only looks like one, as a class [0, 1], is a name."""
    row = ["[0, 1]", interval(FOUND, "{:.0%}"), interval(FOUND, "{:.2f}") + ", FAILS", "two [2, 3] more"]
    page = (written(tmp_path, Table("T", ["A", "B", "C", "D"], [row])) / "index.html").read_text(encoding="utf-8")
    assert '<span class="value">50%</span><br><small class="soft">[25%, 75%]</small>' in page
    assert '<span class="value">0.50</span><br><small class="soft">[0.25, 0.75], FAILS</small>' in page
    assert '<th scope="row">[0, 1]</th>' in page and "<td>two [2, 3] more</td>" in page


def test_names_of_files_keep_their_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    out = written(tmp_path, Text(name), Table("T", ["File"], [[name]], "files"))
    assert (out / "files.csv").read_bytes() == b"File\ncaf\xe9.png\n"
    assert "png" in (out / "index.html").read_text(encoding="utf-8")


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        written(tmp_path / "file", Text("x"))


def test_letters_come_from_the_fonts_that_the_machine_has(monkeypatch):
    """Of letters that no font has there are boxes, since matplotlib would warn of them."""
    name = "caf\u00e9 \u732b \U0010fffd"
    has = fonts.can_draw("\u732b")
    assert plots.shorten(name) == ("caf\u00e9 \u732b \u25a1" if has else "caf\u00e9 \u25a1 \u25a1")
    monkeypatch.setattr(fonts, "families", lambda: (fonts.OWN,))
    assert plots.shorten(name) == "caf\u00e9 \u25a1 \u25a1"
    assert fonts.file_for("\u732b") == fonts.file_for("a")  # of those that there are
