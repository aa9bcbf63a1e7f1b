"""From rows with named columns to a figure: intervals, names, labels, words."""

import json

import pytest

from srmu.evals.figures import Panel
from srmu.evals.statistics import Estimate
from srmu.report.figures import Series, bar_look, draw_figure, label_look, mark_value
from srmu.report.html import Page, Section
from srmu.report.studies import draw_panel

KEPT, LOST = "accuracy kept", "accuracy lost"


def one_mark(name, lost, kept, label=""):
    row = {LOST: Estimate(lost, lost - 0.1, lost + 0.2), KEPT: Estimate(kept), "kappa": 8}
    return Series(name, [row], label_look(0), label)


def test_a_mark_has_its_intervals_and_tells_every_column():
    figure = draw_figure("", [one_mark("SRMU", 0.5, 0.9)], LOST, KEPT, x_axis={"tickformat": ".0%"})
    (trace,) = figure.plot.data
    assert (trace.x, trace.y) == ((0.5,), (0.9,))
    assert trace.error_x.array[0] == pytest.approx(0.2)
    assert trace.error_x.arrayminus[0] == pytest.approx(0.1)
    assert trace.error_y.array is None  # no interval, no bar
    assert trace.customdata == (["50.0 (40.0\N{EN DASH}70.0)", "0.9", "8"],)
    assert "<b>SRMU</b><br>accuracy lost %{customdata[0]}" in trace.hovertemplate
    assert figure.words.endswith("SRMU: accuracy lost 50.0 (40.0\N{EN DASH}70.0), accuracy kept 0.9, kappa 8.")


def test_numbers_that_are_no_accuracies_are_not_in_per_cent():
    rows = [{"seconds": Estimate(12.0, 10.0, 14.0), "memory": 3.0}]
    figure = draw_figure("", [Series("RMU", rows, label_look(0))], "seconds", "memory")
    assert figure.plot.data[0].customdata == (["12 (10\N{EN DASH}14)", "3"],)


def test_names_make_an_axis_from_the_top_down():
    rows = [{"attack": name, "accuracy": value} for name, value in (("a" * 40, 0.9), ("b", 0.2))]
    figure = draw_figure("", [Series("bars", rows, bar_look(0))], "accuracy", "attack")
    axis = figure.plot.layout.yaxis
    assert (figure.names, axis.autorange, axis.categoryarray) == (2, "reversed", ("a" * 40, "b"))
    assert len(axis.ticktext[0]) == 26  # cut; hovering and the table have it whole
    assert figure.plot.data[0].orientation == "h"
    assert "0.9 at " + "a" * 40 in figure.words


def test_a_label_is_a_group_that_a_click_hides():
    series = [one_mark("SRMU", 0.5, 0.9, label="SRMU"), one_mark("original", 0.1, 1.0)]
    figure = draw_figure("", series, LOST, KEPT)
    assert [trace.legendgroup for trace in figure.plot.data] == ["SRMU", None]
    assert [trace.showlegend for trace in figure.plot.data] == [False, None]


def test_a_value_is_marked_with_its_name():
    figure = draw_figure("", [one_mark("SRMU", 0.5, 0.9)], LOST, KEPT)
    mark_value(figure, "<chance>", x=0.25)
    (line,), (name,) = figure.plot.layout.shapes, figure.plot.layout.annotations
    assert (line.x0, line.x1, name.text) == (0.25, 0.25, "&lt;chance&gt;")


def test_what_was_not_measured_is_null_and_said(tmp_path):
    panel = Panel("Layers", "layer", "score", [1, 2], {"a": [None, None], "b": [0.5, float("nan")]})
    block = draw_panel(panel)
    assert "a: not measured" in block.figures[0].words
    html = Page("", [], [Section("", [], [block])]).write(tmp_path / "page.html").read_text()
    data = json.loads(html.partition('class="figure">')[2].partition("</script>")[0])["data"]
    assert [trace["y"] for trace in data] == [[None, None], [0.5, None]]
