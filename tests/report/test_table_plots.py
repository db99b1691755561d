"""The plot of a table: every row is in it, however many there are."""

import pytest

from vitcls.report import plots, table_plots


def test_more_series_than_colours_are_all_drawn_and_differ():
    points = [(f"row{i}", f"row{i}", x, 0.5 + 0.02 * i) for i in range(15) for x in range(3)]
    figure = plots.styled(lambda: table_plots.by_x(points, "Accuracy", "severity", log=False))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"row{i}" for i in range(15)]
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 3]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 15


def test_rows_are_dots_with_a_line_at_their_mean_and_no_bars_from_elsewhere_than_zero():
    values = {"plain": (0.95, 0.97), "improved": (0.98, 0.99)}
    points = [(row, row, None, value) for row, runs in values.items() for value in runs]
    (axes,) = plots.styled(lambda: table_plots.scores(points, "Accuracy")).axes
    assert not axes.patches
    assert [text.get_text() for text in axes.get_yticklabels()] == list(values)
    drawn = [(list(line.get_xdata()), line.get_marker() == "o") for line in axes.lines]
    assert [sorted(100 * value for value in runs) for runs in values.values()] == [sorted(x) for x, dot in drawn if dot]
    assert [x for x, dot in drawn if not dot] == [[pytest.approx(mean)] * 2 for mean in (96, 98.5)]
