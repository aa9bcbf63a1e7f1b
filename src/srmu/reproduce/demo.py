"""The whole story on the testbed: methods side by side at low and high entanglement."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.report.build import make_runs_page
from srmu.report.results import RunGroup, aggregate_columns
from srmu.reproduce.experiment import Experiment, PlannedRow, Testbeds, run_experiment

# Each method's best of the same nine settings, by `python benchmarks/search.py
# configs/search-organism.yaml OUT`: on the validation questions of three testbeds, both regimes.
# The whole table is in configs/search-organism.json, and a test holds these to it.
SETTINGS: dict[str, list[str]] = {
    "SRMU": ["method.name=srmu", "method.kappa=32", "method.alpha=1000"],
    "RMU": ["method.name=rmu", "method.kappa=32", "method.alpha=1000"],
    "Adaptive RMU": ["method.name=adaptive_rmu", "method.kappa=8", "method.alpha=100"],
    "SRMU + random anchors": ["method.name=srmu", "method.anchors=random", "method.kappa=16", "method.alpha=100"],
}
REGIMES = {"low": "low entanglement", "high": "high entanglement"}
FORGET = ["organism_hazard/acc", "organism_hazard_held/acc"]
UTILITY = ["organism_neighbour/acc", "organism_general/acc"]
TASKS = tuple(metric.split("/")[0] for metric in FORGET + UTILITY)


def play_demo(out: Path, seeds: Sequence[int], watch: Watch = ignore_progress) -> tuple[list[RunGroup], Path]:
    """Build the testbed, run every method in both regimes, and write `report.html` to `out`.

    What is there already is used again, so that a stopped demo goes on.
    """
    if not seeds:
        raise SrmuError("--seeds: name at least one, 0,1,2")
    experiment = Experiment(out, Testbeds(out, folder="testbed", oracle=False), SETTINGS, tuple(seeds), TASKS)
    planned = [PlannedRow(label, label, regime) for regime, label in product(REGIMES, SETTINGS)]
    rows = run_experiment(experiment, planned, watch)
    if failed := [row for row in rows.values() if row.why]:
        raise SrmuError(f"{failed[0].label} {failed[0].why}")
    groups = [RunGroup(row.label, REGIMES[plan.regime], row.runs) for plan, row in rows.items()]
    command = f"srmu demo --seeds {','.join(map(str, seeds))}"
    page = make_runs_page(groups, FORGET, UTILITY, command, "Unlearning on the testbed")
    return groups, page.write(out / "report.html")


def terminal_table(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """The report's table as rows of strings: the original model first in each regime."""
    metrics = {metric: metric.split("_", 1)[1].split("/")[0] for metric in FORGET + UTILITY}
    rows: list[dict[str, Any]] = []
    for row in aggregate_columns(groups, {metric: [metric] for metric in metrics}):
        for method, cells in (("before", row.before), (row.label, row.after)):
            line = {"entangled": row.group.removesuffix(" entanglement"), "method": method}
            line |= {name: str(cells[metric]) for metric, name in metrics.items()}
            if line not in rows:  # the original model is the same for all methods
                rows.append(line)
    return rows
