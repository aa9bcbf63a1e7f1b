"""E19: how many steps of fine-tuning on other facts, or on neutral texts, bring the facts back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts, ask_exam
from srmu.attacks.tuning import SMALL, split_validation, text_rows, tune_and_ask
from srmu.engine.fine_tune import Row
from srmu.evals.subject import NotApplicable, Subject, list_facts


class RelearningKind(NamedTuple):
    """What is learned, how fast, and with which weights: adapters of a rank, or 0 for all."""

    name: str
    rows: Sequence[Row]
    rate: float
    rank: int
    steps: tuple[int, ...]  # after which the exam is held
    batch: int


@dataclass(frozen=True, kw_only=True)
class RelearningSteps(Attack):
    """One training a kind, its rate constant after the warm-up; the exam is held on its way.

    Learned are four fifths of the validation facts, as questions and as statements; `val` of a way
    holds the last fifth. Rates are those of E7 and, for adapters, the usual ones of rank 8.
    """

    id = "E19"
    name = "relearning_steps"
    tier = "standard"

    steps: tuple[int, ...] = (5, 10, 20, 50, 100)  # after which the exam is held
    text_steps: tuple[int, ...] = (20, 50, 100)  # on neutral texts, which bring less back
    batch: int = 8  # facts a step
    text_batch: int = 4  # neutral texts a step: they are longer
    rank: int = 8  # of LoRA
    rate: float = 1e-4
    faster: tuple[str, float] = ("full weights at 5e-4", 5e-4)  # of a small model, too
    lora_rates: tuple[float, float] = (1e-3, 2e-4)  # of a small model, of a larger one
    small: int = SMALL

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        learned, held = split_validation(exam, seed)
        asked = replace(exam, val=held)
        statements = [start + q.answer for q in learned for start in (q.prompt, *q.paraphrases)]
        facts = text_rows(model, [*dict.fromkeys(statements)])
        kinds = self.list_kinds(model, facts, text_rows(model, texts.neutral))
        plain = ask_exam(model, asked, "")
        ways: list[Setting] = []
        taken, too_large = {}, []
        for kind in kinds:
            try:
                reached, taken[kind.name] = relearn_by_steps(model, asked, kind, seed)
            except torch.OutOfMemoryError:
                too_large.append(kind.name)
                continue
            ways += [replace(plain, setting=f"{kind.name}, 0 steps"), *reached]
        if not ways:
            raise NotApplicable("fine-tuning this model needs more memory than the device has")
        budget = {
            "facts learned": len({*list_facts(learned)}),
            "steps": taken,
            "out of memory": too_large,
            "batch": {kind.name: kind.batch for kind in kinds},
        }
        return AttackResult(tuple(ways), budget=budget)

    def list_kinds(self, model: Subject, facts: Sequence[Row], texts: Sequence[Row]) -> list[RelearningKind]:
        """The trainings; a small model bears faster ones."""
        small = model.module.num_parameters() < self.small

        def learn(name: str, rate: float, rank: int = 0) -> RelearningKind:
            return RelearningKind(name, facts, rate, rank, self.steps, self.batch)

        kinds = [learn("LoRA", self.lora_rates[not small], self.rank)]
        kinds.append(learn("full weights", self.rate))
        if small:
            kinds.append(learn(*self.faster))
        return [
            *kinds,
            RelearningKind("neutral texts, full weights", texts, self.rate, 0, self.text_steps, self.text_batch),
        ]


def relearn_by_steps(model: Subject, exam: Exam, kind: RelearningKind, seed: int) -> tuple[list[Setting], int]:
    """The exam after each number of steps, and how many were taken."""
    reached, taken = tune_and_ask(
        model,
        kind.rows,
        lambda step: ask_exam(model, exam, f"{kind.name}, {step} steps"),
        kind.steps,
        rank=kind.rank,
        learning_rate=kind.rate,
        batch_size=kind.batch,
        seed=seed,
        schedule="constant",
    )
    return [*reached.values()], taken
