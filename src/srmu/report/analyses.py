"""Pages of analyses: each picture beside the table of its numbers."""

from __future__ import annotations

from pathlib import Path

from srmu.evals.figures import Analysis, Panel
from srmu.report.figures import Series, bar_look, draw_figure, label_look
from srmu.report.html import Beside, Page, Section, Table, TableLine


def write_analysis(analysis: Analysis, out: Path) -> Path:
    """Write an analysis as one HTML file that needs nothing from elsewhere."""
    parts = [Section(panel.title, [], [draw_panel(panel)]) for panel in analysis.panels]
    return Page(analysis.title, analysis.sentences, parts).write(out)


def draw_panel(panel: Panel) -> Beside:
    """A panel's picture beside its table."""
    series = []
    for i, (name, values) in enumerate(panel.series.items()):
        look = bar_look(i) if panel.kind == "bars" else label_look(i, mode="lines+markers")
        rows = [{panel.x_title: x, panel.y_title: y} for x, y in zip(panel.x, values, strict=True)]
        series.append(Series(name, rows, look))
    lines = [TableLine(row) for row in zip(panel.x, *panel.series.values(), strict=True)]
    table = Table(panel.y_title, [panel.x_title, *panel.series], lines)
    legend = len(series) > 1
    figure = draw_figure("", series, panel.x_title, panel.y_title, legend=legend, subject=panel.title)
    return Beside("", figure, table)
