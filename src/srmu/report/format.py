"""Numbers with intervals as cells and marks, and names as a person would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from srmu.evals.statistics import Estimate
from srmu.report.html import GREY, Cell


def name_words(name: str) -> str:
    """A name of the code as words."""
    return name.replace("_", " ")


def metric_words(metric: str) -> str:
    """`organism_hazard/acc` as a person would call it."""
    task, _, kind = metric.partition("/")
    return " ".join([task, *([] if kind in ("", "acc") else [kind])]).replace("_", " ")


def number_cell(found: Estimate | None) -> Cell | None:
    """An estimate as a table shows it: accuracies in per cent, the interval in small type."""
    if found is None:
        return None
    text, _, span = str(found).partition(" ")
    return Cell(text, span.strip("()"), found.value)


def percent_cell(value: float | None) -> Cell | None:
    """A share without an interval, in per cent."""
    return None if value is None else Cell(f"{100 * value:.1f}", "", value)


def share_cell(found: Estimate) -> Cell:
    """A share such as K*, as a number below 1."""
    return Cell(f"{found.value:.2f}", f"{found.low:.2f}\N{EN DASH}{found.high:.2f}", found.value)


def capitalise(text: str) -> str:
    """A name at the head of a column."""
    return text[:1].upper() + text[1:]


def describe_numbers(name: str, numbers: Mapping[str, Estimate]) -> str:
    """Numbers in words."""
    return f"{name}: " + ", ".join(f"{metric_words(k)} {v}" for k, v in numbers.items())


def error_bars(found: Sequence[Estimate]) -> dict[str, Any]:
    """Plotly's error bars; none where there is no interval."""
    if not all(one.has_interval for one in found):
        return {}
    up = [one.high - one.value for one in found]
    down = [one.value - one.low for one in found]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1.25, "width": 0}


def draw_mark(
    x: Estimate, y: Estimate, hover: str, label: str, look: Mapping[str, Any]
) -> dict[str, Any]:
    """One point with both intervals; hovering shows a name in bold and lines below it."""
    trace = {
        "x": [x.value], "y": [y.value], "mode": "markers", "cliponaxis": False, "marker": look,
        "text": [hover], "hoverinfo": "text",
        "error_x": error_bars([x]), "error_y": error_bars([y]),
    }  # fmt: skip
    return trace | ({"meta": label} if label else {})


def hover_text(name: str, *lines: str) -> str:
    return "<br>".join([f"<b>{escape(name)}</b>", *map(escape, lines)])


def draw_level(at: float, name: str, across: bool = False) -> dict[str, Any]:
    """A dotted line at a value of x (or y, `across`) with its name, for a layout."""
    free, held = ("x", "y") if across else ("y", "x")
    line = {
        "type": "line", f"{held}0": at, f"{held}1": at, f"{free}ref": "paper", f"{free}0": 0,
        f"{free}1": 1, "layer": "below", "line": {"dash": "dot", "width": 1.25, "color": GREY},
    }  # fmt: skip
    text = {
        held: at, f"{free}ref": "paper", free: 1 if across else 0, "text": escape(name),
        "xanchor": "right" if across else "left", "yanchor": "bottom", "showarrow": False,
        "xshift": 0 if across else 3,
    }  # fmt: skip
    return {"shapes": [line], "annotations": [text]}


def format_with_error(entry: dict[str, float]) -> str:
    """`0.312 ± 0.033`: the value and its standard error."""
    error = f" ± {entry['stderr']:.3f}" if "stderr" in entry else ""
    return f"{entry['value']:.3f}{error}"


def format_percent(entry: dict[str, float]) -> str:
    """`31.2 (24.0-39.1)`: a number between 0 and 1 with its interval."""
    return "{value:.1%} ({low:.1%}\N{EN DASH}{high:.1%})".format(**entry).replace("%", "")


def print_table(rows: list[dict[str, str]]) -> None:
    """Rows with the same keys, as a table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0], box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row.values()))  # as it is: no markup, no emoji
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # rich would cut the table at 80 columns
    console.print(table)
