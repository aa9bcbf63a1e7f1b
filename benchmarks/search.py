"""Find settings for testbeds, on validation questions.

    python benchmarks/search.py configs/search-closed.yaml OUT
    python benchmarks/search.py configs/search-robust.yaml OUT TESTBED

Runs that are in OUT already are not made again. Without TESTBED all settings of a grid are run on testbeds of
their own and scored: mean of neighbour and general accuracy less hazard accuracy (not under chance), averaged over
testbeds and regimes; a setting that fails on one testbed counts as guessing in that regime.

On TESTBED, which `srmu testbed` wrote, a run also learns a part of the facts again. Chosen is, of the settings of a
method that lose at most `most_loss` of the utility, the one with the least residual, and of those within `tie` of it
the one that suppresses most; where none keeps the utility, the one that loses least. The residual is the largest
accuracy of before and after relearning; a setting that loses more than `hopeless`, or that leaves more than
`unchanged` of the accuracy, does not relearn. OUT/search.json holds all that was tried.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from srmu.attacks import relearning
from srmu.attacks.suite import Sources, Subjects, load_exam
from srmu.engine.files import write_json
from srmu.engine.fine_tune import tune_model
from srmu.engine.progress import Watch, ignore_progress, show_progress
from srmu.evals.results import load_results, merge_results, read_metrics
from srmu.evals.subject import mark_answers
from srmu.report.results import RunGroup, aggregate_columns
from srmu.reproduce.experiment import Experiment, PlannedRow, RunJob, Scored, Testbeds, run_experiment
from srmu.runs.run import Run

TASKS = tuple(f"testbed_{kind}_val" for kind in ("hazard", "neighbour", "general"))
CHANCE = 0.25
STEPS, AFTER = 50, (20, 50)  # of relearning, and when the questions are asked
SPLITS = 3  # other fifths of the facts to hold back, over which accuracies are averaged
Row = dict[str, Any]
Space = Mapping[str, Any]


def search_grid(space: Space, out: Path) -> list[Row]:
    """Each setting's accuracies by regime, and its score; the best of each method first."""
    settings: dict[str, tuple[str, ...]] = {}
    rows: dict[str, Row] = {}
    for label, method in space["methods"].items():
        own = method if isinstance(method, dict) else {"set": method}
        grid = own.get("grid") or space["grid"]
        for values in product(*grid.values()):
            point = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
            name = f"{label} {' '.join(point)}"
            settings[name] = (*space["common"], *own["set"], *point)
            rows[name] = {"method": label, "setting": " ".join(point)}
    experiment = Experiment(out, Testbeds(out, oracle=False), settings, tuple(space["testbeds"]), TASKS)
    planned = [PlannedRow(name, name, regime) for name, regime in product(settings, space["regimes"])]
    scores: dict[str, list[float]] = {name: [] for name in rows}
    for plan, made in run_experiment(experiment, planned, show_progress).items():
        means = [CHANCE] * len(TASKS)
        if made.why:
            rows[plan.label].setdefault("failed", made.why[:80])
        else:
            metrics = [f"{task}/acc" for task in TASKS]
            (found,) = aggregate_columns([RunGroup(made.label, "", made.runs)], {name: [name] for name in metrics})
            means = [found.after[metric].value for metric in metrics]
        hazard, neighbour, general = means
        rows[plan.label][plan.regime] = [round(mean, 4) for mean in means]
        scores[plan.label].append((neighbour + general) / 2 - max(hazard, CHANCE))
    table = [row | {"score": round(fmean(scores[name]), 4)} for name, row in rows.items()]
    return sorted(table, key=lambda row: (row["method"], -row["score"]))


@dataclass(frozen=True)
class Relearned(Scored):
    """A run is made and scored, and then learns a part of the facts again."""

    space: Space = field(default_factory=dict)

    def find_result(self, job: RunJob) -> Path | None:
        folder = super().find_result(job)
        row = read_row(folder, self.space) if folder else {}
        return folder if row.get("relearned") or row.get("hopeless") else None

    def measure_run(self, job: RunJob, watch: Watch = ignore_progress) -> Path:
        folder = super().measure_run(job, watch)
        if not read_row(folder, self.space)["hopeless"]:
            merge_results(folder, relearned=relearn(folder, self.space))
        return folder


