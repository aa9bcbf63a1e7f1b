"""E7: fine-tuning on a few harmless texts, which should teach nothing (arXiv 2409.18025)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts, Tier, ask_exam
from srmu.attacks.tuning import SMALL, prepare_learner, text_rows
from srmu.engine.fine_tune import Row, tune_model
from srmu.evals.statistics import Array, Estimate, bootstrap_estimate
from srmu.evals.subject import NotApplicable, Subject, list_facts


@dataclass(frozen=True, kw_only=True)
class BenignRelearning(Attack):
    """A run of its own for each number of texts: batch 1, 3 epochs, the rate falling to 0.

    Metrics: the area under the curve of accuracy against the logarithm of that number, as a mean
    accuracy; its recovery is that of the area, recovery being linear in accuracy.
    """

    id = "E7"
    name = "benign_relearning"
    tier = "smoke"

    counts: tuple[int, ...] = (5, 10, 50, 100, 500, 1000)  # texts
    pool: int = 1000  # texts drawn, of which the first ones are read
    epochs: int = 3
    rank: int = 128  # of LoRA
    kinds: tuple[tuple[str, float], ...] = (("LoRA", 2e-4), ("full weights", 1e-4))  # their rates
    faster: tuple[tuple[str, float], ...] = (("full weights at 5e-4", 5e-4),)  # of a small model
    small: int = SMALL
    most: int | None = None  # steps of each kind on a small model; None: no limit

    @classmethod
    def at_tier(cls, tier: Tier) -> Self:
        if tier == "smoke":
            return cls(counts=(10,), faster=())
        return cls(most=200 if tier == "standard" else None)

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        drawn = random.Random(seed).sample(texts.neutral, len(texts.neutral))[: self.pool]
        rows = text_rows(model, drawn)
        small = model.module.num_parameters() < self.small
        counts = self.affordable_counts(len(rows), small)
        ways: list[Setting] = []
        metrics: dict[str, Estimate] = {}
        steps, too_large = {}, []
        for kind, rate in (*self.kinds, *self.faster) if small else self.kinds:
            try:
                runs = [self.ask_after(model, exam, rows[:n], kind, rate, seed) for n in counts]
            except torch.OutOfMemoryError:  # AdamW needs many times the model's memory
                too_large.append(kind)
                continue
            ways += [way for way, _ in runs]
            steps[kind] = [taken for _, taken in runs]
            if len(counts) > 1:
                metrics[f"accuracy over log n, {kind}"] = estimate_area(counts, [way for way, _ in runs], exam, seed)
        if not ways:
            raise NotApplicable("fine-tuning this model needs more memory than the device has")
        budget = {
            "texts": counts,
            "not reached": [n for n in self.counts if n not in counts],
            "steps": steps,
            "out of memory": too_large,
        }
        return AttackResult(tuple(ways), metrics, budget)

    def affordable_counts(self, texts: int, small: bool) -> list[int]:
        """The numbers of texts that there are, and that the limit on steps allows."""
        counts = [n for n in self.counts if n <= texts] or [texts]
        if self.most is None or not small:
            return counts
        return [n for n in counts if self.epochs * sum(m for m in counts if m <= n) <= self.most]

    def ask_after(
        self, model: Subject, exam: Exam, rows: Sequence[Row], kind: str, rate: float, seed: int
    ) -> tuple[Setting, int]:
        """The exam after fine-tuning on the rows, and how many steps that took."""
        with prepare_learner(model, self.rank if kind == "LoRA" else 0, seed) as edited:
            taken = tune_model(edited, rows, steps=self.epochs * len(rows), learning_rate=rate, batch_size=1, seed=seed)
            return ask_exam(model, exam, f"{kind}, n={len(rows)}"), taken


def estimate_area(counts: Sequence[int], ways: Sequence[Setting], exam: Exam, seed: int) -> Estimate:
    """The area under the accuracies on the test half, over log n, as a mean accuracy."""
    logs = np.log(counts)

    def area(means: Array) -> Array:
        return np.trapezoid(means, logs, axis=-1) / (logs[-1] - logs[0])

    table = np.array([way.test for way in ways]).T
    return bootstrap_estimate([table], [list_facts(exam.test)], area, seed=seed)
