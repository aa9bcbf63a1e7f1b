"""E1: the same questions in other forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier
from srmu.attacks.generation import count_right_generations
from srmu.attacks.listing import split_listed, unlist_options
from srmu.evals.statistics import LEAST, Estimate, bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import Question, Subject, list_facts, mark_right, option_scores

EXTRA = 2  # tokens that a generation may have more than the answer


def format_shift(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> AttackResult:
    """Cloze, the cyclic orders of listed options; from `standard` also generation, paraphrases.

    Questions that do not list their options, or have no paraphrase, stand as they are where others
    change. What is generated is an answer's text, not its letter.
    """
    questions = (*exam.val, *exam.test)
    posed = [unlist_options(q) for q in questions]

    def way(setting: str, scores: Sequence[Sequence[float]], of: Sequence[Question]) -> Setting:
        got = mark_right(scores, of)
        return Setting(setting, got[: len(exam.val)], got[len(exam.val) :])

    ways = [way("cloze", option_scores(model, posed, normalised=True), posed)]
    metrics: dict[str, Estimate] = {}
    if any(map(split_listed, exam.test)):
        turns = [
            rotate_options(questions, by) for by in range(max(len(q.options) for q in questions))
        ]
        scores = [option_scores(model, turn) for turn in turns]
        orders = [way(f"order {by}", scores[by], turn) for by, turn in enumerate(turns)]
        ways += orders[1:]  # order 0 is the question as it is
        ways.append(way("order average", average_positions(questions, scores), questions))
        names = list_facts(exam.test)
        metrics = {
            f"accuracy, {w.setting}": estimate_accuracy(w.test, names, seed=seed) for w in orders
        }
        metrics["position bias"] = position_bias(
            exam.test, [rows[len(exam.val) :] for rows in scores], seed
        )
    if tier == "smoke":
        return AttackResult(tuple(ways), metrics)
    asked = posed[len(exam.val) :]
    said = count_right_generations(model, asked, extra=EXTRA, seed=seed)
    metrics["generation"] = estimate_accuracy(said, list_facts(asked), seed=seed)
    if any(q.paraphrases for q in questions):
        ways.append(way("paraphrases", score_paraphrases(model, questions), questions))
        pairs = zip(ways[-1].test, exam.test, strict=True)
        having = [(got, q.fact) for got, q in pairs if q.paraphrases]
        if len({fact for _, fact in having}) >= LEAST:
            metrics["paraphrases"] = estimate_accuracy(*zip(*having, strict=True), seed=seed)
    return AttackResult(tuple(ways), metrics)


def score_paraphrases(model: Subject, questions: Sequence[Question]) -> list[list[float]]:
    """Mean score of each option over a question's paraphrases, its own prompt if it has none."""
    forms = [[replace(q, prompt=p) for p in q.paraphrases or (q.prompt,)] for q in questions]
    scores = iter(option_scores(model, [form for group in forms for form in group]))
    return [np.mean([next(scores) for _ in group], axis=0).tolist() for group in forms]


def rotate_options(questions: Sequence[Question], by: int) -> list[Question]:
    """The questions with listed options moved up by so many letters."""
    return [parts.turned(by) if (parts := split_listed(q)) else q for q in questions]


def average_positions(
    questions: Sequence[Question], scores: Sequence[Sequence[Sequence[float]]]
) -> list[list[float]]:
    """Mean score of each option, wherever it stood: its letter counts no more.

    `scores` are those of the letters, by order and question.
    """
    means = []
    for q, *rows in zip(questions, *scores, strict=True):
        shift = 1 if split_listed(q) else 0
        means.append(np.mean([np.roll(row, by * shift) for by, row in enumerate(rows)], 0).tolist())
    return means


def position_bias(
    questions: Sequence[Question], scores: Sequence[Sequence[Sequence[float]]], seed: int
) -> Estimate:
    """Total variation distance of the chosen letters, over all orders, from uniform.

    0 where every letter is chosen equally often, 1 - 1/options where it is always the same one.
    """
    chosen = [(q, rows) for q, *rows in zip(questions, *scores, strict=True) if split_listed(q)]
    table = np.zeros((len(chosen), len(scores)))
    for line, (q, rows) in zip(table, chosen, strict=True):
        for row in rows:
            line[np.argmax(row)] += 1 / len(rows)
        line[: len(q.options)] -= 1 / len(q.options)
    return bootstrap_estimate(
        [table], [list_facts([q for q, _ in chosen])], lambda m: np.abs(m).sum(-1) / 2, seed=seed
    )
