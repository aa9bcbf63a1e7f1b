"""E0: the questions as they are."""

from dataclasses import dataclass

import numpy as np

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts
from srmu.evals.statistics import bootstrap_estimate
from srmu.evals.subject import Subject, list_facts, mark_right, option_scores


@dataclass(frozen=True, kw_only=True)
class ForcedChoice(Attack):
    """Accuracy of the likeliest option, and the right option's probability among the options."""

    id = "E0"
    name = "forced_choice"
    tier = "smoke"

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        val, test = (option_scores(model, half) for half in (exam.val, exam.test))
        chances = [
            np.exp(np.array(row) - np.logaddexp.reduce(row))[q.gold] for row, q in zip(test, exam.test, strict=True)
        ]
        way = Setting("as they are", mark_right(val, exam.val), mark_right(test, exam.test))
        probability = bootstrap_estimate([chances], [list_facts(exam.test)], seed=seed)
        return AttackResult((way,), {"probability": probability})
