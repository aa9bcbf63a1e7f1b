"""What verbs have in common: JSON or lines, tables, numbers as a person writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, alone, on standard output.")]


def say(value: dict[str, Any], as_json: bool, *lines: str) -> None:
    """End a verb: JSON on standard output, or lines for a person."""
    if as_json:
        typer.echo(json.dumps(value))
    else:
        for line in lines:
            typer.echo(line)


def listed(text: str) -> tuple[str, ...]:
    """The names in `a,b`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def near(path: Path) -> Path:
    """The path as one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def with_error(entry: dict[str, float]) -> str:
    """`0.312 ± 0.033`: the value and its standard error."""
    error = f" ± {entry['stderr']:.3f}" if "stderr" in entry else ""
    return f"{entry['value']:.3f}{error}"


def in_percent(entry: dict[str, float]) -> str:
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
