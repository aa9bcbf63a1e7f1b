"""E19: how many steps of fine-tuning on other facts, or on neutral texts, bring the facts back."""

from dataclasses import replace
from typing import NamedTuple

import torch

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier, ask_exam
from srmu.attacks.tuning import SMALL, Row, prepare_learner, split_validation, text_rows, tune_model
from srmu.evals.subject import NotApplicable, Subject, list_facts

STEPS = (5, 10, 20, 50, 100)  # after which the exam is held
LATER = (20, 50, 100)  # on neutral texts, which bring less back
BATCH, TEXTS = 8, 4  # rows of a step: facts are short, texts are not
RANK = 8


class RelearningKind(NamedTuple):
    """What is learned, how fast, and with which weights: adapters of a rank, or 0 for all."""

    name: str
    rows: list[Row]
    rate: float
    rank: int = 0
    steps: tuple[int, ...] = STEPS
    batch: int = BATCH


def relearning_steps(
    model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int
) -> AttackResult:
    """One training a kind, its rate constant after the warm-up; the exam is held on its way.

    Learned are four fifths of the validation facts, as questions and as statements; `val` of a way
    holds the last fifth. Rates are those of E7 and, for adapters, the usual ones of rank 8.
    """
    learned, held = split_validation(exam, seed)
    asked = replace(exam, val=held)
    told = [start + q.answer for q in learned for start in (q.prompt, *q.paraphrases)]
    kinds = kinds_of(
        model, text_rows(model, [*dict.fromkeys(told)]), text_rows(model, texts.neutral)
    )
    plain = ask_exam(model, asked, "")
    ways: list[Setting] = []
    taken, too_large = {}, []
    for kind in kinds:
        try:
            found, taken[kind.name] = relearn_by_steps(model, asked, kind, seed)
        except torch.OutOfMemoryError:
            too_large.append(kind.name)
            continue
        ways += [replace(plain, setting=f"{kind.name}, 0 steps"), *found]
    if not ways:
        raise NotApplicable("fine-tuning this model needs more memory than the device has")
    budget = {
        "facts learned": len({*list_facts(learned)}),
        "steps": taken,
        "out of memory": too_large,
    }
    return AttackResult(tuple(ways), budget=budget | {"batch": {k.name: k.batch for k in kinds}})


def kinds_of(model: Subject, told: list[Row], neutral: list[Row]) -> list[RelearningKind]:
    """The trainings; a small model bears faster ones."""
    small = model.module.num_parameters() < SMALL
    full = [RelearningKind("full weights", told, 1e-4)]
    full += [RelearningKind("full weights at 5e-4", told, 5e-4)] if small else []
    adapters = RelearningKind("LoRA", told, 1e-3 if small else 2e-4, RANK)
    texts = RelearningKind("neutral texts, full weights", neutral, 1e-4, steps=LATER, batch=TEXTS)
    return [adapters, *full, texts]


def relearn_by_steps(
    model: Subject, exam: Exam, kind: RelearningKind, seed: int
) -> tuple[list[Setting], int]:
    """The exam after each number of steps, and how many were taken."""
    ways: list[Setting] = []

    def after(step: int) -> None:
        if step in kind.steps:
            ways.append(ask_exam(model, exam, f"{kind.name}, {step} steps"))

    with prepare_learner(model, kind.rank, seed) as edited:
        taken = tune_model(
            edited,
            kind.rows,
            steps=max(kind.steps),
            learning_rate=kind.rate,
            batch_size=kind.batch,
            seed=seed,
            schedule="constant",
            after=after,
        )
    return ways, taken
