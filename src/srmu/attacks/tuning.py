"""What the relearning attacks have in common: rows of texts, halves of facts, what is trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from srmu.attacks.base import Exam
from srmu.engine.fine_tune import Row, tune_model
from srmu.engine.model import EditableModel
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts

T = TypeVar("T")

SMALL = 100_000_000  # parameters; a model with fewer bears higher learning rates


def text_rows(model: Subject, texts: Sequence[str], length: int = 512) -> list[Row]:
    """Texts cut at a number of tokens, as rows whose tokens all count."""
    ids = [model.tokens(text)[: min(length, model.max_length)] for text in texts]
    rows: list[Row] = [([], row) for row in ids if len(row) > 1]
    if not rows:
        raise NotApplicable("there are no neutral texts to fine-tune on; name some")
    return rows


def split_validation(exam: Exam, seed: int, parts: int = 5) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The validation questions to learn from, and those on one part of its facts to ask."""
    known = list(dict.fromkeys(list_facts(exam.val)))
    assert not {*known} & {*list_facts(exam.test)}, "the halves of the exam share facts"
    if len(known) < parts:
        raise NotApplicable(f"it needs {parts} or more facts on the validation half")
    held = {*random.Random(seed).sample(known, len(known) // parts)}
    learned = tuple(q for q in exam.val if q.fact not in held)
    return learned, tuple(q for q in exam.val if q.fact in held)


@contextmanager
def prepare_learner(model: Subject, rank: int, seed: int, alpha: int = 16) -> Iterator[EditableModel]:
    """The model to be tuned: all its weights, or LoRA of that rank beside its matrices."""
    with model.editable("*.linear" if rank else "*") as edited:
        rank = min(rank, *(side for p in edited.trained.values() for side in p.shape))
        with edited.adapted(rank, alpha, seed) if rank else nullcontext():
            yield edited


def tune_and_ask(
    model: Subject,
    rows: Sequence[Row],
    ask: Callable[[int], T],
    steps: Collection[int],
    *,
    rank: int = 0,
    seed: int,
    **options: Any,
) -> tuple[dict[int, T], int]:
    """What `ask` gives after each number of steps of one fine-tuning, and how many were taken.

    `options` are those of `tune_model`.
    """
    answers: dict[int, T] = {}

    def after(step: int) -> None:
        if step in steps:
            answers[step] = ask(step)

    with prepare_learner(model, rank, seed) as edited:
        taken = tune_model(edited, rows, steps=max(steps), seed=seed, after=after, **options)
    return answers, taken
