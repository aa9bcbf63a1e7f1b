"""Find settings whose suppression lasts: what relearning brings back, on validation questions.

    python benchmarks/search_robust.py configs/search-robust.yaml TESTBED OUT [LABEL ...]

TESTBED is a folder that `srmu testbed` wrote. Of each method (or of those named) all settings are
run one after the other; runs and attacks that are in OUT are not made again. Chosen is, of the
settings that lose at most `most_loss` of the utility, the one with the least residual, and of those
within `tie` of it the one that suppresses most; where none keeps the utility, the one that loses
least. The residual is the largest accuracy of before and after relearning; a setting that loses
more than `hopeless`, or that leaves more than `unchanged` of the accuracy, is not attacked, and not
chosen while another keeps the utility.
OUT/search-robust.json holds all that was tried, and what was chosen.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from search import attempt
from srmu.attacks.base import NotApplicable
from srmu.attacks.suite import Sources, Subjects, load_exam
from srmu.attacks.tuning import prepare_learner, split_validation, text_rows, tune_model
from srmu.engine.files import write_json
from srmu.evals.parallel import RunJob
from srmu.evals.subject import mark_answers
from srmu.runs.config import load_config
from srmu.runs.run import Run

STEPS, AFTER = 50, (20, 50)  # of relearning, and when the questions are asked
RATE, BATCH = 1e-4, 8
SPLITS = 3  # other fifths of the facts to hold back, over which accuracies are averaged

Row = dict[str, Any]


def relearned(folder: Path, exam: Mapping[str, Any], kept: Path) -> dict[str, float]:
    """Accuracy on a fifth of the validation facts after learning the rest, by steps taken."""
    if kept.exists():
        found: dict[str, float] = json.loads(kept.read_text())
        return found
    run = Run.open(folder)
    sources = Sources((exam["test"],), exam["val"], tasks_dir=str(run.config.tasks_dir))
    questions = load_exam(sources, run.config, 0)
    subject = Subjects(run, run.base, "", "cpu").unlearned
    right: dict[int, list[float]] = {step: [] for step in AFTER}
    for seed in range(SPLITS):
        learned, held = split_validation(questions, seed)

        def asked(step: int, held: Sequence[Any] = held) -> None:
            if step in right:
                right[step].append(mean(mark_answers(subject, held)))

        with prepare_learner(subject, 0, seed) as model:
            tune_model(
                model, text_rows(subject, [q.prompt + q.answer for q in learned]), steps=STEPS,
                learning_rate=RATE, batch_size=BATCH, seed=seed, schedule="constant", after=asked,
            )  # fmt: skip
    found = {str(step): round(mean(values), 4) for step, values in right.items() if values}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, found)
    return found


def measured(job: RunJob, space: Mapping[str, Any], out: Path) -> Row:
    """What a setting comes to: accuracies on validation questions, and what it lost and kept."""
    started = time.monotonic()
    folder = attempt(job)
    if isinstance(folder, str):
        return {"failed": folder[:120]}
    utility = space["utility"]
    before, after = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("before", "results")
    )
    row: Row = {
        task: round(after[f"{task}/acc"]["value"], 4) for task in (space["forget"], *utility)
    }
    lost = mean(before[f"{t}/acc"]["value"] - after[f"{t}/acc"]["value"] for t in utility)
    row |= {"lost": round(lost, 4), "seconds": round(Run.open(folder).record["seconds"], 1)}
    if lost > space["hopeless"] or row[space["forget"]] > space["unchanged"]:
        print(f"{time.monotonic() - started:.0f} s", *row.values(), sep="  ", flush=True)
        return row
    exam = {"test": space["test"], "val": space["forget"]}
    try:
        after_steps = relearned(folder, exam, out / "relearned" / f"{folder.name}.json")
    except NotApplicable as error:
        return row | {"failed": str(error)[:120]}
    row["relearned"] = after_steps
    row["residual"] = max(row[space["forget"]], *after_steps.values())
    print(f"{time.monotonic() - started:.0f} s", *row.values(), sep="  ", flush=True)
    return row


def chosen(rows: Sequence[Row], space: Mapping[str, Any]) -> Row | None:
    """The best of the settings, as this file's first lines say."""
    whole = [row for row in rows if "failed" not in row]
    keeping = [row for row in whole if row["lost"] <= space["most_loss"] and "residual" in row]
    if not keeping:
        return min(whole, key=lambda row: (row["lost"], row[space["forget"]]), default=None)
    least = min(row["residual"] for row in keeping) + space["tie"]
    near = [row for row in keeping if row["residual"] <= least]
    return min(near, key=lambda row: (row[space["forget"]], row["lost"]))


def main(path: Path, testbed: Path, out: Path, labels: Sequence[str]) -> None:
    torch.set_num_threads(1)
    space = yaml.safe_load(path.read_text())
    table_path = out / "search-robust.json"
    table = json.loads(table_path.read_text()) if table_path.exists() else {}
    out.mkdir(parents=True, exist_ok=True)
    tasks = (space["forget"], *space["utility"])
    for label in labels or space["methods"]:
        method, rows = space["methods"][label], []
        for setting in method["try"]:
            overrides = [*space["common"], *method["set"], *setting]
            given = [o.replace("{testbed}", str(testbed.resolve())) for o in overrides]
            given.append(f"runs_dir={(out / 'runs').resolve()}")
            config = testbed / f"{space['regime']}.yaml"
            if not load_config(config, given).method.reads_retain:
                given.append("topics.organism.retain=[]")
            print(label, *setting, flush=True)
            job = RunJob(config, tuple(given), tasks)
            rows.append({"setting": overrides} | measured(job, space, out))
            best = chosen(rows, space)
            table[label] = {"chosen": best and best["setting"], "tried": rows}
            write_json(table_path, table)
        print("chosen:", json.dumps(best), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
