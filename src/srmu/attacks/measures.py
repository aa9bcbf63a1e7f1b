"""E15, E16, E18 and E21: what tells the model from one that never saw the forget texts, and what forgetting cost."""

import random
from collections.abc import Sequence
from math import exp
from warnings import catch_warnings

import numpy as np
import torch

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts
from srmu.engine.generate import batch_texts, continue_greedily
from srmu.engine.losses import is_predicted, text_nlls, token_kl
from srmu.engine.train import move_batch
from srmu.evals import subject
from srmu.evals.continuations import repeated_share
from srmu.evals.statistics import LEAST, Array, Estimate, auc_bootstrap, bootstrap_estimate, estimate_accuracy
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts, mark_answers, option_scores

ROWS = 16  # texts read at once


class Membership(Attack, id="E15", name="membership", tier="standard", by_tier={"deep": {"gradients": True}}):
    """The AUC of each score, forget texts against hold-out texts: 0.5 tells nothing apart, 1 all.

    `reference` compares a text's likelihood with the oracle's. `gradnorm` takes the norm of the loss's gradient, which
    costs a backward pass for each text.

    `privleak` is MUSE's (arXiv 2407.06460), (A - A_oracle) / A_oracle, as a share, with Min-K of 20 % where MUSE takes
    40. A is 1 - AUC, as its tables imply: -1 is full membership, 0 as the oracle.
    """

    count: int = 256  # texts of each kind
    gradients: bool = False  # measure gradnorm, which copies all weights

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        if not texts.holdout:
            raise NotApplicable("no hold-out texts: name a file of them, like the forget texts")
        rng = random.Random(seed)
        sets = [rng.sample(kind, min(len(kind), self.count)) for kind in (texts.forget, texts.holdout)]
        member, unknown = (subject.membership_scores(model, kind) for kind in sets)
        fewest = min(len(member), len(unknown))
        if fewest < LEAST:
            raise NotApplicable(f"{fewest} texts of a kind are too few: it takes {LEAST}")
        areas = (auc_bootstrap(*pair, seed=seed) for pair in zip(member.T, unknown.T, strict=True))
        metrics = {f"auc {name}": area for name, area in zip(subject.SCORES, areas, strict=True)}
        if self.gradients and not model.fixed:
            norms = [-subject.gradient_norms(model, kind) for kind in sets]
            metrics["auc gradnorm"] = auc_bootstrap(norms[0], norms[1], seed=seed)
        if model.oracle:
            known, other = (subject.membership_scores(model.oracle, kind) for kind in sets)
            metrics["auc reference"] = auc_bootstrap(member[:, 0] - known[:, 0], unknown[:, 0] - other[:, 0], seed=seed)
            # by Min-K
            pairs = np.stack([member[:, 2], known[:, 2]], axis=1), np.stack([unknown[:, 2], other[:, 2]], axis=1)
            metrics["privleak"] = auc_bootstrap(pairs[0], pairs[1], priv_leak, seed=seed)
        return AttackResult(metrics=metrics)


def priv_leak(areas: Array) -> Array:
    """From the AUCs of the model and of the oracle, (..., 2)."""
    own, oracle = 1 - areas[..., 0], 1 - areas[..., 1]
    # an oracle that tells all apart in some resample must not divide by zero
    return (own - oracle) / np.maximum(oracle, 1e-3)


class Memorisation(Attack, id="E21", name="memorisation", tier="standard"):
    """How much of the forget texts the model can still write from their own beginnings.

    `exact memorisation` is the share of tokens that it finds likeliest after the true ones before them;
    `extraction strength` the share of a text, at its end, that it writes without a mistake.
    """

    count: int = 256  # texts

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        chosen = random.Random(seed).sample(texts.forget, min(len(texts.forget), self.count))
        scores = subject.memorisation_scores(model, chosen)
        if len(scores) < LEAST:
            raise NotApplicable(f"{len(scores)} forget texts are too few: it takes {LEAST}")
        columns = zip(subject.MEMORISED, scores.T, strict=True)
        return AttackResult(
            metrics={name: bootstrap_estimate(column, range(len(scores)), seed=seed) for name, column in columns}
        )


class ForgetQuality(Attack, id="E16", name="forget_quality", tier="standard"):
    """TOFU's forget quality (arXiv 2401.06121): two-sample Kolmogorov-Smirnov against the oracle.

    `truth ratio` is the mean of min(R, 1 / R), as TOFU's code takes it; `ks distance` D is that of the values of R.
    `ks p` takes each question for itself and has no interval.
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
        return AttackResult(metrics={"truth ratio": ratio, "ks distance": gap, "ks p": Estimate(p, p, p, len(names))})


def log_truth_ratios(model: Subject, questions: Sequence[Question]) -> Array:
    """Log of each question's truth ratio R: wrong answers by the right one, each p ** (1 / tokens)."""
    # the wrong answers' geometric mean, as TOFU's code has it; its paper takes the arithmetic one
    rows = zip(option_scores(model, questions, normalised=True), [q.gold for q in questions], strict=True)
    return np.array([np.mean(row[:gold] + row[gold + 1 :]) - row[gold] for row, gold in rows])


class Utility(Attack, id="E18", name="utility", tier="smoke"):
    """Answers to the tasks to keep, a way each; what neutral texts cost, and KL(original || model) on them; of greedy
    continuations of forget prompts, the share of four-token sequences that occurred before."""

    count: int = 64  # texts read, and prompts continued
    length: int = 256  # tokens of a text
    new_tokens: int = 32

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        ways, metrics = [], {}
        for task, questions in exam.utility.items():
            ways.append(Setting(task, (), mark_answers(model, questions)))
            names = list_facts(questions)
            if len({*names}) >= LEAST:
                metrics[f"accuracy, {task}"] = estimate_accuracy(ways[-1].test, names, seed=seed)
        read = [model.tokens(text)[: self.length] for text in texts.neutral[: self.count]]
        rows = [row for row in read if len(row) > 1]
        if len(rows) >= LEAST:
            metrics |= measure_texts(model, rows, seed)
        asked, repeats = exam.test[: self.count], list[float]()
        for start in range(0, len(asked), ROWS):
            prompts = [model.tokens(q.prompt) for q in asked[start : start + ROWS]]
            written = continue_greedily(model.module, model.tokenizer, prompts, self.new_tokens)
            repeats += map(repeated_share, written)
        metrics["repetition"] = bootstrap_estimate(repeats, list_facts(asked), seed=seed)
        return AttackResult(ways, metrics)


@torch.no_grad()
def measure_texts(model: Subject, rows: Sequence[list[int]], seed: int) -> dict[str, Estimate]:
    """What a token of the texts costs, and how far the model is from the original on them."""
    costs, drifts = [], []
    for start in range(0, len(rows), ROWS):
        batch = move_batch(batch_texts(rows[start : start + ROWS]), model.device)
        read = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        logits = model.module(**read).logits
        mask = is_predicted(batch["labels"])
        costs += text_nlls(logits, batch["labels"]).tolist()
        if model.original and not model.fixed:
            with model.as_original():
                before = model.module(**read).logits
            drifts += ((token_kl(before, logits) * mask).sum(dim=1) / mask.sum(dim=1)).tolist()
    names = range(len(costs))
    cost = bootstrap_estimate(costs, names, seed=seed)
    perplexity = Estimate(exp(cost.value), exp(cost.low), exp(cost.high), cost.n)
    metrics = {"nats a neutral token": cost, "perplexity of neutral text": perplexity}
    if drifts:
        metrics["KL of neutral text"] = bootstrap_estimate(drifts, names, seed=seed)
    return metrics
