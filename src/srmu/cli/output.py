"""What verbs have in common: JSON or lines, and names of options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, alone, on standard output.")]


def print_result(value: dict[str, Any], as_json: bool, *lines: str) -> None:
    """End a verb: JSON on standard output, or lines for a person."""
    if as_json:
        typer.echo(json.dumps(value))
    else:
        for line in lines:
            typer.echo(line)


def split_names(text: str) -> tuple[str, ...]:
    """The names in `a,b`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def shorten_path(path: Path) -> Path:
    """The path as one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
