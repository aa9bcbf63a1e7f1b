"""Scores of a model or a run on its tasks, before and after, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srmu.engine import distributed, weights
from srmu.engine.files import sha256, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.lm_eval import Results, evaluate
from srmu.runs.open import open_target
from srmu.runs.record import extend_record
from srmu.runs.run import Run


def score_model(
    target: str | Path | Run,
    tasks: Sequence[str] = (),
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    watch: Watch = ignore_progress,
) -> dict[str, Results]:
    """Score a model folder, a hub id or a run: `{"after": ...}`, for a run also `"before"`.

    A run's own `eval` tasks are the default; local tasks are found in `tasks_dir`, else in the
    run's, else in `tasks/` beside the model. A run's scores go into `results.json` and
    `before.json` of its folder.
    """
    opened = open_target(target, device)
    folder, run = opened.base, opened.run
    delta = run.delta if run else {}
    if run:
        tasks = tasks or run.config.eval
        if tasks_dir is None:
            tasks_dir = run.config.tasks_dir
    if not tasks:
        raise SrmuError("no task named; give --tasks a,b")
    tasks_dir = Path(tasks_dir) if tasks_dir is not None else tasks_beside(folder)
    base = weights.fingerprint_model(folder)

    def measured(fingerprint: str) -> Results:
        return evaluate(
            opened.module,
            opened.tokenizer,
            tasks,
            tasks_dir=tasks_dir,
            limit=limit,
            fingerprint=fingerprint,
            watch=watch,
        )

    before = measured(weights.changed_fingerprint(base, {}))
    if run is None:
        return {"after": before}
    method = run.config.method
    fingerprint = weights.changed_fingerprint(base, delta)
    if method.no_checkpoint:  # its options decide the answers, too
        fingerprint = sha256(fingerprint.encode(), repr(method).encode())
    with opened.after():
        scores = {"before": before, "after": measured(fingerprint)}
    if not distributed.is_first():
        return scores
    write_json(run.folder / "before.json", scores["before"])
    write_json(run.folder / "results.json", scores["after"])
    extend_record(run.folder, ["before.json", "results.json"], results=scores)
    return scores


def tasks_beside(folder: Path) -> Path | None:
    """Where the tasks that come with a model are, as in a testbed."""
    found = folder.parent / "tasks"
    return found if found.is_dir() else None
