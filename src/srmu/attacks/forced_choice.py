"""E0: the questions as they are."""

import numpy as np

from srmu.attacks.base import Exam, Found, Texts, Tier, Way
from srmu.evals.statistics import bootstrap
from srmu.evals.subject import Subject, facts, option_scores, right


def forced_choice(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> Found:
    """Accuracy of the likeliest option, and the right option's probability among the options."""
    val, test = (option_scores(model, half) for half in (exam.val, exam.test))
    chances = [
        np.exp(np.array(row) - np.logaddexp.reduce(row))[q.gold]
        for row, q in zip(test, exam.test, strict=True)
    ]
    way = Way("as they are", right(val, exam.val), right(test, exam.test))
    return Found((way,), {"probability": bootstrap([chances], [facts(exam.test)], seed=seed)})
