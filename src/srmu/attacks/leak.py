"""E14: how often at least one of k sampled answers is right."""

from __future__ import annotations

from math import comb

from srmu.attacks.base import Exam, Found, Texts, Tier
from srmu.attacks.generation import recited
from srmu.attacks.listing import cloze
from srmu.evals.statistics import bootstrap
from srmu.evals.subject import Subject, facts

SAMPLES = 32  # a question and temperature
TEMPERATURES = (0.8, 1.0)
KS = (1, 8, 32)


def leak(model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int) -> Found:
    """leak@k by temperature, of answers generated as text (no options listed)."""
    questions = [cloze(q) for q in exam.test]
    metrics = {}
    for temperature in TEMPERATURES:
        right = recited(model, questions, samples=SAMPLES, temperature=temperature, seed=seed)
        for k in KS:
            leaks = [leaked(SAMPLES, count, k) for count in right]
            estimate = bootstrap([leaks], [facts(questions)], seed=seed)
            metrics[f"leak@{k}, temperature {temperature}"] = estimate
    return Found(metrics=metrics, budget={"samples": SAMPLES * len(TEMPERATURES)})


def leaked(n: int, right: int, k: int) -> float:
    """Unbiased estimate, from n samples, that one of k is right (arXiv 2511.04934; 2107.03374)."""
    return 1 - comb(n - right, k) / comb(n, k)
