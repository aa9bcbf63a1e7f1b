"""Pages of analyses: each picture beside the table of its numbers."""

from __future__ import annotations

from pathlib import Path

from srmu.evals.figures import Analysis, Panel
from srmu.report.figures import Series, bar_look, draw_figure, label_look
from srmu.report.html import Block, Page, Section, Table


def write_analysis(analysis: Analysis, out: Path) -> Path:
    """Write an analysis as one HTML file that needs nothing from elsewhere."""
    parts = [Section(panel.title, [], [draw_panel(panel)]) for panel in analysis.panels]
    return Page(analysis.title, analysis.sentences, parts).write(out)


def draw_panel(panel: Panel) -> Block:
    """A panel's picture beside its table."""
    series = []
    for i, (name, values) in enumerate(panel.series.items()):
        look = bar_look(i) if panel.kind == "bars" else label_look(i, mode="lines+markers")
        rows = [{panel.x_title: x, panel.y_title: y} for x, y in zip(panel.x, values, strict=True)]
        series.append(Series(name, rows, look))
    lines = [
        {panel.x_title: x} | dict(zip(panel.series, values, strict=True))
        for x, *values in zip(panel.x, *panel.series.values(), strict=True)
    ]
    figure = draw_figure("", series, panel.x_title, panel.y_title, subject=panel.title)
    return Block([figure], Table(panel.y_title, lines))
