"""What a page is made of (sections, figures, tables), and writing it as one file without a network.

Every figure stands beside a table of the same numbers: the tables are what is read without
JavaScript, by a screen reader, and on paper.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from srmu.engine.files import write_output
from srmu.report.figures import COLOURS, SHAPES, Figure, Row
from srmu.report.format import Value, format_value, load_templates

LABEL = "label"  # the key of a row that is no column: a click on this label hides the row


class Cell(NamedTuple):
    """What stands in a table: a text, its interval in small type, what a column is sorted by."""

    text: str
    span: str = ""
    sort: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows, the first column naming each; of a head's lines the second is in small type."""

    caption: str
    rows: Sequence[Row]
    first: int = 0  # so many rows stay on top when the others are sorted
    words: bool = False  # text, which may break, instead of numbers
    fold: str = ""  # the line that unfolds it; "": it is not folded
    label: str = ""  # whose table it is, where it is one label's

    @property
    def columns(self) -> list[str]:
        return [column for column in self.rows[0] if column != LABEL]

    @property
    def text_columns(self) -> list[str]:
        """The columns that hold text, which starts at the left."""
        return [c for c in self.columns if all(make_cell(row[c]).sort is None for row in self.rows)]


@dataclass(frozen=True)
class Block:
    """Figures in a grid, or one beside the table of its numbers, or a table; `labels` share it."""

    figures: Sequence[Figure] = ()
    table: Table | None = None
    title: str = ""
    notes: Sequence[str] = ()
    labels: Sequence[str] = ()


class Section(NamedTuple):
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

        drawn = any(block.figures for section in self.sections for block in section.blocks)
        shapes = [*SHAPES.values()]
        glyphs = {name: (COLOURS[i % len(COLOURS)], shapes[i % len(shapes)]) for i, name in enumerate(self.labels)}
        template = load_templates().get_template("page.html")
        text = template.render(page=self, glyphs=glyphs, cell=make_cell, plotly=get_plotlyjs() if drawn else "")
        write_output(out, text)
        return out


def make_cell(value: Value) -> Cell:
    """A value as a table shows it: `34.0 (27.1-41.0)` is a number with its interval."""
    text = format_value(value)
    if match := re.fullmatch(r"([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: \((.*)\))?", text):
        return Cell(match[1], match[2] or "", float(match[1]))
    return Cell(text)
