"""The options that mean the same in each verb."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

Json = Annotated[bool, Option("--json", help="Print JSON, alone, on standard output.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show the plan, do nothing.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps.")]
Oracle = Annotated[str, Option(help="A model that never saw the forget set, as a control.")]
FORGET = Option(help="Texts to forget (file, glob).")
RETAIN = Option(help="Texts to keep (file, glob).")
Forget = Annotated[list[str] | None, FORGET]
Retain = Annotated[list[str] | None, RETAIN]
TasksDir = Annotated[Path | None, Option(help="Folder of local YAML tasks.", exists=True, file_okay=False)]
Utility = Annotated[str, Option(help="Tasks on what should stay, a,b.")]
Metrics = Annotated[str, Option(help="Metrics that should fall, a,b; default: all asked.")]
UtilityMetrics = Annotated[str, Option(help="Metrics that should stay, a,b.")]
Budget = Annotated[str, Option(help="The most utility to lose: 1% or 0.01.")]
Seeds = Annotated[str, Option(help="Seeds, a,b,c.")]
Tier = Annotated[Literal["smoke", "standard", "deep"], Option(help="How much to try: minutes to hours.")]
