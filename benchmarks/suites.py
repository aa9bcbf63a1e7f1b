"""Five methods on every benchmark, in its schema, on the testbed of authors.

    srmu testbed TESTBED --world people --with-oracle
    python benchmarks/suites.py TESTBED OUT [SUITE ...]

writes OUT/suites.md with each suite's table and MUSE's two sequences: ever larger forget sets
(scalability), and one request after another (sustainability). Settings are each the best of a small
grid (two to eight) by the validation questions of the same testbed, seed 0: mean of neighbour and
general accuracy less that on hazard. Runs that are in OUT are not made again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srmu.engine.files import write_whole
from srmu.engine.progress import show_progress, silence_libraries
from srmu.evals import benchmarks
from srmu.evals.benchmarks.base import Metrics
from srmu.evals.score import benchmark_table, score_benchmark
from srmu.methods.reference import markdown_table
from srmu.reproduce.experiment import Experiment, PlannedRow, Testbeds, run_experiment
from srmu.runs.run import Run

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
    "rename-scrub": ["method.name=rename_scrub", "method.names={testbed}/names.txt", "train.max_steps=250"],
}  # fmt: skip
SEQUENCES = {"scal": "forget sets of growing size", "sust": "one forget set after another"}
SEQUENCED = ("SRMU", "NPO + KL")
FOLDS = (1, 2, 3, 4)


def make_runs(testbed: Path, out: Path, rows: Sequence[PlannedRow]) -> list[Path]:
    """The folders of the rows' runs, made where they are missing."""
    place = Testbeds(testbed.parent, folder=testbed.name, world="people")
    experiment = Experiment(out, place, METHODS, (0,), (), overrides=("device=cpu",))
    measured = [*run_experiment(experiment, rows, show_progress).values()]
    if failed := [row for row in measured if row.why]:
        raise SystemExit(f"{failed[0].label} {failed[0].why}")
    return [row.runs[0] for row in measured]


def score_run(run: Path, testbed: Path, name: str) -> dict[str, Any]:
    """A suite's numbers; what was measured before is in the cache."""
    data, oracle = str(testbed / "suites" / name), str(testbed / "oracle")
    return score_benchmark(str(run), name, data=data, oracle=oracle, watch=show_progress)


def format_section(title: str, rows: list[dict[str, str]]) -> str:
    return f"## {title}\n\n{markdown_table(rows)}\n"


def compare_methods(testbed: Path, out: Path, name: str) -> str:
    suite = benchmarks.BENCHMARKS[name]
    shown: dict[str, Metrics] = {}
    runs = make_runs(testbed, out, [PlannedRow(label, label, "high") for label in METHODS])
    for label, run in zip(METHODS, runs, strict=True):
        scores = score_run(run, testbed, name)
        shown.setdefault("original", scores["before"])
        shown[label] = scores["after"]
    shown["oracle"] = scores["oracle"]
    return format_section(suite.title, benchmark_table(suite, shown))


def follow_sequence(testbed: Path, out: Path, kind: str) -> str:
    """MUSE after each of four forget sets: each on the original, or each on what the last left."""
    suite, rows = benchmarks.BENCHMARKS["muse"], []
    for label in SEQUENCED:
        model = testbed / "model"
        for fold in FOLDS:
            forget = testbed / "suites" / "muse" / kind / f"forget_{fold}.jsonl"
            options = (f"topics.topic.forget={forget}", f"model={model}")
            (run,) = make_runs(testbed, out, [PlannedRow(label, label, "high", options)])
            scores = score_run(run, testbed, "muse")
            rows += benchmark_table(suite, {f"{label}, {fold}": scores["after"]})
            if kind == "sust":
                model = out / "exports" / run.name
                if not model.exists():
                    model.parent.mkdir(parents=True, exist_ok=True)
                    Run.open(run).export(model)
    return format_section(f"MUSE, {SEQUENCES[kind]}", rows)


def main(testbed: Path, out: Path, names: Sequence[str]) -> None:
    silence_libraries()
    torch.set_num_threads(1)
    parts = [compare_methods(testbed, out, name) for name in names]
    if "muse" in names:
        parts += [follow_sequence(testbed, out, kind) for kind in SEQUENCES]
    write_whole(out / "suites.md", "\n".join(parts))
    print("\n".join(parts))
    print(f"wrote {out / 'suites.md'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3:] or [*benchmarks.BENCHMARKS])
