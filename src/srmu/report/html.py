"""What a page is made of (sections, figures, tables), and writing it as one file without a network.

Every figure stands beside a table of the same numbers: the tables are what is read without
JavaScript, by a screen reader, and on paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from srmu.engine.files import write_whole
from srmu.errors import SrmuError

# Read on white and on near-black alike. With five shapes and five dashes: 30 that differ.
from srmu.evals.figures import format_number

COLOURS = ("#2f7fd0", "#d4611c", "#1f9a6b", "#a45cc8", "#b08400", "#d1497b")
GREY = "#808890"
SHAPES = {  # plotly's name of a marker, and the same marker as an SVG path
    "circle": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0",
    "square": "M-4.5,-4.5h9v9h-9z",
    "diamond": "M0,-6L6,0L0,6L-6,0z",
    "triangle-up": "M0,-5.5L5.5,4.5H-5.5z",
    "cross": "M-5.5,-2h3.5v-3.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5z",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


class Cell(NamedTuple):
    """What stands in a table: a text, its interval in small type, what a column is sorted by."""

    text: str
    span: str = ""
    sort: float | None = None


Value = Cell | str | float | None  # None: not measured


class ColumnHead(NamedTuple):
    """A column's head, with a second line in small type."""

    name: str
    note: str = ""


class TableLine(NamedTuple):
    """A row of a table; a click on a label hides the rows of that label."""

    cells: Sequence[Value]
    label: str = ""


@dataclass(frozen=True)
class Table:
    """Lines below `columns`, the first cell of each naming it; `first` stay on top when sorted."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[ColumnHead | str]
    lines: Sequence[TableLine]
    first: Sequence[TableLine] = ()
    tall: bool = False  # scrolls in a box of its own
    words: bool = False  # text, which may break, instead of numbers
    fold: str = ""  # the line that unfolds it; "": it is not folded
    label: str = ""  # whose table it is, where it is one label's

    def left(self) -> set[int]:
        """The columns that hold text, which starts at the left."""
        return {
            i
            for i, column in enumerate(zip(*(line.cells for line in self.lines), strict=False))
            if any(isinstance(value, str) and value for value in column)
        }


@dataclass(frozen=True)
class Figure:
    """A plotly figure and what it shows in words; a trace with the `meta` L is hidden with L."""

    kind: ClassVar[str] = "figure"
    title: str
    said: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    rows: int = 0  # of an axis of names, which the height has to fit


@dataclass(frozen=True)
class Beside:
    """A figure with a table next to it, of the labels that share them."""

    kind: ClassVar[str] = "beside"
    title: str
    figure: Figure
    table: Table
    notes: Sequence[str] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Panels:
    """Figures in a grid."""

    kind: ClassVar[str] = "panels"
    figures: Sequence[Figure]
    title: str = ""
    small: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    notes: Sequence[str]
    blocks: Sequence[Table | Figure | Beside | Panels]


@dataclass(frozen=True)
class Page:
    """A title, what it says in sentences, sections, and labels that a click shows and hides."""

    title: str
    headline: Sequence[str]
    sections: Sequence[Section]
    command: str = ""
    labels: Sequence[str] = ()
    figures: list[Figure] = field(init=False)

    def __post_init__(self) -> None:
        blocks = [block for section in self.sections for block in section.blocks]
        found = [figure for block in blocks for figure in list_figures(block)]
        object.__setattr__(self, "figures", found)

    def write(self, out: Path) -> Path:
        """Write it as one HTML file that needs nothing from elsewhere."""
        from jinja2 import Environment, PackageLoader
        from plotly.offline import get_plotlyjs

        if out.is_dir():
            raise SrmuError(f"{out} is a folder; name a file in it, such as {out / 'report.html'}")
        environment = Environment(
            loader=PackageLoader("srmu.report"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        text = environment.get_template("page.html").render(
            page=self,
            glyphs={label: label_glyph(i) for i, label in enumerate(self.labels)},
            cell=make_cell,
            finite=finite_json,
            Column=ColumnHead,
            plotly=get_plotlyjs() if self.figures else "",
        )
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, text)
        except OSError as error:
            raise SrmuError(f"{out} cannot be written: {error.strerror}") from None
        return out


def list_figures(block: Table | Figure | Beside | Panels) -> list[Figure]:
    if isinstance(block, Figure):
        return [block]
    if isinstance(block, Beside):
        return [block.figure]
    return list(block.figures) if isinstance(block, Panels) else []


def label_glyph(i: int) -> tuple[str, str]:
    """The colour and the SVG path of the i-th label."""
    return COLOURS[i % len(COLOURS)], [*SHAPES.values()][i % len(SHAPES)]


def label_marker(i: int, **more: Any) -> dict[str, Any]:
    """The marker of the i-th label, as plotly wants it."""
    return {"color": COLOURS[i % len(COLOURS)], "symbol": [*SHAPES][i % len(SHAPES)], **more}


def label_stroke(i: int, **more: Any) -> dict[str, Any]:
    """The line of the i-th label, as plotly wants it."""
    return {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % len(DASHES)], **more}


def make_axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": escape(title), "standoff": 8}, **more}


def name_axis(labels: Sequence[str], longest: int = 26) -> dict[str, Any]:
    """A vertical axis of names, from the top down; long names are cut, hovering shows them."""
    short = [label if len(label) <= longest else label[: longest - 1] + "…" for label in labels]
    return {
        "type": "category", "tickmode": "array", "tickvals": list(labels),
        "ticktext": [escape(label) for label in short], "categoryorder": "array",
        "categoryarray": list(labels), "autorange": "reversed", "showgrid": False,
    }  # fmt: skip


def make_cell(value: Value) -> Cell:
    """A value as a table shows it."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, str):
        return Cell(value)
    return Cell(format_number(value), sort=value)


def finite_json(value: Any) -> Any:
    """Traces as JSON can say them: null for what is no number."""
    if isinstance(value, Mapping):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
