"""E7: fine-tuning on a few harmless texts, which should teach nothing (arXiv 2409.18025)."""

import random

import numpy as np
import torch

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier, ask_exam
from srmu.attacks.tuning import SMALL, Row, prepare_learner, text_rows, tune_model
from srmu.evals.statistics import Array, bootstrap_estimate
from srmu.evals.subject import NotApplicable, Subject, list_facts

COUNTS = (5, 10, 50, 100, 500, 1000)  # texts
EPOCHS = 3
RANK = 128
KINDS = (("LoRA", 2e-4), ("full weights", 1e-4))  # with their learning rates
FASTER = ("full weights at 5e-4", 5e-4)  # too, of a small model
MOST = 200  # steps of each kind at the standard tier


def benign_relearning(
    model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int
) -> AttackResult:
    """A run of its own for each number of texts: batch 1, 3 epochs, the rate falling to 0.

    Metrics: the area under the curve of accuracy against the logarithm of that number, as a mean
    accuracy; its recovery is that of the area, recovery being linear in accuracy.
    """
    drawn = random.Random(seed).sample(texts.neutral, len(texts.neutral))[: COUNTS[-1]]
    rows = text_rows(model, drawn)
    small = model.module.num_parameters() < SMALL
    wanted = (10,) if tier == "smoke" else COUNTS
    counts = [n for n in wanted if n <= len(rows)] or [len(rows)]
    if tier == "standard" and small:
        counts = [n for n in counts if EPOCHS * sum(m for m in counts if m <= n) <= MOST]
    ways: list[Setting] = []
    metrics, spent, too_large = {}, {}, []
    for kind, rate in (*KINDS, FASTER) if small and tier != "smoke" else KINDS:
        try:
            runs = [ask_after_relearning(model, exam, rows[:n], kind, rate, seed) for n in counts]
        except torch.OutOfMemoryError:  # all weights with AdamW need many times the model's memory
            too_large.append(kind)
            continue
        found = [way for way, _ in runs]
        ways += found
        spent[kind] = [steps for _, steps in runs]
        if len(counts) > 1:
            logs = np.log(counts)

            def area(means: Array, logs: Array = logs) -> Array:
                return np.trapezoid(means, logs, axis=-1) / (logs[-1] - logs[0])

            table = np.array([way.test for way in found]).T
            name = f"accuracy over log n, {kind}"
            metrics[name] = bootstrap_estimate([table], [list_facts(exam.test)], area, seed=seed)
    if not ways:
        raise NotApplicable("fine-tuning this model needs more memory than the device has")
    budget = {
        "texts": counts,
        "not reached": [n for n in wanted if n not in counts],
        "steps": spent,
        "out of memory": too_large,
    }
    return AttackResult(tuple(ways), metrics, budget)


def ask_after_relearning(
    model: Subject, exam: Exam, rows: list[Row], kind: str, rate: float, seed: int
) -> tuple[Setting, int]:
    """The exam after fine-tuning on the rows, and how many steps that took."""
    with prepare_learner(model, RANK if kind == "LoRA" else 0, seed) as edited:
        steps = EPOCHS * len(rows)
        taken = tune_model(edited, rows, steps=steps, learning_rate=rate, batch_size=1, seed=seed)
        return ask_exam(model, exam, f"{kind}, n={len(rows)}"), taken
