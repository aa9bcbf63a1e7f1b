"""What an analysis found: numbers, sentences, and a page with pictures that opens anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from srmu.pages import (
    Beside,
    Figure,
    Line,
    Page,
    Section,
    Table,
    axis,
    marker,
    shown,
    stroke,
)


@dataclass(frozen=True)
class Panel:
    """One picture and the table of the same numbers: a line, or bars, for each series over `x`."""

    title: str
    x_title: str
    y_title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]  # None: not measured
    kind: Literal["lines", "bars"] = "lines"

    def section(self) -> Section:
        """It as a part of a page."""
        bars = {"type": "bar", "opacity": 0.65}
        traces = []
        for i, (name, values) in enumerate(self.series.items()):
            if self.kind == "bars":
                look = bars | {"marker": {"color": marker(i)["color"]}}
            else:
                look = {"mode": "lines+markers", "line": stroke(i, width=2), "marker": marker(i)}
            traces.append({"name": escape(name), "x": [*self.x], "y": [*values], **look})
        layout = {
            "xaxis": axis(self.x_title), "yaxis": axis(self.y_title), "barmode": "overlay",
            "showlegend": len(traces) > 1,
        }  # fmt: skip
        lines = [Line(row) for row in zip(self.x, *self.series.values(), strict=True)]
        table = Table(self.y_title, [self.x_title, *self.series], lines, tall=True)
        return Section(self.title, [], [Beside("", Figure("", self.said(), traces, layout), table)])

    def said(self) -> str:
        """The picture in words, for those who do not see it."""
        parts = []
        for name, values in self.series.items():
            known = [(v, x) for v, x in zip(values, self.x, strict=True) if v is not None]
            if known:
                (low, at_low), (high, at_high) = min(known), max(known)
                parts.append(
                    f"{name}: lowest {shown(low)} at {shown(at_low)}, "
                    f"highest {shown(high)} at {shown(at_high)}"
                )
        return f"{self.title}, {self.y_title} by {self.x_title}. {'; '.join(parts)}."


@dataclass(frozen=True)
class Analysis:
    """Plain numbers (JSON values), what they say in sentences, and pictures of them.

    None of the three holds a word of a text.
    """

    title: str
    numbers: dict[str, Any]
    sentences: list[str]
    panels: list[Panel] = field(default_factory=list)

    def write(self, out: Path) -> Path:
        """Write it as one HTML file that needs nothing from elsewhere."""
        parts = [panel.section() for panel in self.panels]
        return Page(self.title, self.sentences, parts).write(out)
