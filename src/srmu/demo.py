"""The whole story on the testbed: methods side by side at low and high entanglement."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srmu.config import load_config
from srmu.console import Watch, quiet, silent
from srmu.errors import UserError
from srmu.organism import build
from srmu.report import Entry, render, table
from srmu.run import unlearn
from srmu.scoring import score

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


class Job(NamedTuple):
    """A config file with overrides, and the tasks to score instead of the config's own."""

    config: Path
    overrides: tuple[str, ...]
    tasks: tuple[str, ...] = ()


def run_one(job: Job) -> Path:
    """Unlearn and score one job; the folder of its run."""
    # Threads that wait for each other spin: one in each of several processes is faster.
    torch.set_num_threads(1)
    quiet()
    run = unlearn(load_config(job.config, job.overrides))
    score(run, job.tasks)
    return run.folder


def cpus() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(
    jobs: Sequence[Job], watch: Watch = silent, function: Callable[[Job], Any] = run_one
) -> list[Any]:
    """Run the jobs in as many processes as there are processors; their folders in order."""
    workers = min(cpus(), len(jobs))
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        watch("unlearning and measuring", len(jobs)) as tick,
    ):
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                tick("")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def play(out: Path, *, seeds: int = 3, watch: Watch = silent) -> tuple[list[Entry], Path]:
    """Build the testbed, run every method in both regimes, and write `report.html` to `out`.

    What is there already is used again, so that a stopped demo goes on.
    """
    if seeds < 1:
        raise UserError("--seeds must be at least 1")
    testbed = out / "testbed"
    if not (testbed / "organism.json").exists():
        build(testbed, watch=watch)
    groups = [
        (label, regime, [[*overrides, f"seed={seed}"] for seed in range(seeds)])
        for regime in REGIMES
        for label, overrides in SETTINGS.items()
    ]
    jobs = [
        Job(testbed / f"{regime}.yaml", (*overrides, f"runs_dir={(out / 'runs').resolve()}"), TASKS)
        for _, regime, runs in groups
        for overrides in runs
    ]
    folders = iter(run_all(jobs, watch))
    entries = [
        Entry(label, REGIMES[regime], tuple(next(folders) for _ in runs))
        for label, regime, runs in groups
    ]
    report = render(
        entries,
        out / "report.html",
        title="Unlearning on the testbed",
        forget_metrics=FORGET,
        utility_metrics=UTILITY,
        command=f"srmu demo --seeds {seeds}",
    )
    return entries, report


def terminal_table(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The report's table as rows of strings: the original model first in each regime."""
    metrics = {metric: metric.split("_", 1)[1].split("/")[0] for metric in FORGET + UTILITY}
    rows: list[dict[str, Any]] = []
    for row in table(entries, list(metrics)):
        shared = row.group.removesuffix(" entanglement")
        if not any(r["entangled"] == shared for r in rows):
            before = {name: str(row.before[metric]) for metric, name in metrics.items()}
            rows.append({"entangled": shared, "method": "before"} | before)
        after = {name: str(row.after[metric]) for metric, name in metrics.items()}
        rows.append({"entangled": shared, "method": row.label} | after)
    return rows
