"""The plot of a table: every row is in it, however many there are."""

from vitcls.report import plots, table_plots


def test_more_series_than_colours_are_all_drawn_and_differ():
    points = [(f"row{i}", f"row{i}", x, 0.5 + 0.02 * i) for i in range(15) for x in range(3)]
    figure = plots.styled(lambda: table_plots.by_x(points, "Accuracy", "severity", log=False))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"row{i}" for i in range(15)]
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 3]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 15
