"""Score a model, or a run before and after, on tasks; results go into the run's folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srmu.engine import distributed, weights
from srmu.engine.files import sha256
from srmu.engine.progress import Watch, choose_progress
from srmu.errors import SrmuError
from srmu.evals.lm_eval import evaluate
from srmu.evals.results import Metrics, load_results, merge_results, metric_rows, plain_metrics
from srmu.runs.run import Run, open_target


def score_model(
    target: str | Path | Run | PreTrainedModel,
    tasks: Sequence[str] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    watch: Watch | None = None,
) -> dict[str, Metrics]:
    """Score a model folder, a hub id or a run: `{"after": ...}`, for a run also `"before"`.

    A model that is in memory comes with its `tokenizer`, and is scored where it lies.

    A run's own `eval` tasks are the default; local tasks are found in `tasks_dir`, else in the run's, else in `tasks/`
    beside the model. The scores of a run are merged into the `results.json` of its folder, those of a model into that
    of `out`, if that is named.
    """
    watch = watch or choose_progress()
    if isinstance(target, PreTrainedModel):
        if tokenizer is None:
            raise SrmuError("a model in memory is scored with its tokenizer: tokenizer=...")
        place = None if tasks_dir is None else Path(tasks_dir)
        scores = evaluate(target, tokenizer, tasks, tasks_dir=place, limit=limit, watch=watch)
        return {"after": plain_metrics(scores)}
    opened = open_target(target, device)
    folder, run = opened.base, opened.run
    if run:
        tasks, out = tasks or run.config.eval, run.folder
        tasks_dir = run.config.tasks_dir if tasks_dir is None else tasks_dir
    if not tasks:
        raise SrmuError("no task named; give --tasks a,b")
    if out:
        load_results(out)  # what is wrong with them must show before the work
    tasks_dir = Path(tasks_dir) if tasks_dir is not None else tasks_beside(folder)
    base = weights.fingerprint_model(folder)
    ask = partial(evaluate, opened.module, opened.tokenizer, tasks, tasks_dir=tasks_dir, limit=limit, watch=watch)
    metrics = {"before" if run else "after": ask(fingerprint=weights.changed_fingerprint(base, {}))}
    if run:
        method = run.config.method
        fingerprint = weights.changed_fingerprint(base, run.delta)
        if method.no_checkpoint:  # its options decide the answers, too
            fingerprint = sha256(fingerprint.encode(), repr(method).encode())
        with opened.after():
            metrics["after"] = ask(fingerprint=fingerprint)
    if out and distributed.is_first():
        merge_results(out, [row for when, of_it in metrics.items() for row in metric_rows(of_it, when)])
    return {when: plain_metrics(of_it) for when, of_it in metrics.items()}


def tasks_beside(folder: Path) -> Path | None:
    """The folder of the tasks that come with a model, as in a testbed."""
    tasks = folder.parent / "tasks"
    return tasks if tasks.is_dir() else None
