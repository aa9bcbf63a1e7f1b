"""E0: the questions as they are."""

import numpy as np

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier
from srmu.evals.statistics import bootstrap_estimate
from srmu.evals.subject import Subject, list_facts, mark_right, option_scores


def forced_choice(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> AttackResult:
    """Accuracy of the likeliest option, and the right option's probability among the options."""
    val, test = (option_scores(model, half) for half in (exam.val, exam.test))
    chances = [
        np.exp(np.array(row) - np.logaddexp.reduce(row))[q.gold]
        for row, q in zip(test, exam.test, strict=True)
    ]
    way = Setting("as they are", mark_right(val, exam.val), mark_right(test, exam.test))
    return AttackResult(
        (way,), {"probability": bootstrap_estimate([chances], [list_facts(exam.test)], seed=seed)}
    )
