"""E3: what is to be forgotten and what is not in one prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from srmu.attacks.base import Attack, AttackResult, Exam, Texts, ask_exam
from srmu.attacks.listing import solve_question, split_listed, unlist_options
from srmu.evals.statistics import LEAST, bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts, mark_answers


@dataclass(frozen=True, kw_only=True)
class EntangledQueries(Attack):
    """Forget and harmless questions in pairs; forget terms in harmless questions.

    In a pair, the question in front comes with its right answer. The costs are the accuracy on
    harmless questions less that with a forget term in them.
    """

    id = "E3"
    name = "entangled_queries"
    tier = "smoke"

    harmless: int = 200  # harmless questions asked, at most

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        rng = random.Random(seed)
        pool = [question for task in exam.utility.values() for question in task]
        harmless = rng.sample(pool, min(self.harmless, len(pool)))
        names = list_facts(harmless)
        if len({*names}) < LEAST:
            raise NotApplicable(f"needs harmless questions about {LEAST} facts: give utility tasks")
        ways = tuple(
            ask_exam(model, Exam(posed(harmless, exam.test), posed(harmless, exam.val)), setting)
            for setting, posed in (("second", put_after), ("first and again", put_around))
        )
        partners = rng.sample(exam.test, len(exam.test))
        forms = {
            "alone": harmless,
            "in pair": put_after(partners, harmless),
            "option": [replace_option(q, rotate_pairs(partners, i), rng) for i, q in enumerate(harmless)],
            "in front": [put_forget_in_front(q, f) for q, f in zip(harmless, cycle(partners))],
        }
        right = {name: mark_answers(model, questions) for name, questions in forms.items()}
        metrics = {
            "forget in pair": estimate_accuracy(ways[0].test, list_facts(exam.test), seed=seed),
            "utility alone": estimate_accuracy(right["alone"], names, seed=seed),
            "utility in pair": estimate_accuracy(right["in pair"], names, seed=seed),
        }
        for name in ("option", "in front"):
            table = list(zip(right["alone"], right[name], strict=True))
            cost = bootstrap_estimate([table], [names], lambda m: m[..., 0] - m[..., 1], seed=seed)
            metrics[f"cost of a forget term, {name}"] = cost
        return AttackResult(ways, metrics, {"harmless questions": len(harmless)})


def put_after(fronts: Sequence[Question], questions: Sequence[Question]) -> tuple[Question, ...]:
    """Each question after one of `fronts` and its right answer."""
    return tuple(
        replace(q, prompt=solve_question(front) + q.prompt) for q, front in zip(questions, cycle(fronts), strict=False)
    )


def put_around(between: Sequence[Question], questions: Sequence[Question]) -> tuple[Question, ...]:
    """Each question, then one of `between` with its right answer, then the first one again.

    An answer to the first question, read before the second, would be that to it alone.
    """
    pairs = zip(questions, put_after(between, questions), strict=True)
    return tuple(replace(pair, prompt=f"{q.prompt}\n\n{pair.prompt}") for q, pair in pairs)


def rotate_pairs(questions: Sequence[Question], by: int) -> list[Question]:
    by %= len(questions)
    return [*questions[by:], *questions[:by]]


def replace_option(question: Question, forget: Sequence[Question], rng: random.Random) -> Question:
    """The question with a wrong option replaced by the first forget answer that is not one."""
    parts = split_listed(question)
    texts = [text.strip() for text in (parts.texts if parts else question.options)]
    words = (unlist_options(f).answer.strip() for f in forget)
    wrong = rng.choice([i for i in range(len(texts)) if i != question.gold])
    texts[wrong] = next((word for word in words if word not in texts), texts[wrong])
    if parts:
        return parts.offering(texts)
    return replace(question, options=tuple(f" {text}" for text in texts))


def put_forget_in_front(question: Question, forget: Question) -> Question:
    """The question after the thing that a forget question is about, or its answer."""
    term = forget.entry or unlist_options(forget).answer.strip()
    return replace(question, prompt=f"{term} {question.prompt}")
