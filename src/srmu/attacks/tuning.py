"""What the relearning attacks have in common: rows of texts, halves of facts, what is trained."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from srmu.attacks.base import Exam
from srmu.engine.fine_tune import Row
from srmu.engine.model import EditableModel
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts

SMALL = 100_000_000  # parameters; a model with fewer bears higher learning rates


def text_rows(model: Subject, texts: Sequence[str], length: int = 512) -> list[Row]:
    """Texts, of which so many tokens are read, as rows of which all tokens count."""
    ids = [model.tokens(text)[: min(length, model.max_length)] for text in texts]
    rows: list[Row] = [([], row) for row in ids if len(row) > 1]
    if not rows:
        raise NotApplicable("there are no neutral texts to fine-tune on; name some")
    return rows


def split_validation(
    exam: Exam, seed: int, parts: int = 5
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The validation questions to learn from, and those on one part of its facts to ask."""
    known = list(dict.fromkeys(list_facts(exam.val)))
    assert not {*known} & {*list_facts(exam.test)}, "the halves of the exam share facts"
    if len(known) < parts:
        raise NotApplicable(f"it needs {parts} or more facts on the validation half")
    held = {*random.Random(seed).sample(known, len(known) // parts)}
    learned = tuple(q for q in exam.val if q.fact not in held)
    return learned, tuple(q for q in exam.val if q.fact in held)


@contextmanager
def prepare_learner(
    model: Subject, rank: int, seed: int, alpha: int = 16
) -> Iterator[EditableModel]:
    """The model to be tuned: all its weights, or LoRA of that rank beside its matrices."""
    with model.editable("*.linear" if rank else "*") as edited:
        rank = min(rank, *(side for p in edited.trained.values() for side in p.shape))
        with edited.adapted(rank, alpha, seed) if rank else nullcontext():
            yield edited
