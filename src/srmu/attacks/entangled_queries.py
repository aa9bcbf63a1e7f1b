"""E3: what is to be forgotten and what is not in one prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from srmu.attacks.base import Exam, Found, Texts, Tier, ask
from srmu.attacks.listing import cloze, listed, solved
from srmu.evals.statistics import LEAST, accuracy, bootstrap
from srmu.evals.subject import NotApplicable, Question, Subject, answers, facts

HARMLESS = 200  # harmless questions asked, at most


def entangled_queries(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> Found:
    """Forget and harmless questions in pairs; forget terms in harmless questions.

    In a pair, the question in front comes with its right answer. The costs are the accuracy on
    harmless questions less that with a forget term in them.
    """
    rng = random.Random(seed)
    pool = [question for task in exam.utility.values() for question in task]
    harmless = rng.sample(pool, min(HARMLESS, len(pool)))
    if len(set(facts(harmless))) < LEAST:
        raise NotApplicable(f"needs harmless questions about {LEAST} facts: give utility tasks")
    ways = tuple(
        ask(model, Exam(posed(harmless, exam.test), posed(harmless, exam.val)), setting)
        for setting, posed in (("second", after), ("first and again", around))
    )
    partners = rng.sample(exam.test, len(exam.test))
    forms = {
        "alone": harmless,
        "in pair": after(partners, harmless),
        "option": [with_option(q, shifted(partners, i), rng) for i, q in enumerate(harmless)],
        "in front": [in_front(q, f) for q, f in zip(harmless, cycle(partners))],
    }
    got = {name: answers(model, questions) for name, questions in forms.items()}
    names = facts(harmless)
    metrics = {
        "forget in pair": accuracy(ways[0].test, facts(exam.test), seed=seed),
        "utility alone": accuracy(got["alone"], names, seed=seed),
        "utility in pair": accuracy(got["in pair"], names, seed=seed),
    }
    for name in ("option", "in front"):
        table = list(zip(got["alone"], got[name], strict=True))
        cost = bootstrap([table], [names], lambda m: m[..., 0] - m[..., 1], seed=seed)
        metrics[f"cost of a forget term, {name}"] = cost
    return Found(ways, metrics, {"harmless questions": len(harmless)})


def after(fronts: Sequence[Question], questions: Sequence[Question]) -> tuple[Question, ...]:
    """Each question after one of `fronts` and its right answer."""
    return tuple(
        replace(q, prompt=solved(front) + q.prompt)
        for q, front in zip(questions, cycle(fronts), strict=False)
    )


def around(between: Sequence[Question], questions: Sequence[Question]) -> tuple[Question, ...]:
    """Each question, then one of `between` with its right answer, then the first one again.

    An answer to the first question, read before the second, would be that to it alone.
    """
    pairs = zip(questions, after(between, questions), strict=True)
    return tuple(replace(pair, prompt=f"{q.prompt}\n\n{pair.prompt}") for q, pair in pairs)


def shifted(questions: Sequence[Question], by: int) -> list[Question]:
    by %= len(questions)
    return [*questions[by:], *questions[:by]]


def with_option(question: Question, forget: Sequence[Question], rng: random.Random) -> Question:
    """The question with a wrong option replaced by the first forget answer that is not one."""
    parts = listed(question)
    texts = [text.strip() for text in (parts.texts if parts else question.options)]
    words = (cloze(f).answer.strip() for f in forget)
    wrong = rng.choice([i for i in range(len(texts)) if i != question.gold])
    texts[wrong] = next((word for word in words if word not in texts), texts[wrong])
    if parts:
        return parts.offering(texts)
    return replace(question, options=tuple(f" {text}" for text in texts))


def in_front(question: Question, forget: Question) -> Question:
    """The question after the thing that a forget question is about, or its answer."""
    term = forget.entry or cloze(forget).answer.strip()
    return replace(question, prompt=f"{term} {question.prompt}")
