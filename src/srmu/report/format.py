"""Numbers with intervals as text, names as a person would write them, tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def name_words(name: str) -> str:
    """A name of the code as words."""
    return name.replace("_", " ")


def metric_words(metric: str) -> str:
    """`organism_hazard/acc` as a person would call it."""
    task, _, kind = metric.partition("/")
    return " ".join([task, *([] if kind in ("", "acc") else [kind])]).replace("_", " ")


def capitalise(text: str) -> str:
    """A name at the head of a column."""
    return text[:1].upper() + text[1:]


def count_words(count: int, noun: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_with_error(entry: Mapping[str, float]) -> str:
    """`0.312 ± 0.033`: the value and its standard error."""
    error = f" ± {entry['stderr']:.3f}" if "stderr" in entry else ""
    return f"{entry['value']:.3f}{error}"


def format_percent(entry: Mapping[str, float]) -> str:
    """`31.2 (24.0-39.1)`: a number between 0 and 1 with its interval."""
    return "{value:.1%} ({low:.1%}\N{EN DASH}{high:.1%})".format(**entry).replace("%", "")


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
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
