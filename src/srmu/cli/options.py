"""The options that mean the same in each verb."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, alone, on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, do nothing.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Model = Annotated[str, typer.Option(help="Folder or hub id of a model.")]
Oracle = Annotated[str, typer.Option(help="A model that never saw the forget set, as a control.")]
FORGET = typer.Option(help="Texts to forget (file, glob).")
RETAIN = typer.Option(help="Texts to keep (file, glob).")
Forget = Annotated[list[str] | None, FORGET]
Retain = Annotated[list[str] | None, RETAIN]
TasksDir = Annotated[Path | None, typer.Option(help="Folder of local YAML tasks.")]
Utility = Annotated[str, typer.Option(help="Tasks on what should stay, a,b.")]
Metrics = Annotated[str, typer.Option(help="Metrics that should fall, a,b; default: all asked.")]
UtilityMetrics = Annotated[str, typer.Option(help="Metrics that should stay, a,b.")]
Budget = Annotated[str, typer.Option(help="The most utility to lose: 1% or 0.01.")]
Seeds = Annotated[str, typer.Option(help="Seeds, a,b,c.")]
Tier = Annotated[
    Literal["smoke", "standard", "deep"], typer.Option(help="How much is tried: minutes to hours.")
]
