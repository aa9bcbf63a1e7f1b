"""E8: relearning a part of the facts brings back the rest, where they are hidden, not gone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts
from srmu.attacks.tuning import split_validation, text_rows, tune_and_ask
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts, mark_answers


@dataclass(frozen=True, kw_only=True)
class PartRelearning(Attack):
    """All weights learn questions with their answers; others are asked (arXiv 2410.08827).

    `val` of a way holds a fifth of the validation facts, asked after learning the rest of them.
    With the best setting the whole validation half is learned and the test half asked; the other
    ways have no test. The rate is constant after its warm-up, so that one training gives all
    numbers of epochs.
    """

    id = "E8"
    name = "part_relearning"
    tier = "standard"

    epochs: tuple[int, ...] = (1, 2, 4)
    rates: tuple[float, ...] = (2e-5, 1e-4, 5e-4)
    batch: int = 8

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        rest, asked = split_validation(exam, seed)
        tried = {
            (rate, n): right
            for rate in self.rates
            for n, right in self.relearn(model, rest, asked, rate, self.epochs, seed).items()
        }
        rate, n = max(tried, key=lambda setting: sum(tried[setting]), default=(0.0, 0))
        test = self.relearn(model, exam.val, exam.test, rate, [n], seed).get(n) if tried else None
        if test is None:
            raise NotApplicable("fine-tuning this model gives losses that are not finite")
        ways = tuple(
            Setting(f"{m} epochs at {r:g}", right, test if (r, m) == (rate, n) else ())
            for (r, m), right in tried.items()
        )
        budget = {"facts learned": len({*list_facts(exam.val)}), "batch": self.batch}
        return AttackResult(ways, budget=budget)

    def relearn(
        self,
        model: Subject,
        learned: Sequence[Question],
        asked: Sequence[Question],
        rate: float,
        epochs: Sequence[int],
        seed: int,
    ) -> dict[int, tuple[float, ...]]:
        """Right answers to the questions asked, by the epochs spent on others."""
        rows = text_rows(model, [q.prompt + q.answer for q in learned])
        epoch = math.ceil(len(rows) / self.batch)
        right, _ = tune_and_ask(
            model,
            rows,
            lambda step: mark_answers(model, asked),
            [epoch * n for n in epochs],
            learning_rate=rate,
            batch_size=self.batch,
            seed=seed,
            schedule="constant",
        )
        return {step // epoch: marks for step, marks in right.items()}
