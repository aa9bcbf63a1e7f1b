"""The whole story on the testbed: methods side by side at low and high entanglement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from re import findall
from typing import Any

from srmu.engine.files import read_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.statistics import Estimate
from srmu.report.build import make_runs_page
from srmu.report.results import RunGroup, aggregate_columns
from srmu.reproduce.experiment import Experiment, PlannedRow, Testbeds, read_preset, run_experiment
from srmu.testbed.train import RECIPE

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
METRICS = {metric: metric.split("_", 1)[1].split("/")[0] for metric in FORGET + UTILITY}  # as the table heads them
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
    rows: list[dict[str, Any]] = []
    for row in aggregate_columns(groups, {metric: [metric] for metric in METRICS}):
        for method, cells in (("before", row.before), (row.label, row.after)):
            line = {"entangled": row.group.removesuffix(" entanglement"), "method": method}
            line |= {name: str(cells[metric]) for metric, name in METRICS.items()}
            if line not in rows:  # the original model is the same for all methods
                rows.append(line)
    return rows


def compare_published(rows: Sequence[Mapping[str, str]], out: Path, seeds: Sequence[int]) -> str:
    """A sentence: whether the rows of `terminal_table` agree with the README's, which are in `configs/demo.json`.

    Digits depend on the processor, which decides the last bits of a sum and with them the course of each training, the
    testbed model's too. That part no interval holds, so numbers agree where their intervals overlap: of a demo
    on another machine all 40 did, while in 3 cells the interval of the difference left 0 out.
    """
    published, made = read_preset("demo.json"), read_json(out / "testbed" / "organism.json", {})
    testbed = {"world": "closed", "seed": published["seeds"][0], "entanglement": 0.5, "recipe": asdict(RECIPE)}
    if [*seeds] != published["seeds"] or testbed != {key: made.get(key) for key in testbed}:
        given = ",".join(map(str, published["seeds"]))
        return f"Not compared with the README, whose numbers are those of srmu demo --seeds {given} in a new folder."
    here = {(row["entangled"], row["method"]): row for row in rows}
    differ, count = [], len(published["rows"]) * len(METRICS)
    for there, name in product(published["rows"], METRICS.values()):
        row = here[there["entangled"], there["method"]]
        one, other = parse_estimate(row[name]), parse_estimate(there[name])
        if one.high < other.low or other.high < one.low:
            differ.append(f"{row['entangled']} {row['method']} {name}: {row[name]} here, {there[name]} there")
    if not differ:
        return f"All {count} numbers agree with the README's, within their intervals."
    told = f"Of {count} numbers, these have intervals apart from the README's: {'; '.join(differ)}."
    advice = "On the two machines tried, the processor alone made no such difference"
    return f"{told} {advice}: check whether the code or a library changed."


def parse_estimate(cell: str) -> Estimate:
    """The estimate that a cell of a table shows."""
    value, low, high = map(float, findall(r"[\d.]+", cell))
    return Estimate(value, low, high)
