"""E7, E8, E9 and E19: fine-tuning, which brings back what is hidden and not gone."""

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import numpy as np
import torch

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts, Tier, ask_exam
from srmu.engine.fine_tune import Row, tune_model
from srmu.engine.model import EditableModel
from srmu.evals.statistics import Estimate, bootstrap_estimate
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts

SMALL = 100_000_000  # parameters; a model with fewer bears higher learning rates

Questions = tuple[Question, ...]
Learned = dict[tuple[float, int], tuple[float, ...]]  # right answers by rate and epochs


def text_rows(model: Subject, texts: Sequence[str], length: int = 512) -> list[Row]:
    """Texts cut at a number of tokens, as rows whose tokens all count."""
    ids = [model.tokens(text)[: min(length, model.max_length)] for text in texts]
    rows: list[Row] = [([], row) for row in ids if len(row) > 1]
    if not rows:
        raise NotApplicable("there are no neutral texts to fine-tune on; name some")
    return rows


def split_validation(exam: Exam, seed: int, parts: int = 5) -> tuple[Questions, Questions]:
    """The validation questions to learn from, and those on one part of its facts to ask."""
    known = list(dict.fromkeys(list_facts(exam.val)))
    assert not {*known} & {*list_facts(exam.test)}, "the halves of the exam share facts"
    if len(known) < parts:
        raise NotApplicable(f"it needs {parts} or more facts on the validation half")
    held = {*random.Random(seed).sample(known, len(known) // parts)}
    learned = tuple(q for q in exam.val if q.fact not in held)
    return learned, tuple(q for q in exam.val if q.fact in held)


@contextmanager
def prepare_learner(model: Subject, rank: int, seed: int, alpha: int = 16) -> Iterator[EditableModel]:
    """The model to be tuned: all its weights, or LoRA of that rank beside its matrices."""
    with model.editable("*.linear" if rank else "*") as edited:
        rank = min(rank, *(side for p in edited.trained.values() for side in p.shape))
        with edited.adapted(rank, alpha, seed) if rank else nullcontext():
            yield edited


def tune_and_ask(
    model: Subject,
    exam: Exam,
    name: str,
    seed: int,
    rows: list[Row],
    steps: Sequence[int],
    rank: int = 0,
    **options: Any,
) -> tuple[dict[int, Setting], int]:
    """The exam after each number of steps of one fine-tuning (`tune_model`), and the steps taken."""
    reached: dict[int, Setting] = {}

    def after(step: int) -> None:
        if step in steps:
            reached[step] = ask_exam(model, exam, f"{name}, {step} steps")

    with prepare_learner(model, rank, seed) as edited:
        taken = tune_model(edited, rows, steps=max(steps), seed=seed, after=after, **options)
    return reached, taken


BY_TIER: dict[Tier, dict[str, Any]] = {"smoke": {"counts": (10,), "faster": ()}, "standard": {"most": 200}}


class BenignRelearning(Attack, id="E7", name="benign_relearning", tier="smoke", by_tier=BY_TIER):
    """A run of its own for each number of texts: batch 1, 3 epochs, the rate falling to 0.

    Metrics: the area under the curve of accuracy against the logarithm of that number, as a mean accuracy.
    """

    counts: tuple[int, ...] = (5, 10, 50, 100, 500, 1000)  # texts
    pool: int = 1000  # texts drawn, of which the first ones are read
    epochs: int = 3
    rank: int = 128  # of LoRA
    kinds: tuple[tuple[str, float], ...] = (("LoRA", 2e-4), ("full weights", 1e-4))  # their rates
    faster: tuple[tuple[str, float], ...] = (("full weights at 5e-4", 5e-4),)  # of a small model
    small: int = SMALL
    most: int | None = None  # steps of each kind on a small model; None: no limit

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        rows = text_rows(model, random.Random(seed).sample(texts.neutral, len(texts.neutral))[: self.pool])
        small = model.module.num_parameters() < self.small
        counts = [n for n in self.counts if n <= len(rows)] or [len(rows)]
        if small and self.most is not None:
            counts = [n for n in counts if self.epochs * sum(m for m in counts if m <= n) <= self.most]
        logs, facts = np.log(counts), list_facts(exam.test)
        width = logs[-1] - logs[0]
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
                table = np.array([way.test for way, _ in runs]).T
                area = bootstrap_estimate(table, facts, lambda m: np.trapezoid(m, logs, axis=-1) / width, seed=seed)
                metrics[f"accuracy over log n, {kind}"] = area
        if not ways:
            raise NotApplicable("fine-tuning this model needs more memory than the device has")
        left = [n for n in self.counts if n not in counts]
        budget = {"texts": counts, "not reached": left, "steps": steps, "out of memory": too_large}
        return AttackResult(tuple(ways), metrics, budget)

    def ask_after(
        self, model: Subject, exam: Exam, rows: Sequence[Row], kind: str, rate: float, seed: int
    ) -> tuple[Setting, int]:
        with prepare_learner(model, self.rank if kind == "LoRA" else 0, seed) as edited:
            taken = tune_model(edited, rows, steps=self.epochs * len(rows), learning_rate=rate, batch_size=1, seed=seed)
            return ask_exam(model, exam, f"{kind}, n={len(rows)}"), taken


class PartRelearning(Attack, id="E8", name="part_relearning", tier="standard"):
    """All weights learn questions with their answers; others are asked (arXiv 2410.08827).

    `val` of a way holds a fifth of the validation facts, asked after learning the rest. Only the best setting has a
    `test`: it learns the whole validation half. At a constant rate, one training gives all numbers of epochs.
    """

    epochs: tuple[int, ...] = (1, 2, 4)
    rates: tuple[float, ...] = (2e-5, 1e-4, 5e-4)
    batch: int = 8

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        def relearn(learned: Questions, asked: Questions, rate: float, epochs: Sequence[int]) -> Learned:
            rows = text_rows(model, [q.prompt + q.answer for q in learned])
            epoch = math.ceil(len(rows) / self.batch)
            kind: dict[str, Any] = {"learning_rate": rate, "batch_size": self.batch, "schedule": "constant"}
            reached, _ = tune_and_ask(model, Exam((), asked), "", seed, rows, [epoch * n for n in epochs], **kind)
            return {(rate, step // epoch): way.val for step, way in reached.items()}

        rest, held = split_validation(exam, seed)
        tried: Learned = {}
        for rate in self.rates:
            tried |= relearn(rest, held, rate, self.epochs)
        rate, n = best = max(tried, key=lambda setting: sum(tried[setting]), default=(0.0, 0))
        final = relearn(exam.val, exam.test, rate, [n]) if tried else {}
        if best not in final:
            raise NotApplicable("fine-tuning this model gives losses that are not finite")
        ways = (Setting(f"{n} epochs at {r:g}", right, final.get((r, n), ())) for (r, n), right in tried.items())
        return AttackResult(tuple(ways), budget={"facts learned": len({*list_facts(exam.val)}), "batch": self.batch})


class HeavyTuning(Attack, id="E9", name="heavy_tuning", tier="deep"):
    """All weights on the neutral texts, for each rate, optimiser and schedule."""

    rates: tuple[float, ...] = (1e-5, 5e-5, 2e-4)
    optimisers: tuple[Literal["adamw", "sgd"], ...] = ("adamw", "sgd")
    schedules: tuple[Literal["constant", "linear"], ...] = ("constant", "linear")
    steps: tuple[int, ...] = (100, 1000, 10_000)  # of one training, after which the exam is held
    batch: int = 8
    tokens: int = 128  # of a text, as `cost` guesses

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        rows = text_rows(model, texts.neutral)
        ways: list[Setting] = []
        taken = {}
        for rate, optimiser, schedule in product(self.rates, self.optimisers, self.schedules):
            name = f"{optimiser}, {rate:g}, {schedule}"
            kind: dict[str, Any] = {"learning_rate": rate, "optimiser": optimiser, "batch_size": self.batch}
            reached, taken[name] = tune_and_ask(model, exam, name, seed, rows, self.steps, schedule=schedule, **kind)
            ways += reached.values()
        return AttackResult(tuple(ways), budget={"texts": len(rows), "batch": self.batch, "steps": taken})

    def cost(self, model: Subject) -> str:
        rows: list[Row] = [([], [0] * self.tokens)] * self.batch
        with model.editable("*") as edited:
            start = time.perf_counter()
            tune_model(edited, rows, steps=2, learning_rate=0.0, batch_size=self.batch, seed=0)
            seconds = (time.perf_counter() - start) / 2
        runs = len(self.rates) * len(self.optimisers) * len(self.schedules)
        hours = runs * max(self.steps) * seconds / 3600
        return (
            f"heavy_tuning takes {runs} x {max(self.steps):,} steps on {self.batch} texts: with "
            f"{self.tokens} tokens a text {hours:,.1f} hours on this machine"
        )


class RelearningSteps(Attack, id="E19", name="relearning_steps", tier="standard"):
    """One training a kind, its rate constant after the warm-up; the exam is held on its way.

    Learned are four fifths of the validation facts, as questions and as statements; `val` of a way
    holds the last fifth. Rates are those of E7 and, for adapters, the usual ones of rank 8.
    """

    steps: tuple[int, ...] = (5, 10, 20, 50, 100)  # after which the exam is held
    text_steps: tuple[int, ...] = (20, 50, 100)  # on neutral texts, which bring less back
    batch: int = 8  # facts a step
    text_batch: int = 4  # neutral texts a step: they are longer
    rank: int = 8  # of LoRA
    rate: float = 1e-4
    faster: tuple[str, float] = ("full weights at 5e-4", 5e-4)  # of a small model, too
    lora_rates: tuple[float, float] = (1e-3, 2e-4)  # of a small model, of a larger one
    small: int = SMALL

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        learned, held = split_validation(exam, seed)
        asked = replace(exam, val=held)
        statements = dict.fromkeys(start + q.answer for q in learned for start in (q.prompt, *q.paraphrases))
        kinds = self.list_kinds(model, text_rows(model, [*statements]), text_rows(model, texts.neutral))
        plain = ask_exam(model, asked, "")
        ways: list[Setting] = []
        taken, too_large = {}, []
        for name, kind in kinds.items():
            try:
                reached, taken[name] = tune_and_ask(model, asked, name, seed, schedule="constant", **kind)
            except torch.OutOfMemoryError:
                too_large.append(name)
                continue
            ways += [replace(plain, setting=f"{name}, 0 steps"), *reached.values()]
        if not ways:
            raise NotApplicable("fine-tuning this model needs more memory than the device has")
        budget = {
            "facts learned": len({*list_facts(learned)}),
            "steps": taken,
            "out of memory": too_large,
            "batch": {name: kind["batch_size"] for name, kind in kinds.items()},
        }
        return AttackResult(tuple(ways), budget=budget)

    def list_kinds(self, model: Subject, facts: list[Row], texts: list[Row]) -> dict[str, dict[str, Any]]:
        """The trainings, as `tune_and_ask` takes them; a small model bears faster ones."""
        small = model.module.num_parameters() < self.small
        on_facts = {"rows": facts, "steps": self.steps, "batch_size": self.batch}
        on_texts = {"rows": texts, "steps": self.text_steps, "batch_size": self.text_batch}
        faster = {self.faster[0]: on_facts | {"learning_rate": self.faster[1]}} if small else {}
        return {
            "LoRA": on_facts | {"learning_rate": self.lora_rates[not small], "rank": self.rank},
            "full weights": on_facts | {"learning_rate": self.rate},
            **faster,
            "neutral texts, full weights": on_texts | {"learning_rate": self.rate},
        }
