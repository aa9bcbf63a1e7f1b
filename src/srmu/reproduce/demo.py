"""The whole story on the testbed: methods side by side at low and high entanglement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.parallel import RunJob, run_all
from srmu.report.build import write_runs_page
from srmu.report.results import RunGroup, aggregate_metrics
from srmu.testbed.build import build_testbed

# Each method's best of the same nine settings, by `python benchmarks/search.py
# configs/search-organism.yaml OUT`: on the validation questions of three testbeds, both regimes.
# The whole table is in configs/search-organism.json, and a test holds these to it.
SETTINGS: dict[str, list[str]] = {
    "SRMU": ["method.name=srmu", "method.kappa=32", "method.alpha=1000"],
    "RMU": ["method.name=rmu", "method.kappa=32", "method.alpha=1000"],
    "Adaptive RMU": ["method.name=adaptive_rmu", "method.kappa=8", "method.alpha=100"],
    "SRMU + random anchors": [
        "method.name=srmu",
        "method.anchors=random",
        "method.kappa=16",
        "method.alpha=100",
    ],
}
REGIMES = {"low": "low entanglement", "high": "high entanglement"}
FORGET = ["organism_hazard/acc", "organism_hazard_held/acc"]
UTILITY = ["organism_neighbour/acc", "organism_general/acc"]
TASKS = tuple(metric.split("/")[0] for metric in FORGET + UTILITY)


def play_demo(
    out: Path, *, seeds: Sequence[int] = (0, 1, 2), watch: Watch = ignore_progress
) -> tuple[list[RunGroup], Path]:
    """Build the testbed, run every method in both regimes, and write `report.html` to `out`.

    What is there already is used again, so that a stopped demo goes on.
    """
    if not seeds:
        raise SrmuError("--seeds: name at least one, 0,1,2")
    testbed = out / "testbed"
    if not (testbed / "organism.json").exists():
        build_testbed(testbed, watch=watch)
    groups = [
        (label, regime, [[*overrides, f"seed={seed}"] for seed in seeds])
        for regime in REGIMES
        for label, overrides in SETTINGS.items()
    ]
    jobs = [
        RunJob(
            testbed / f"{regime}.yaml", (*overrides, f"runs_dir={(out / 'runs').resolve()}"), TASKS
        )
        for _, regime, runs in groups
        for overrides in runs
    ]
    folders = iter(run_all(jobs, watch))
    entries = [
        RunGroup(label, REGIMES[regime], tuple(next(folders) for _ in runs))
        for label, regime, runs in groups
    ]
    report = write_runs_page(
        entries,
        out / "report.html",
        title="Unlearning on the testbed",
        forget_metrics=FORGET,
        utility_metrics=UTILITY,
        command=f"srmu demo --seeds {','.join(map(str, seeds))}",
    )
    return entries, report


def terminal_table(entries: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """The report's table as rows of strings: the original model first in each regime."""
    metrics = {metric: metric.split("_", 1)[1].split("/")[0] for metric in FORGET + UTILITY}
    rows: list[dict[str, Any]] = []
    for row in aggregate_metrics(entries, list(metrics)):
        shared = row.group.removesuffix(" entanglement")
        if not any(r["entangled"] == shared for r in rows):
            before = {name: str(row.before[metric]) for metric, name in metrics.items()}
            rows.append({"entangled": shared, "method": "before"} | before)
        after = {name: str(row.after[metric]) for metric, name in metrics.items()}
        rows.append({"entangled": shared, "method": row.label} | after)
    return rows
