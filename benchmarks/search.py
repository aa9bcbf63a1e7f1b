"""Find the demo's settings: a grid over three testbeds, scored on the validation questions.

    python benchmarks/search.py configs/search-organism.yaml OUT

Runs that are in OUT already are not run again. Writes the table to OUT/search.json and prints, for
each method, its settings in order of the score: mean of neighbour and general accuracy less
hazard accuracy (not under chance), averaged over testbeds and regimes.
"""

import json
import sys
from itertools import product
from pathlib import Path
from statistics import mean

import yaml

from srmu.console import watch
from srmu.demo import REGIMES, Job, run_all
from srmu.organism import build

KINDS = ("hazard", "neighbour", "general")
TASKS = tuple(f"organism_{kind}_val" for kind in KINDS)


def selectivity(hazard: float, neighbour: float, general: float) -> float:
    return (neighbour + general) / 2 - max(hazard, 0.25)


def main(path: Path, out: Path) -> None:
    space = yaml.safe_load(path.read_text())
    for seed in space["testbeds"]:
        if not (out / f"testbed{seed}").exists():
            build(out / f"testbed{seed}", seed=seed, watch=watch)
    points = [
        tuple(f"{key}={value}" for key, value in zip(space["grid"], values, strict=True))
        for values in product(*space["grid"].values())
    ]
    cases = list(product(space["methods"], points, space["regimes"], space["testbeds"]))
    jobs = [
        Job(
            out / f"testbed{seed}" / f"{regime}.yaml",
            (
                *space["common"],
                *space["methods"][label],
                *point,
                f"seed={seed}",
                f"runs_dir={(out / 'runs').resolve()}",
            ),
            TASKS,
        )
        for label, point, regime, seed in cases
    ]
    assert set(space["regimes"]) <= set(REGIMES)
    scores = []
    for folder in run_all(jobs, watch):
        results = json.loads((folder / "results.json").read_text())
        scores.append([results[f"{task}/acc"]["value"] for task in TASKS])
    table = []
    for label, point in product(space["methods"], points):
        row: dict[str, object] = {"method": label, "setting": " ".join(point)}
        rated = []
        for regime in space["regimes"]:
            mine = [
                s
                for s, case in zip(scores, cases, strict=True)
                if case[:3] == (label, point, regime)
            ]
            row[regime] = [round(mean(column), 4) for column in zip(*mine, strict=True)]
            rated += [selectivity(*s) for s in mine]
        table.append(row | {"score": round(mean(rated), 4)})
    table.sort(key=lambda row: (row["method"], -float(str(row["score"]))))
    (out / "search.json").write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
