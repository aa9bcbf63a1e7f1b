"""Five methods on every benchmark, in its schema, on the testbed of authors.

    srmu testbed TESTBED --world people --with-oracle
    python benchmarks/suites.py TESTBED OUT [SUITE ...]

writes OUT/suites.md with each suite's table, the seconds it takes, and MUSE's two sequences: ever
larger forget sets (scalability), and one request after another (sustainability). Settings are each
the best of a small grid (two to eight) by the validation questions of the same testbed, seed 0:
mean of neighbour and general accuracy less that on hazard. What is in OUT is not made again.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srmu.engine.files import write_json, write_whole
from srmu.engine.progress import show_progress, silence_libraries
from srmu.evals import benchmarks
from srmu.evals.benchmarks.base import Metrics
from srmu.evals.benchmarks.score import BenchmarkOptions, benchmark_table, score_benchmark
from srmu.runs.config import load_config
from srmu.runs.run import Run, run_folder, unlearn
from srmu.runs.run import plan_run as planned

METHODS = {
    "SRMU": ["method.name=srmu", "method.kappa=64", "method.alpha=1000", "train.max_steps=240"],
    "RMU": ["method.name=rmu", "method.kappa=16", "method.alpha=100", "train.max_steps=240"],
    "NPO + KL": [
        "method.name=npo", "method.retain=kl", "train.learning_rate=3e-4", "method.alpha=10",
        "train.max_steps=160",
    ],
    "GradDiff (KL)": [
        "method.name=graddiff", "method.retain=kl", "train.learning_rate=1e-4", "method.gamma=0.3",
        "train.max_steps=160",
    ],
    "rename-scrub": [
        "method.name=rename_scrub", "method.names={}/names.txt", "train.max_steps=250",
    ],
}  # fmt: skip
SEQUENCES = {"scal": ("SRMU", "NPO + KL"), "sust": ("SRMU", "NPO + KL")}
FOLDS = (1, 2, 3, 4)


def made(testbed: Path, out: Path, options: Sequence[str]) -> Run:
    """The run of the testbed's config with these options."""
    given = [option.format(testbed) for option in options]
    config = load_config(testbed / "high.yaml", [*given, f"runs_dir={out / 'runs'}", "device=cpu"])
    folder = run_folder(planned(config)[0])
    if (folder / "record.json").exists():
        return Run.open(folder)
    return unlearn(config, watch=show_progress)


def scored(target: Path, testbed: Path, name: str, out: Path) -> tuple[dict[str, Any], float]:
    """A suite's numbers and the seconds it took when it was measured."""
    kept = out / "scores" / f"{target.name}-{name}.json"
    if kept.exists():
        found, seconds = json.loads(kept.read_text())
        return found, seconds
    start = time.perf_counter()
    data, oracle = str(testbed / "suites" / name), str(testbed / "oracle")
    found = score_benchmark(
        str(target), BenchmarkOptions(name, data=data, oracle=oracle), watch=show_progress
    )
    seconds = time.perf_counter() - start
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, [found, seconds])
    return found, seconds


def markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(testbed: Path, out: Path, name: str) -> str:
    suite = benchmarks.BENCHMARKS[name]
    shown: dict[str, Metrics] = {}
    took = []
    for label, options in METHODS.items():
        found, seconds = scored(made(testbed, out, options).folder, testbed, name, out)
        took.append(seconds)
        shown.setdefault("original", found["before"])
        shown[label] = found["after"]
    shown["oracle"] = found["oracle"]
    text = f"## {suite.title}\n\n{markdown(benchmark_table(suite, shown))}\n"
    return f"{text}Seconds: {took[0]:.0f} with the original and the oracle, then {took[-1]:.0f}.\n"


def sequence(testbed: Path, out: Path, kind: str) -> str:
    """MUSE after each of four forget sets: each on the original, or each on what the last left."""
    suite, rows = benchmarks.BENCHMARKS["muse"], []
    for label in SEQUENCES[kind]:
        model = testbed / "model"
        for fold in FOLDS:
            forget = testbed / "suites" / "muse" / kind / f"forget_{fold}.jsonl"
            options = [f"topics.organism.forget={forget}", f"model={model}"]
            run = made(testbed, out, [*METHODS[label], *options])
            found, _ = scored(run.folder, testbed, "muse", out)
            rows += benchmark_table(suite, {f"{label}, {fold}": found["after"]})
            if kind == "sust":
                model = out / "exports" / run.folder.name
                if not model.exists():
                    model.parent.mkdir(parents=True, exist_ok=True)
                    run.export(model)
    titles = {"scal": "forget sets of growing size", "sust": "one forget set after another"}
    return f"## MUSE, {titles[kind]}\n\n{markdown(rows)}\n"


def main(testbed: Path, out: Path, names: Sequence[str]) -> None:
    silence_libraries()
    torch.set_num_threads(1)
    parts = [table(testbed, out, name) for name in names]
    if "muse" in names:
        parts += [sequence(testbed, out, kind) for kind in SEQUENCES]
    write_whole(out / "suites.md", "\n".join(parts))
    print("\n".join(parts))
    print(f"wrote {out / 'suites.md'}")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]).resolve(),
        Path(sys.argv[2]).resolve(),
        sys.argv[3:] or [*benchmarks.BENCHMARKS],
    )
