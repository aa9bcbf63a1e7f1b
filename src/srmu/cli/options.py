"""The options that mean the same in each verb."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

Json = Annotated[bool, Option("--json", help="Print only JSON on standard output.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show the plan and do nothing.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps.")]
Oracle = Annotated[str, Option(help="A model that never saw the forget set, for comparison.")]
FORGET = Option(help="Texts to forget: a file, or a pattern like data/*.jsonl.")
RETAIN = Option(help="Texts whose knowledge should stay: a file or a pattern.")
Forget = Annotated[list[str] | None, FORGET]
Retain = Annotated[list[str] | None, RETAIN]
TasksDir = Annotated[Path | None, Option(help="Folder with your own YAML tasks.", exists=True, file_okay=False)]
Utility = Annotated[str, Option(help="Tasks on what should stay: a,b.")]
Metrics = Annotated[str, Option(help="Metrics that should fall: a,b; default: those of the attacks or the testbed.")]
UtilityMetrics = Annotated[str, Option(help="Metrics that should stay: a,b.")]
Budget = Annotated[str, Option(help="The most accuracy to lose on what should stay: 1% or 0.01.")]
Seeds = Annotated[str, Option(help="Seeds: 0,1,2.")]
# choices stand in the help: in the column of types they would leave no room for it
Tier = Annotated[
    Literal["smoke", "standard", "deep"],
    Option(show_choices=False, help="How much to try: smoke (minutes), standard or deep (a night)."),
]
