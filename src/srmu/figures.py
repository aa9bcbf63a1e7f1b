"""What an analysis found: numbers, sentences, and a page with pictures that opens anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from srmu.errors import UserError
from srmu.files import write_whole


@dataclass(frozen=True)
class Panel:
    """One picture and the table of the same numbers: a line, or bars, for each series over `x`."""

    title: str
    x_title: str
    y_title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]  # None: not measured
    kind: Literal["lines", "bars"] = "lines"

    def rows(self) -> list[list[str]]:
        """The numbers as text, a row for each x, as a table shows them."""
        columns = [self.x, *self.series.values()]
        return [[shown(value) for value in row] for row in zip(*columns, strict=True)]

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
        from jinja2 import Environment, PackageLoader
        from plotly.offline import get_plotlyjs

        if out.is_dir():
            raise UserError(f"{out} is a folder; name a file in it, such as {out / 'figure.html'}")
        environment = Environment(loader=PackageLoader("srmu"), autoescape=True, trim_blocks=True)
        page = environment.get_template("figure.html").render(
            analysis=self, plotly=get_plotlyjs() if self.panels else ""
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page)
        return out


def shown(value: float | None) -> str:
    """A number as a person would write it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
