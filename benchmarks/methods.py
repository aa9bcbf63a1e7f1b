"""Every method on the testbed: what it suppresses, what it spares, and what it costs.

    python benchmarks/methods.py configs/methods-organism.yaml OUT

Builds the testbeds with their oracles, runs each method on each in both regimes with the settings
that configs/search-methods.yaml found, and writes OUT/methods.md, OUT/methods.json and
OUT/report.html. What is in OUT already is not run again, so that a stopped table goes on.
"""

import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import yaml
from scipy.stats import t

from search import job_of, results_of, testbed
from srmu.engine.files import write_json, write_whole
from srmu.methods.reference import markdown_table
from srmu.report.build import write_runs_page
from srmu.report.results import RunGroup
from srmu.report.results import aggregate_metrics as estimates
from srmu.reproduce.demo import FORGET, REGIMES, TASKS, UTILITY

METRICS = {
    "hazard": FORGET[0],
    "held out": FORGET[1],
    "neighbour": UTILITY[0],
    "general": UTILITY[1],
}


def main(path: Path, out: Path) -> None:
    space = yaml.safe_load(path.read_text())
    for seed in space["testbeds"]:
        testbed(out, seed, oracle=True)
    cases = [
        (label, regime, job_of(out, seed, regime, [*space["common"], *settings], TASKS))
        for label, settings in space["methods"].items()
        for regime, seed in product(space["regimes"], space["testbeds"])
    ]
    done = results_of([case[-1] for case in cases])
    entries, failed = [], {}
    for label, regime in dict.fromkeys(case[:2] for case in cases):
        runs = [done[job] for one, group, job in cases if (one, group) == (label, regime)]
        if wrong := [run for run in runs if isinstance(run, str)]:
            failed[f"{label}, {regime}"] = wrong[0]
        else:
            entries.append(RunGroup(label, REGIMES[regime], tuple(runs)))
    rows = estimates(entries, list(METRICS.values()))
    costs = [cost(entry.runs) for entry in entries]
    lines = []
    for regime in space["regimes"]:
        mine = [
            (row, c) for row, c in zip(rows, costs, strict=True) if row.group == REGIMES[regime]
        ]
        before = mine[0][0].before
        lines.append([regime, "before", *(str(before[m]) for m in METRICS.values()), "", ""])
        for row, (seconds, megabytes) in mine:
            scores = [str(row.after[m]) for m in METRICS.values()]
            lines.append([regime, row.label, *scores, seconds, megabytes])
    head = ["entangled", "method", *METRICS, "seconds", "memory, MB"]
    text = "\n".join(markdown_table(head, lines))
    for name, why in failed.items():
        text += f"\n\n{name}: {why}"
    write_whole(out / "methods.md", text + "\n")
    write_json(
        out / "methods.json", {"rows": [dict(zip(head, line, strict=True)) for line in lines]}
    )
    command = f"python benchmarks/methods.py {path} OUT"
    write_runs_page(
        entries,
        out / "report.html",
        title="Every method on the testbed",
        forget_metrics=FORGET,
        utility_metrics=UTILITY,
        command=command,
    )
    print(text)
    print(f"wrote {out / 'methods.md'}, {out / 'methods.json'}, {out / 'report.html'}")


def cost(runs: Sequence[Path]) -> tuple[str, str]:
    """Seconds from the loaded model to the written run, and megabytes of memory on top of what
    the process held before it loaded the model: mean over the runs with a 95 % interval."""
    records = [json.loads((run / "record.json").read_text()) for run in runs]
    seconds = [r["seconds"] for r in records]
    memory = [(r["memory"]["peak"] - r["memory"]["before"]) / 1e6 for r in records]
    return spread(seconds), spread(memory)


def spread(values: Sequence[float]) -> str:
    """`12.3 ± 0.4`: mean and half of the interval that Student's t gives for it."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = float(t.ppf(0.975, len(values) - 1)) * (variance / len(values)) ** 0.5
    return f"{mean:.3g} ± {half:.2g}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
