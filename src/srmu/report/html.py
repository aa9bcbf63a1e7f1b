"""What a page is made of (sections, figures, tables), and writing it as one file without a network.

Every figure stands beside a table of the same numbers: the tables are what is read without
JavaScript, by a screen reader, and on paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from srmu.engine.files import write_whole
from srmu.errors import SrmuError
from srmu.evals.figures import format_number
from srmu.evals.statistics import Estimate
from srmu.report.figures import Figure, label_glyph, render_template


class Cell(NamedTuple):
    """What stands in a table: a text, its interval in small type, what a column is sorted by."""

    text: str
    span: str = ""
    sort: float | None = None


TALL = 20  # lines above which a table of numbers scrolls
Value = Cell | Estimate | str | float | None  # None: not measured


class TableLine(NamedTuple):
    """A row of a table; a click on a label hides the rows of that label."""

    cells: Sequence[Value]
    label: str = ""


@dataclass(frozen=True)
class Table:
    """Lines below `columns`, the first cell of each naming it; `first` stay on top when sorted."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]  # heads; a second line is in small type
    lines: Sequence[TableLine]
    first: Sequence[TableLine] = ()
    words: bool = False  # text, which may break, instead of numbers
    fold: str = ""  # the line that unfolds it; "": it is not folded
    label: str = ""  # whose table it is, where it is one label's
    tall: bool = field(init=False)  # scrolls in a box of its own

    def __post_init__(self) -> None:
        object.__setattr__(self, "tall", len(self.lines) > TALL and not self.words)

    def left(self) -> set[int]:
        """The columns that hold text, which starts at the left."""
        columns = enumerate(zip(*(line.cells for line in self.lines), strict=False))
        return {i for i, cells in columns if any(isinstance(cell, str) and cell for cell in cells)}


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


Block = Table | Figure | Beside | Panels


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    notes: Sequence[str]
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A title, what it says in sentences, sections, and labels that a click shows and hides."""

    title: str
    headline: Sequence[str]
    sections: Sequence[Section]
    command: str = ""
    labels: Sequence[str] = ()

    def write(self, out: Path) -> Path:
        """Write the page as one HTML file that needs nothing from elsewhere."""
        from plotly.offline import get_plotlyjs

        if out.is_dir():
            raise SrmuError(f"{out} is a folder; name a file in it, such as {out / 'report.html'}")
        blocks = [block for section in self.sections for block in section.blocks]
        text = render_template(
            "page.html",
            page=self,
            glyphs={label: label_glyph(i) for i, label in enumerate(self.labels)},
            cell=make_cell,
            plotly="" if all(isinstance(block, Table) for block in blocks) else get_plotlyjs(),
        )
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, text)
        except OSError as error:
            raise SrmuError(f"{out} cannot be written: {error.strerror}") from None
        return out


def make_cell(value: Value) -> Cell:
    """A value as a table shows it: accuracies in per cent, their interval in small type."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, str):
        return Cell(value)
    if isinstance(value, Estimate):
        text, _, span = str(value).partition(" ")
        return Cell(text, span.strip("()"), value.value)
    return Cell(format_number(value), sort=value)


def percent_cell(value: float | None) -> Cell | None:
    """A share without an interval, in per cent."""
    return None if value is None else Cell(f"{100 * value:.1f}", "", value)


def share_cell(share: Estimate) -> Cell:
    """A share such as K*, as a number below 1."""
    return Cell(f"{share.value:.2f}", f"{share.low:.2f}\N{EN DASH}{share.high:.2f}", share.value)
