"""Scores of a model or a run on its tasks, before and after, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srmu.engine import distributed, weights
from srmu.engine.files import sha256, write_json
from srmu.engine.loading import load_module, read_config
from srmu.engine.progress import Watch, choose_progress
from srmu.errors import SrmuError
from srmu.evals.lm_eval import Results, evaluate
from srmu.runs.record import extend_record
from srmu.runs.run import Run, find_device, load_tokenizer


def score_model(
    target: str | Path | Run | PreTrainedModel,
    tasks: Sequence[str] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    watch: Watch | None = None,
) -> dict[str, Results]:
    """Score a model folder, a hub id or a run: `{"after": ...}`, for a run also `"before"`.

    A model that is in memory comes with its `tokenizer`, and is scored where it lies.

    A run's own `eval` tasks are the default; local tasks are found in `tasks_dir`, else in the
    run's, else in `tasks/` beside the model. A run's scores go into `results.json` and
    `before.json` of its folder.
    """
    watch = watch or choose_progress()
    if isinstance(target, PreTrainedModel):
        return {"after": score_loaded(target, tokenizer, tasks, tasks_dir, limit, watch)}
    if isinstance(target, Run):
        run: Run | None = target
    else:
        is_run = (Path(target) / "record.json").exists()
        run = Run.open(Path(target)) if is_run else None
    folder = run.base if run else weights.locate_model(str(target))
    delta = run.delta if run else {}
    read_config(folder)
    weights.list_shards(folder)
    if run:
        tasks = tasks or run.config.eval
        if tasks_dir is None:
            tasks_dir = run.config.tasks_dir
    if not tasks:
        raise SrmuError("no task named; give --tasks a,b")
    tasks_dir = Path(tasks_dir) if tasks_dir is not None else tasks_beside(folder)
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    module = load_module(folder).eval().to(find_device(device))

    base = weights.fingerprint_model(folder)

    def measured(fingerprint: str) -> Results:
        return evaluate(
            module,
            tokenizer,
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
    with method.at_inference(module, partial(weights.apply_delta, module, folder, delta)):
        scores = {"before": before, "after": measured(fingerprint)}
    if not distributed.is_first():
        return scores
    write_json(run.folder / "before.json", scores["before"])
    write_json(run.folder / "results.json", scores["after"])
    extend_record(run.folder, ["before.json", "results.json"], results=scores)
    return scores


def score_loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    tasks_dir: str | Path | None,
    limit: int | None,
    watch: Watch,
) -> Results:
    """Scores of a model in memory, which are kept nowhere."""
    if tokenizer is None:
        raise SrmuError("a model in memory is scored with its tokenizer: tokenizer=...")
    place = None if tasks_dir is None else Path(tasks_dir)
    return evaluate(model, tokenizer, tasks, tasks_dir=place, limit=limit, watch=watch)


def tasks_beside(folder: Path) -> Path | None:
    """Where the tasks that come with a model are, as in a testbed."""
    found = folder.parent / "tasks"
    return found if found.is_dir() else None
