"""Bring a run to a stated loss of utility: keep the largest share of its change within it."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from shutil import copyfile

import numpy as np
import torch

from srmu.engine import weights
from srmu.engine.files import write_whole
from srmu.evals.lm_eval import load_questions
from srmu.evals.results import merge_results
from srmu.evals.subject import Subject, mark_answers
from srmu.runs.record import DELTA, RECORD
from srmu.runs.run import Run, open_target

STEPS = 32
load_task = lru_cache(32)(load_questions)  # many runs are asked the same


def match_utility(run: Run, out: Path, budget: float, judged: Sequence[str]) -> None:
    """Write to `out` the run with the share of its change by which the mean accuracy on `judged` falls by `budget`."""
    if (out / RECORD).exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    copyfile(run.folder / "config.yaml", out / "config.yaml")
    where = weights.list_shards(run.base)
    before = {name: weights.stored_tensor(where[name], name).float() for name in run.delta}
    # a method that needs more than its weights to answer is taken whole
    share = 1.0 if run.config.method.no_checkpoint or not before else largest_share(run, before, budget, judged)
    if share < 1:
        changed = {name: mix_tensors(before[name], after, share).to(after.dtype) for name, after in run.delta.items()}
        meta = {"base_model": run.config.model, "method": run.config.method.name, "run": run.config.id}
        names = {name: [name] for name in changed}
        weights.save_delta(out / DELTA, run.base, names, changed, {**meta, "places": run.changes[1]})
    elif (run.folder / DELTA).exists():
        copyfile(run.folder / DELTA, out / DELTA)
    merge_results(out, matched={"share": share, "budget": budget, "judged": list(judged)})
    # last, as in a run; the change that it tells of is the whole run's
    write_whole(out / RECORD, (run.folder / RECORD).read_text(encoding="utf-8"))


def largest_share(run: Run, before: dict[str, torch.Tensor], budget: float, judged: Sequence[str]) -> float:
    """The share in steps of 1 / STEPS, by halving: the mean loss on `judged` rises with it, or nearly so."""
    asked = [load_task(task, Path(run.config.tasks_dir) if run.config.tasks_dir else None) for task in judged]
    opened = open_target(run, "cpu")
    subject = Subject(opened.module, opened.tokenizer)

    def kept(share: float) -> float:
        mixed = {name: mix_tensors(before[name], tensor, share) for name, tensor in run.delta.items()}
        weights.apply_delta(subject.module, mixed, run.changes[1])
        return float(np.mean([np.mean(mark_answers(subject, task)) for task in asked]))

    floor = kept(0.0) - budget
    if kept(1.0) >= floor:
        return 1.0
    return bisect_left(range(1, STEPS), True, key=lambda step: kept(step / STEPS) < floor) / STEPS


def mix_tensors(before: torch.Tensor, after: torch.Tensor, share: float) -> torch.Tensor:
    return before + share * (after.float() - before)
