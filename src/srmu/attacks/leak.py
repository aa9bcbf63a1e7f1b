"""E14: how often at least one of k sampled answers is right."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from srmu.attacks.base import Attack, AttackResult, Exam, Texts
from srmu.attacks.generation import count_right_generations
from srmu.attacks.listing import unlist_options
from srmu.evals.statistics import bootstrap_estimate
from srmu.evals.subject import Subject, list_facts


@dataclass(frozen=True, kw_only=True)
class Leak(Attack):
    """leak@k by temperature, of answers generated as text (no options listed)."""

    id = "E14"
    name = "leak"
    tier = "standard"

    samples: int = 32  # a question and temperature
    temperatures: tuple[float, ...] = (0.8, 1.0)
    ks: tuple[int, ...] = (1, 8, 32)

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        questions = [unlist_options(q) for q in exam.test]
        metrics = {}
        for temperature in self.temperatures:
            right = count_right_generations(model, questions, samples=self.samples, temperature=temperature, seed=seed)
            for k in self.ks:
                leaks = [leak_at_k(self.samples, count, k) for count in right]
                estimate = bootstrap_estimate([leaks], [list_facts(questions)], seed=seed)
                metrics[f"leak@{k}, temperature {temperature}"] = estimate
        budget = {"samples": self.samples * len(self.temperatures)}
        return AttackResult(metrics=metrics, budget=budget)


def leak_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate, from n samples, that one of k is right (arXiv 2511.04934; 2107.03374)."""
    return 1 - comb(n - right, k) / comb(n, k)
