"""Find settings whose suppression lasts: what relearning brings back, on validation questions.

    python benchmarks/search_robust.py configs/search-robust.yaml TESTBED OUT [LABEL ...]

TESTBED is a folder that `srmu testbed` wrote. All settings of each method (or of those named) are
run; runs and relearning that are in OUT are not made again. Chosen is, of the settings that lose at
most `most_loss` of the utility, the one with the least residual, and of those within `tie` of it
the one that suppresses most; where none keeps the utility, the one that loses least. The residual
is the largest accuracy of before and after relearning; a setting that loses more than `hopeless`,
or that leaves more than `unchanged` of the accuracy, does not relearn, and is not chosen while
another keeps the utility. OUT/search-robust.json holds all that was tried, and what was chosen.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from srmu.attacks.relearning import prepare_learner, split_validation, text_rows
from srmu.attacks.suite import Sources, Subjects, load_exam
from srmu.engine.files import read_json, write_json
from srmu.engine.fine_tune import tune_model
from srmu.engine.progress import Watch, ignore_progress, show_progress
from srmu.evals.parallel import RunJob
from srmu.evals.results import load_results, merge_results, read_metrics
from srmu.evals.subject import mark_answers
from srmu.reproduce.experiment import Experiment, PlannedRow, Scored, Testbeds, run_experiment
from srmu.runs.run import Run

STEPS, AFTER = 50, (20, 50)  # of relearning, and when the questions are asked
RATE, BATCH = 1e-4, 8
SPLITS = 3  # other fifths of the facts to hold back, over which accuracies are averaged

Row = dict[str, Any]


@dataclass(frozen=True)
class Relearned(Scored):
    """A run is made and scored, and then learns a part of the facts again."""

    space: Mapping[str, Any] = field(default_factory=dict)

    def find_result(self, job: RunJob) -> Path | None:
        folder = super().find_result(job)
        row = read_row(folder, self.space) if folder else {}
        return folder if row.get("relearned") or row.get("hopeless") else None

    def measure_run(self, job: RunJob, watch: Watch = ignore_progress) -> Path:
        folder = super().measure_run(job, watch)
        if not read_row(folder, self.space)["hopeless"]:
            merge_results(folder, relearned=relearn(folder, self.space))
        return folder


def relearn(folder: Path, space: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy on a fifth of the validation facts after learning the rest, by steps taken."""
    run = Run.open(folder)
    sources = Sources((space["test"],), space["forget"], tasks_dir=str(run.config.tasks_dir))
    questions = load_exam(sources, run.config, 0)
    subject = Subjects(run, "", "cpu").unlearned
    right: dict[int, list[float]] = {step: [] for step in AFTER}
    for seed in range(SPLITS):
        learned, held = split_validation(questions, seed)

        def ask(step: int, held: Sequence[Any] = held) -> None:
            if step in right:
                right[step].append(mean(mark_answers(subject, held)))

        with prepare_learner(subject, 0, seed) as model:
            tune_model(
                model, text_rows(subject, [q.prompt + q.answer for q in learned]), steps=STEPS,
                learning_rate=RATE, batch_size=BATCH, seed=seed, schedule="constant", after=ask,
            )  # fmt: skip
    return {str(step): round(mean(values), 4) for step, values in right.items() if values}


def read_row(folder: Path, space: Mapping[str, Any]) -> Row:
    """What a setting comes to: accuracies on validation questions, what it lost and relearned."""
    before, after = (read_metrics(folder)[when] for when in ("before", "after"))
    utility = [f"{task}/acc" for task in space["utility"]]
    tasks = (space["forget"], *space["utility"])
    row: Row = {task: round(after[f"{task}/acc"]["value"], 4) for task in tasks}
    lost = mean(before[metric]["value"] - after[metric]["value"] for metric in utility)
    row |= {"lost": round(lost, 4), "seconds": round(Run(folder).record["seconds"], 1)}
    row["hopeless"] = lost > space["hopeless"] or row[space["forget"]] > space["unchanged"]
    if relearned := load_results(folder).get("relearned"):
        row["relearned"] = relearned
        row["residual"] = max(row[space["forget"]], *relearned.values())
    return row


def choose_row(rows: Sequence[Row], space: Mapping[str, Any]) -> Row | None:
    """The best of the settings, as this file's first lines say."""
    whole = [row for row in rows if "failed" not in row]
    keeping = [row for row in whole if row["lost"] <= space["most_loss"] and "residual" in row]
    if not keeping:
        return min(whole, key=lambda row: (row["lost"], row[space["forget"]]), default=None)
    least = min(row["residual"] for row in keeping) + space["tie"]
    near = [row for row in keeping if row["residual"] <= least]
    return min(near, key=lambda row: (row[space["forget"]], row["lost"]))


def main(path: Path, testbed: Path, out: Path, labels: Sequence[str]) -> None:
    space = yaml.safe_load(path.read_text())
    table_path = out / "search-robust.json"
    table = read_json(table_path, {})
    tasks = (space["forget"], *space["utility"])
    place = Testbeds(testbed.parent, folder=testbed.name)
    for label in labels or space["methods"]:
        method, rows = space["methods"][label], []
        settings = {" ".join(s): (*space["common"], *method["set"], *s) for s in method["try"]}
        experiment = Experiment(out, place, settings, (0,), tasks, Relearned(space=space))
        planned = [PlannedRow(name, name, space["regime"]) for name in settings]
        for plan, row in run_experiment(experiment, planned, show_progress).items():
            found = {"failed": row.why[:120]} if row.why else read_row(row.runs[0], space)
            rows.append({"setting": [*settings[plan.label]]} | found)
        best = choose_row(rows, space)
        table[label] = {"chosen": best and best["setting"], "tried": rows}
        write_json(table_path, table)
        print(label, "chosen:", json.dumps(best), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
