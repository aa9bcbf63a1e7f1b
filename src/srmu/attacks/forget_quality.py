"""E16: whether truth ratios are spread as those of a model that never saw the forget texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from warnings import catch_warnings

import numpy as np

from srmu.attacks.base import Attack, AttackResult, Exam, Texts
from srmu.evals.statistics import Array, Estimate, bootstrap_estimate
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts, option_scores


@dataclass(frozen=True, kw_only=True)
class ForgetQuality(Attack):
    """TOFU's forget quality (arXiv 2401.06121): two-sample Kolmogorov-Smirnov against the oracle.

    `truth ratio` is the mean of min(R, 1 / R), as TOFU's code takes it on the forget set; R alone
    has no bound. `ks distance` D is that of the values of R. `ks p` takes each question for itself
    and grows smaller with their number: it has no interval.
    """

    id = "E16"
    name = "forget_quality"
    tier = "standard"

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        from scipy.stats import ks_2samp

        if model.oracle is None:
            raise NotApplicable("no oracle: name a model that never saw the forget texts")
        own, other = (log_truth_ratios(who, exam.test) for who in (model, model.oracle))
        names = list_facts(exam.test)
        bounded = np.exp(-np.abs(own))
        places = np.union1d(own, other)  # where either distribution function steps
        steps = np.concatenate([own[:, None] <= places, other[:, None] <= places], axis=1)
        with catch_warnings(action="ignore"):  # of many questions the exact p is out of reach
            p = float(ks_2samp(own, other).pvalue)
        return AttackResult(
            metrics={
                "truth ratio": bootstrap_estimate([bounded], [names], seed=seed),
                "ks distance": bootstrap_estimate([steps], [names], ks_distance, seed=seed),
                "ks p": Estimate(p, p, p, len(names)),
            }
        )


def log_truth_ratios(model: Subject, questions: Sequence[Question]) -> Array:
    """Log of each question's truth ratio R: wrong answers by the right one, each p ** (1 / tokens).

    Wrong answers' geometric mean, as TOFU's code has it; its paper takes the arithmetic one.
    """
    ratios = []
    for row, question in zip(option_scores(model, questions, normalised=True), questions, strict=True):
        wrong = [score for i, score in enumerate(row) if i != question.gold]
        ratios.append(np.mean(wrong) - row[question.gold])
    return np.array(ratios)


def ks_distance(shares: Array) -> Array:
    """D of two distribution functions at the same places, one after the other: (..., 2 places)."""
    one, other = np.split(shares, 2, axis=-1)
    return np.abs(one - other).max(axis=-1)
