"""E8: relearning a part of the facts brings back the rest, where they are hidden, not gone."""

import math
from collections.abc import Sequence

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier
from srmu.attacks.tuning import split_validation, text_rows, tune_model
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts, mark_answers

EPOCHS = (1, 2, 4)
RATES = (2e-5, 1e-4, 5e-4)
BATCH = 8


def part_relearning(
    model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int
) -> AttackResult:
    """All weights learn questions with their answers; others are asked (arXiv 2410.08827).

    `val` of a way holds a fifth of the validation facts, asked after learning the rest of them.
    With the best setting the whole validation half is learned and the test half asked; the other
    ways have no test. The rate is constant after its warm-up, so that one training gives all
    numbers of epochs.
    """
    rest, asked = split_validation(exam, seed)
    tried = {
        (rate, n): right
        for rate in RATES
        for n, right in relearn_questions(model, rest, asked, rate, EPOCHS[-1], seed).items()
    }
    rate, n = max(tried, key=lambda setting: sum(tried[setting]), default=(0.0, 0))
    test = relearn_questions(model, exam.val, exam.test, rate, n, seed).get(n) if tried else None
    if test is None:
        raise NotApplicable("fine-tuning this model gives losses that are not finite")
    ways = tuple(
        Setting(f"{m} epochs at {r:g}", right, test if (r, m) == (rate, n) else ())
        for (r, m), right in tried.items()
    )
    return AttackResult(
        ways, budget={"facts learned": len({*list_facts(exam.val)}), "batch": BATCH}
    )


def relearn_questions(
    model: Subject,
    learned: Sequence[Question],
    asked: Sequence[Question],
    rate: float,
    epochs: int,
    seed: int,
) -> dict[int, tuple[float, ...]]:
    """Right answers to the questions asked, by the epochs spent on those learned."""
    rows = text_rows(model, [q.prompt + q.answer for q in learned])
    epoch = math.ceil(len(rows) / BATCH)
    found = {}

    def after(step: int) -> None:
        if step in (epoch * n for n in EPOCHS):
            found[step // epoch] = mark_answers(model, asked)

    with model.editable("*") as edited:
        tune_model(
            edited,
            rows,
            steps=epoch * epochs,
            learning_rate=rate,
            batch_size=BATCH,
            seed=seed,
            schedule="constant",
            after=after,
        )
    return found
