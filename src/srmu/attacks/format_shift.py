"""E1: the same questions in other forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts, Tier
from srmu.attacks.generation import count_right_generations
from srmu.attacks.listing import split_listed, unlist_options
from srmu.evals.statistics import LEAST, Estimate, bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import Question, Subject, list_facts, mark_right, option_scores


@dataclass(frozen=True, kw_only=True)
class FormatShift(Attack):
    """Cloze, the cyclic orders of listed options; from `standard` also generation, paraphrases.

    Questions that do not list their options, or have no paraphrase, stand as they are where others
    change. What is generated is an answer's text, not its letter.
    """

    id = "E1"
    name = "format_shift"
    tier = "smoke"

    rephrases: bool = True  # also asks paraphrases, and has answers written out
    extra: int = 2  # tokens that a generation may have more than the answer

    @classmethod
    def at_tier(cls, tier: Tier) -> Self:
        return cls(rephrases=tier != "smoke")

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        questions = (*exam.val, *exam.test)
        posed = [unlist_options(q) for q in questions]
        scores = option_scores(model, posed, normalised=True)
        ways = [mark_halves("cloze", scores, posed, exam)]
        metrics: dict[str, Estimate] = {}
        if any(map(split_listed, exam.test)):
            orders, metrics = ask_orders(model, exam, seed)
            ways += orders
        if not self.rephrases:
            return AttackResult(tuple(ways), metrics)
        asked = posed[len(exam.val) :]
        right = count_right_generations(model, asked, extra=self.extra, seed=seed)
        metrics["generation"] = estimate_accuracy(right, list_facts(asked), seed=seed)
        if any(q.paraphrases for q in questions):
            scores = score_paraphrases(model, questions)
            ways.append(mark_halves("paraphrases", scores, questions, exam))
            pairs = zip(ways[-1].test, exam.test, strict=True)
            having = [(correct, q.fact) for correct, q in pairs if q.paraphrases]
            if len({fact for _, fact in having}) >= LEAST:
                metrics["paraphrases"] = estimate_accuracy(*zip(*having, strict=True), seed=seed)
        return AttackResult(tuple(ways), metrics)


def mark_halves(setting: str, scores: Sequence[Sequence[float]], questions: Sequence[Question], exam: Exam) -> Setting:
    """Right answers to the questions, those of the validation half first, from their scores."""
    right = mark_right(scores, questions)
    return Setting(setting, right[: len(exam.val)], right[len(exam.val) :])


def ask_orders(model: Subject, exam: Exam, seed: int) -> tuple[list[Setting], dict[str, Estimate]]:
    """Each cyclic order of the options but their own, and their average; metrics of all."""
    questions = (*exam.val, *exam.test)
    turns = [rotate_options(questions, by) for by in range(max(len(q.options) for q in questions))]
    scores = [option_scores(model, turn) for turn in turns]
    orders = [mark_halves(f"order {by}", scores[by], turn, exam) for by, turn in enumerate(turns)]
    average = mark_halves("order average", average_positions(questions, scores), questions, exam)
    names = list_facts(exam.test)
    metrics = {f"accuracy, {order.setting}": estimate_accuracy(order.test, names, seed=seed) for order in orders}
    metrics["position bias"] = position_bias(exam.test, [rows[len(exam.val) :] for rows in scores], seed)
    return [*orders[1:], average], metrics  # order 0 is the question as it is


def score_paraphrases(model: Subject, questions: Sequence[Question]) -> list[list[float]]:
    """Mean score of each option over a question's paraphrases, its own prompt if it has none."""
    forms = [[replace(q, prompt=p) for p in q.paraphrases or (q.prompt,)] for q in questions]
    scores = iter(option_scores(model, [form for group in forms for form in group]))
    return [np.mean([next(scores) for _ in group], axis=0).tolist() for group in forms]


def rotate_options(questions: Sequence[Question], by: int) -> list[Question]:
    """The questions with listed options moved up by so many letters."""
    return [parts.turned(by) if (parts := split_listed(q)) else q for q in questions]


def average_positions(questions: Sequence[Question], scores: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Mean score of each option, wherever it stood: its letter counts no more.

    `scores` are those of the letters, by order and question.
    """
    means = []
    for q, *rows in zip(questions, *scores, strict=True):
        shift = 1 if split_listed(q) else 0
        means.append(np.mean([np.roll(row, by * shift) for by, row in enumerate(rows)], 0).tolist())
    return means


def position_bias(questions: Sequence[Question], scores: Sequence[Sequence[Sequence[float]]], seed: int) -> Estimate:
    """Total variation distance of the chosen letters, over all orders, from uniform.

    0 where every letter is chosen equally often, 1 - 1/options where it is always the same one.
    """
    chosen = [(q, rows) for q, *rows in zip(questions, *scores, strict=True) if split_listed(q)]
    table = np.zeros((len(chosen), len(scores)))
    for line, (q, rows) in zip(table, chosen, strict=True):
        for row in rows:
            line[np.argmax(row)] += 1 / len(rows)
        line[: len(q.options)] -= 1 / len(q.options)
    return bootstrap_estimate([table], [list_facts([q for q, _ in chosen])], lambda m: np.abs(m).sum(-1) / 2, seed=seed)