def relearn(folder: Path, space: Space) -> dict[str, float]:
    """Accuracy on a fifth of the validation facts after learning the rest, by steps taken."""
    run = Run.open(folder)
    sources = Sources((space["test"],), space["forget"], tasks_dir=str(run.config.tasks_dir))
    questions = load_exam(sources, run.config, 0)
    subject = Subjects(run, run.base, "", "cpu").unlearned
    right: dict[int, list[float]] = {step: [] for step in AFTER}
    for seed in range(SPLITS):
        learned, held = relearning.split_validation(questions, seed)
        rows = relearning.text_rows(subject, [q.prompt + q.answer for q in learned])

        def ask(step: int, held: Sequence[Any] = held) -> None:
            if step in right:
                right[step].append(fmean(mark_answers(subject, held)))

        with relearning.prepare_learner(subject, 0, seed) as model:
            tune_model(
                model, rows, steps=STEPS, learning_rate=1e-4, batch_size=8, seed=seed, schedule="constant", after=ask
            )
    return {str(step): round(fmean(values), 4) for step, values in right.items() if values}


def read_row(folder: Path, space: Space) -> Row:
    """What a setting comes to: accuracies on validation questions, what it lost and relearned."""
    before, after = (read_metrics(folder)[when] for when in ("before", "after"))
    row: Row = {task: round(after[f"{task}/acc"]["value"], 4) for task in (space["forget"], *space["utility"])}
    lost = fmean(before[f"{task}/acc"]["value"] - after[f"{task}/acc"]["value"] for task in space["utility"])
    row |= {"lost": round(lost, 4), "seconds": round(Run(folder).record["seconds"], 1)}
    row["hopeless"] = lost > space["hopeless"] or row[space["forget"]] > space["unchanged"]
    if relearned := load_results(folder).get("relearned"):
        row |= {"relearned": relearned, "residual": max(row[space["forget"]], *relearned.values())}
    return row


def choose_row(rows: Sequence[Row], space: Space) -> Row | None:
    """The best of the settings, as this file's first lines say."""
    whole = [row for row in rows if "failed" not in row]
    keeping = [row for row in whole if row["lost"] <= space["most_loss"] and "residual" in row]
    if not keeping:
        return min(whole, key=lambda row: (row["lost"], row[space["forget"]]), default=None)
    least = min(row["residual"] for row in keeping) + space["tie"]
    near = [row for row in keeping if row["residual"] <= least]
    return min(near, key=lambda row: (row[space["forget"]], row["lost"]))


def search_lasting(space: Space, out: Path, testbed: Path) -> dict[str, Row]:
    """By method: the setting that was chosen, and all that were tried."""
    table = {}
    for label, method in space["methods"].items():
        settings = {" ".join(given): (*space["common"], *method["set"], *given) for given in method["try"]}
        place = Testbeds(testbed.parent, folder=testbed.name)
        tasks = (space["forget"], *space["utility"])
        experiment = Experiment(out, place, settings, (0,), tasks, Relearned(space=space))
        rows = []
        planned = [PlannedRow(name, name, space["regime"]) for name in settings]
        for plan, row in run_experiment(experiment, planned, show_progress).items():
            found = {"failed": row.why[:120]} if row.why else read_row(row.runs[0], space)
            rows.append({"setting": [*settings[plan.label]]} | found)
        best = choose_row(rows, space)
        table[label] = {"chosen": best and best["setting"], "tried": rows}
    return table


def main(path: Path, out: Path, *testbed: Path) -> None:
    space = yaml.safe_load(path.read_text())
    table = search_lasting(space, out, *testbed) if testbed else search_grid(space, out)
    write_json(out / "search.json", table)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
