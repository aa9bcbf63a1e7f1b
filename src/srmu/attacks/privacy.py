"""E15 and E16: whether the model still differs from one that never saw the forget texts."""

import random
from collections.abc import Sequence
from warnings import catch_warnings

import numpy as np

from srmu.attacks.base import Attack, AttackResult, Exam, Texts
from srmu.evals.membership_scores import LENGTH, SCORES, membership_scores
from srmu.evals.statistics import LEAST, Array, Estimate, auc_bootstrap, bootstrap_estimate, first_column
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts, option_scores


class Membership(Attack, id="E15", name="membership", tier="standard"):
    """The AUC of each score, forget texts against hold-out texts: 0.5 tells nothing apart, 1 all.

    `privleak` is MUSE's (arXiv 2407.06460), (A - A_oracle) / A_oracle, as a share, with Min-K of 20 %
    where MUSE takes 40. A is 1 - AUC, as its tables imply: -1 is full membership, 0 as the oracle,
    and above 0 the forget texts are less likely than unknown ones.
    """

    count: int = 256  # texts of each kind

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        if not texts.holdout:
            raise NotApplicable("no hold-out texts: name a file of them, like the forget texts")
        rng = random.Random(seed)
        sets = [rng.sample(kind, min(len(kind), self.count)) for kind in (texts.forget, texts.holdout)]
        member, unknown = (membership_scores(model, kind) for kind in sets)
        fewest = min(len(member), len(unknown))
        if fewest < LEAST:
            raise NotApplicable(f"{fewest} texts of a kind are too few: it takes {LEAST}")
        metrics = {
            f"auc {name}": auc_bootstrap(member[:, i], unknown[:, i], first_column, seed=seed)
            for i, name in enumerate(SCORES)
        }
        if model.oracle:
            member, unknown = (
                np.stack([own[:, 2], membership_scores(model.oracle, kind)[:, 2]], axis=1)
                for own, kind in zip((member, unknown), sets, strict=True)
            )
            metrics["privleak"] = auc_bootstrap(member, unknown, priv_leak, seed=seed)
        budget = {"forget texts": len(member), "hold-out texts": len(unknown), "tokens": LENGTH}
        return AttackResult((), metrics, budget)


def priv_leak(areas: Array) -> Array:
    """From the AUCs of the model and of the oracle, (..., 2)."""
    own, oracle = 1 - areas[..., 0], 1 - areas[..., 1]
    # an oracle that tells all apart in some resample must not divide by zero
    return (own - oracle) / np.maximum(oracle, 1e-3)


class ForgetQuality(Attack, id="E16", name="forget_quality", tier="standard"):
    """TOFU's forget quality (arXiv 2401.06121): two-sample Kolmogorov-Smirnov against the oracle.

    `truth ratio` is the mean of min(R, 1 / R), as TOFU's code takes it on the forget set; R alone
    has no bound. `ks distance` D is that of the values of R. `ks p` takes each question for itself
    and grows smaller with their number: it has no interval.
    """

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        from scipy.stats import ks_2samp

        if model.oracle is None:
            raise NotApplicable("no oracle: name a model that never saw the forget texts")
        own, other = (log_truth_ratios(who, exam.test) for who in (model, model.oracle))
        names = list_facts(exam.test)
        places = np.union1d(own, other)  # where either distribution function steps
        steps, half = np.concatenate([own[:, None] <= places, other[:, None] <= places], axis=1), len(places)
        gap = bootstrap_estimate(steps, names, lambda m: np.abs(m[..., :half] - m[..., half:]).max(-1), seed=seed)
        with catch_warnings(action="ignore"):  # of many questions the exact p is out of reach
            p = float(ks_2samp(own, other).pvalue)
        ratio = bootstrap_estimate(np.exp(-np.abs(own)), names, seed=seed)
        metrics = {"truth ratio": ratio, "ks distance": gap, "ks p": Estimate(p, p, p, len(names))}
        return AttackResult(metrics=metrics)


def log_truth_ratios(model: Subject, questions: Sequence[Question]) -> Array:
    """Log of each question's truth ratio R: wrong answers by the right one, each p ** (1 / tokens).

    Wrong answers' geometric mean, as TOFU's code has it; its paper takes the arithmetic one.
    """
    rows = zip(option_scores(model, questions, normalised=True), [q.gold for q in questions], strict=True)
    return np.array([np.mean(row[:gold] + row[gold + 1 :]) - row[gold] for row, gold in rows])
