"""The verbs that make many runs, and the one that draws what they found."""

from __future__ import annotations

import typer

verbs = typer.Typer()
