"""Pages of analyses: each picture beside the table of its numbers."""

from __future__ import annotations

from html import escape
from pathlib import Path

from srmu.evals.figures import Analysis, Panel, format_number
from srmu.report.html import (
    Beside,
    Figure,
    Page,
    Section,
    Table,
    TableLine,
    label_marker,
    label_stroke,
    make_axis,
)


def write_analysis(analysis: Analysis, out: Path) -> Path:
    """Write an analysis as one HTML file that needs nothing from elsewhere."""
    parts = [draw_panel(panel) for panel in analysis.panels]
    return Page(analysis.title, analysis.sentences, parts).write(out)


def draw_panel(panel: Panel) -> Section:
    """It as a part of a page."""
    bars = {"type": "bar", "opacity": 0.65}
    traces = []
    for i, (name, values) in enumerate(panel.series.items()):
        if panel.kind == "bars":
            look = bars | {"marker": {"color": label_marker(i)["color"]}}
        else:
            look = {
                "mode": "lines+markers",
                "line": label_stroke(i, width=2),
                "marker": label_marker(i),
            }
        traces.append({"name": escape(name), "x": [*panel.x], "y": [*values], **look})
    layout = {
        "xaxis": make_axis(panel.x_title), "yaxis": make_axis(panel.y_title), "barmode": "overlay",
        "showlegend": len(traces) > 1,
    }  # fmt: skip
    lines = [TableLine(row) for row in zip(panel.x, *panel.series.values(), strict=True)]
    table = Table(panel.y_title, [panel.x_title, *panel.series], lines, tall=True)
    return Section(
        panel.title, [], [Beside("", Figure("", describe_panel(panel), traces, layout), table)]
    )


def describe_panel(panel: Panel) -> str:
    """The picture in words, for those who do not see it."""
    parts = []
    for name, values in panel.series.items():
        known = [(v, x) for v, x in zip(values, panel.x, strict=True) if v is not None]
        if known:
            (low, at_low), (high, at_high) = min(known), max(known)
            parts.append(
                f"{name}: lowest {format_number(low)} at {format_number(at_low)}, "
                f"highest {format_number(high)} at {format_number(at_high)}"
            )
    return f"{panel.title}, {panel.y_title} by {panel.x_title}. {'; '.join(parts)}."
