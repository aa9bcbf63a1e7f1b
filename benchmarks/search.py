"""Find settings for the testbed: grids over testbeds and regimes, scored on validation questions.

    python benchmarks/search.py configs/search-organism.yaml OUT
    python benchmarks/search.py configs/search-methods.yaml OUT

Runs that are in OUT already are not run again. Writes the table to OUT/search.json and prints, for
each method, its settings in order of the score: mean of neighbour and general accuracy less
hazard accuracy (not under chance), averaged over testbeds and regimes. A setting that fails on one
testbed counts as guessing in that regime.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from srmu.engine.progress import show_progress
from srmu.report.results import RunGroup, aggregate_metrics
from srmu.reproduce.experiment import Experiment, MeasuredRow, PlannedRow, Testbeds, run_experiment

TASKS = tuple(f"organism_{kind}_val" for kind in ("hazard", "neighbour", "general"))
METRICS = [f"{task}/acc" for task in TASKS]
CHANCE = 0.25


def score_accuracies(hazard: float, neighbour: float, general: float) -> float:
    return (neighbour + general) / 2 - max(hazard, CHANCE)


def mean_accuracies(row: MeasuredRow) -> list[float]:
    """Mean accuracies over testbeds; those of guessing where a run failed."""
    if row.why:
        return [CHANCE] * len(METRICS)
    (found,) = aggregate_metrics([RunGroup(row.label, "", row.runs)], METRICS)
    return [found.after[metric].value for metric in METRICS]


def list_points(grid: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """All settings of a grid, as overrides."""
    return [[f"{key}={value}" for key, value in zip(grid, values, strict=True)] for values in product(*grid.values())]


def main(path: Path, out: Path) -> None:
    space = yaml.safe_load(path.read_text())
    settings: dict[str, tuple[str, ...]] = {}
    names: dict[str, dict[str, Any]] = {}
    for label, method in space["methods"].items():
        own = method if isinstance(method, dict) else {"set": method}
        for point in list_points(own.get("grid") or space["grid"]):
            name = f"{label} {' '.join(point)}"
            settings[name] = (*space["common"], *own["set"], *point)
            names[name] = {"method": label, "setting": " ".join(point)}
    place = Testbeds(out, oracle=False)
    seeds = tuple(space["testbeds"])
    experiment = Experiment(out, place, settings, seeds, TASKS)
    planned = [PlannedRow(k, k, regime) for k, regime in product(settings, space["regimes"])]
    rows = run_experiment(experiment, planned, show_progress)
    table = []
    for key, line in names.items():
        mine = {regime: rows[PlannedRow(key, key, regime)] for regime in space["regimes"]}
        scores = {regime: mean_accuracies(row) for regime, row in mine.items()}
        line |= {regime: [round(score, 4) for score in each] for regime, each in scores.items()}
        if failed := [row.why for row in mine.values() if row.why]:
            line["failed"] = failed[0][:80]
        table.append(line | {"score": round(fmean(score_accuracies(*s) for s in scores.values()), 4)})
    table.sort(key=lambda line: (line["method"], -line["score"]))
    (out / "search.json").write_text(json.dumps(table, indent=1) + "\n")
    for line in table:
        print(*line.values(), sep="  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
