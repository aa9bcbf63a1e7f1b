"""Right answers question by question, which the intervals of differences need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from srmu.attacks.suite import number_facts, write_answers
from srmu.engine import weights
from srmu.engine.loading import load_module
from srmu.evals.matched import load_task
from srmu.evals.subject import Subject, mark_answers
from srmu.runs.run import Run, load_tokenizer


def answer_tasks(run: Run, tasks: Sequence[str]) -> dict[str, Any]:
    """The answers of a run and of its original model."""
    module = load_module(run.base).eval()
    subject = Subject(module, load_tokenizer(run.base))
    before = answer_original(str(run.base), run.config.tasks_dir or "", tuple(tasks))
    method = run.config.method
    with method.at_inference(module, partial(weights.apply_delta, module, run.base, run.delta)):
        return {"before": before, "after": ask_tasks(subject, run.config.tasks_dir, tasks)}


@lru_cache(8)
def answer_original(base: str, tasks_dir: str, tasks: tuple[str, ...]) -> dict[str, Any]:
    subject = Subject(load_module(Path(base)).eval(), load_tokenizer(Path(base)))
    return ask_tasks(subject, tasks_dir, tasks)


def ask_tasks(subject: Subject, tasks_dir: str | None, tasks: Sequence[str]) -> dict[str, Any]:
    """A model's right answers to local tasks, and which fact each question is about."""
    answers = {}
    for task in tasks:
        questions = load_task(task, tasks_dir or "")
        right = write_answers(mark_answers(subject, questions))
        answers[task] = {"right": right, "facts": number_facts([q.fact for q in questions])}
    return answers
