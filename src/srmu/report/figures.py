"""From the rows of a table to a plotly figure, and what it shows in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go

from srmu.evals.statistics import Estimate
from srmu.report.format import Value, format_value

# Read on white and on near-black alike. With five shapes and five dashes: 30 that differ.
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
LONGEST = 26  # characters of a name on an axis

Row = Mapping[str, Any]  # a Value by column
Look = Mapping[str, Any]  # what a trace of plotly takes: `mode`, `marker`, `line`; a bar no mode


class Series(NamedTuple):
    """Rows with one name and one look; a click on their label, if they have one, hides them."""

    name: str
    rows: Sequence[Row]
    look: Look
    label: str = ""


@dataclass(frozen=True)
class Figure:
    """A plotly figure, its title, and what it shows in words.

    `names`: how many an axis lists; `shape`: the width over the height of a map.
    """

    title: str
    words: str
    plot: go.Figure
    names: int = 0
    shape: float = 0


def draw_figure(
    title: str,
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    x_axis: Mapping[str, Any] = {},
    y_axis: Mapping[str, Any] = {},
    subject: str = "",
) -> Figure:
    """Draw the column `y` of the rows against their column `x`; hovering shows every column.

    A column of strings becomes an axis of names. `x_axis` and `y_axis` are further options of
    plotly's axes, such as `tickformat`. `subject` starts the words where there is no title.
    """
    axes = [
        make_axis(column, [row[column] for one in series for row in one.rows], options)
        for column, options in ((x, x_axis), (y, y_axis))
    ]
    if names := axes[1].get("categoryarray", []):
        axes[1] |= {"autorange": "reversed", "title": None}
    forms = {column: axis.get("tickformat", "") for column, axis in zip((x, y), axes, strict=True)}
    plot = go.Figure([draw_series(one, x, y, forms) for one in series])
    legend = len(series) > 1 and not all(one.label for one in series)  # labels have buttons
    plot.update_layout(template=None, showlegend=legend, xaxis=axes[0], yaxis=axes[1], bargap=0.35, barmode="overlay")
    words = "; ".join(describe_series(one, x, y, forms) for one in series)
    about = f"{title or subject}: " if title or subject else ""
    return Figure(title, f"{about}{y} by {x}. {words}.", plot, len(names))


def draw_series(one: Series, x: str, y: str, forms: Mapping[str, str]) -> Any:
    """One trace of plotly, with error bars where the values have intervals."""
    columns = [*one.rows[0]] if one.rows else []
    hover = [f"{escape(column)} %{{customdata[{i}]}}" for i, column in enumerate(columns)]
    options: dict[str, Any] = {
        "name": escape(one.name),
        "hovertemplate": "<br>".join([f"<b>{escape(one.name)}</b>", *hover]) + "<extra></extra>",
        "customdata": [[escape(format_value(row.get(c), forms.get(c))) for c in columns] for row in one.rows],
        **one.look,
    }
    for axis, column in (("x", x), ("y", y)):
        values = [row[column] for row in one.rows]
        options[axis] = [v.value if isinstance(v, Estimate) else v for v in values]
        spans = [v if isinstance(v, Estimate) and v.has_interval else Estimate(0, 0, 0) for v in values]
        if any(span.low < span.high for span in spans):
            options[f"error_{axis}"] = {
                "array": [span.high - span.value for span in spans],
                "arrayminus": [span.value - span.low for span in spans],
                "thickness": 1.25, "width": 0, "color": one.look["marker"]["color"],
            }  # fmt: skip
    if one.label:
        options |= {"legendgroup": one.label, "showlegend": False}
    if "mode" in one.look:
        return go.Scatter(cliponaxis=False, **options)
    return go.Bar(orientation="h" if any(isinstance(v, str) for v in options["y"]) else "v", **options)


def make_axis(title: str, values: Sequence[Value], options: Look) -> dict[str, Any]:
    """An axis; of strings an axis of names, which hovering shows whole where they are long."""
    axis: dict[str, Any] = {"title": title}
    if names := list(dict.fromkeys(value for value in values if isinstance(value, str))):
        short = [n if len(n) <= LONGEST else f"{n[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}" for n in names]
        axis |= {"type": "category", "categoryarray": names, "tickvals": names, "ticktext": [*map(escape, short)]}
    axis |= options
    if axis["title"] is not None:
        axis["title"] = {"text": escape(axis["title"]), "standoff": 8}
    return axis


def describe_series(one: Series, x: str, y: str, forms: Mapping[str, str]) -> str:
    """A series in words: one row whole, of several the lowest and the highest."""
    rows = [row for row in one.rows if row[x] is not None and row[y] is not None]
    if not rows:
        return f"{one.name}: not measured"
    if len(rows) == 1:
        return f"{one.name}: " + ", ".join(f"{c} {format_value(v, forms.get(c))}" for c, v in rows[0].items())
    if isinstance(rows[0][y], str):
        x, y = y, x
    rows.sort(key=lambda row: getattr(row[y], "value", row[y]) or 0.0)
    low, high = (f"{format_value(row[y], forms[y])} at {format_value(row[x], forms[x])}" for row in (rows[0], rows[-1]))
    return f"{one.name}: lowest {low}, highest {high}"


def mark_value(figure: Figure, name: str, *, x: float | None = None, y: float | None = None) -> None:
    """Add a dotted line at a value of one axis, with its name."""
    look = {"line": {"dash": "dot", "width": 1.25, "color": GREY}, "layer": "below", "annotation_text": escape(name)}
    if x is not None:
        figure.plot.add_vline(x, annotation_position="bottom right", **look)
    if y is not None:
        figure.plot.add_hline(y, annotation_position="top right", **look)


def make_look(
    colour: str, symbol: str = "circle", dash: str = "solid", mode: str = "markers", size: float = 8, width: float = 2
) -> Look:
    """What a trace takes for its marks and lines; the marks are hollow where `symbol` is open."""
    edge = {"line": {"width": 1.5}} if symbol.endswith("-open") else {}
    marker = {"color": colour, "symbol": symbol, "size": size, **edge}
    return {"mode": mode, "marker": marker, "line": {"color": colour, "dash": dash, "width": width}}


def label_look(i: int, *, hollow: bool = False, **options: Any) -> Look:
    """The look of the i-th label."""
    symbol = [*SHAPES][i % len(SHAPES)] + "-open" * hollow
    return make_look(COLOURS[i % len(COLOURS)], symbol, DASHES[i % len(DASHES)], **options)


def bar_look(i: int) -> Look:
    """The look of the i-th series of bars."""
    return {"marker": {"color": COLOURS[i % len(COLOURS)], "opacity": 0.65}}
