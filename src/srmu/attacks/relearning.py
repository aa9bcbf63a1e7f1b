"""E7, E8, E9 and E19: fine-tuning, which brings back what is hidden and not gone."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, product
from timeit import repeat
from typing import Any, Literal

import numpy as np
import torch

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts, Tier, ask_exam
from srmu.engine.fine_tune import Row, tune_model
from srmu.evals.statistics import bootstrap_estimate
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts

SMALL = 100_000_000  # parameters; a model with fewer bears higher learning rates
POOL = 1000  # neutral texts, of which those of one token are left out

Kinds = tuple[tuple[str, float, int], ...]  # of training: name, learning rate, rank of LoRA (0: all weights)
Options = Mapping[str, Any]
Questions = tuple[Question, ...]
Learned = dict[tuple[float, int], tuple[float, ...]]  # right answers by rate and epochs


def is_small(model: Subject) -> bool:
    return model.module.num_parameters() < SMALL


def text_rows(model: Subject, texts: Sequence[str], length: int = 512) -> list[Row]:
    """Texts cut at a number of tokens, as rows whose tokens all count."""
    ids = [model.tokens(text)[: min(length, model.max_length)] for text in texts]
    rows: list[Row] = [([], row) for row in ids if len(row) > 1]
    if not rows:
        raise NotApplicable("there are no texts to fine-tune on; name some neutral ones")
    return rows


def state_facts(questions: Questions) -> list[str]:
    """Questions and statements with their answers, each once."""
    return [*dict.fromkeys(start + q.answer for q in questions for start in (q.prompt, *q.paraphrases))]


def split_validation(exam: Exam, seed: int, parts: int = 5) -> tuple[Questions, Questions]:
    """The validation questions to learn from, and those on one part of its facts to ask."""
    known = list(dict.fromkeys(list_facts(exam.val)))
    assert not {*known} & {*list_facts(exam.test)}, "the halves of the exam share facts"
    if len(known) < parts:
        raise NotApplicable(f"it needs {parts} or more facts on the validation half")
    held = {*random.Random(seed).sample(known, len(known) // parts)}
    learned = tuple(q for q in exam.val if q.fact not in held)
    return learned, tuple(q for q in exam.val if q.fact in held)


def tune_and_ask(
    model: Subject,
    exam: Exam,
    name: str,
    seed: int,
    rows: Sequence[Row],
    steps: Sequence[int],  # of one, the setting has the name alone
    rank: int = 0,  # of LoRA beside the matrices; 0: all weights are tuned
    ask: Callable[[Subject, Exam, str], Setting] = ask_exam,
    until: Callable[[Setting], bool] = lambda way: False,
    each: Callable[[int], object] = lambda step: None,
    **options: Any,
) -> tuple[list[Setting], int]:
    """The exam after each number of steps of one fine-tuning (`tune_model`), and the steps taken.

    It ends early after an exam of which `until` says True. `each` is called with the number of each step.
    """
    reached: list[Setting] = []

    def after(step: int) -> bool:
        each(step)
        if step not in steps:
            return False
        reached.append(ask(model, exam, f"{name}, {step} steps" if len(steps) > 1 else name))
        return until(reached[-1])

    with model.editable("*.linear" if rank else "*") as edited:
        rank = min(rank, *(side for p in edited.trained.values() for side in p.shape))
        with edited.adapted(rank, alpha=16, seed=seed) if rank else nullcontext():
            return reached, tune_model(edited, rows, steps=max(steps), seed=seed, after=after, **options)


def tune_kinds(
    model: Subject, exam: Exam, trainings: Mapping[str, Options], seed: int, budget: Options, **common: Any
) -> AttackResult:
    """What trainings (as `tune_and_ask` takes them) bring back, those that fit into memory."""
    ways: list[Setting] = []
    steps, too_large = {}, []
    asked = {exam.only, exam.only.rpartition(", ")[0]}  # with or without a number of steps

    def until(way: Setting) -> bool:
        return way.setting == exam.only

    for name, own in trainings.items():
        if exam.only and name not in asked:
            continue
        try:
            reached, steps[name] = tune_and_ask(model, exam, name, seed, until=until, **own, **common)
        except torch.OutOfMemoryError:  # AdamW needs many times the model's memory
            too_large.append(name)
        else:
            ways += reached
    if not steps:
        raise NotApplicable("fine-tuning this model needs more memory than the device has")
    return AttackResult(ways, budget={**budget, "steps": steps, "out of memory": too_large})


BY_TIER: dict[Tier, dict[str, Any]] = {"smoke": {"counts": (10,), "faster": ()}, "standard": {"most": 200}}


class BenignRelearning(Attack, id="E7", name="benign_relearning", tier="smoke", by_tier=BY_TIER):
    """A run of its own for each number of texts: batch 1, 3 epochs, the rate falling to 0."""

    counts: tuple[int, ...] = (5, 10, 50, 100, 500, 1000)  # texts
    epochs: int = 3
    kinds: Kinds = (("LoRA", 2e-4, 128), ("full weights", 1e-4, 0))
    faster: Kinds = (("full weights at 5e-4", 5e-4, 0),)  # of a small model, too
    most: int | None = None  # steps of each kind on a small model; None: no limit

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        drawn = random.Random(seed).sample(texts.neutral, len(texts.neutral))[:POOL]
        rows = text_rows(model, drawn)[: max(self.counts)]
        counts = [n for n in self.counts if n <= len(rows)] or [len(rows)]
        if is_small(model) and self.most is not None:
            counts = [n for n, read in zip(counts, accumulate(counts), strict=True) if self.epochs * read <= self.most]
        kinds = (*self.kinds, *self.faster) if is_small(model) else self.kinds
        trainings = {
            f"{kind}, n={n}": {"rows": rows[:n], "steps": [self.epochs * n], "learning_rate": rate, "rank": rank}
            for kind, rate, rank in kinds
            for n in counts
        }
        result = tune_kinds(model, exam, trainings, seed, {"texts": counts}, batch_size=1)
        right = {way.setting: way.test for way in result.ways}
        logs, facts = np.log(counts), list_facts(exam.test)
        width, metrics = np.ptp(logs), {}
        for kind, *_ in kinds:
            curve = [right[name] for n in counts if (name := f"{kind}, n={n}") in right]
            if len(curve) == len(counts) > 1:
                table = np.array(curve).T
                # the area under the curve of accuracy against log n, as a mean accuracy
                area = bootstrap_estimate(table, facts, lambda m: np.trapezoid(m, logs, axis=-1) / width, seed=seed)
                metrics[f"accuracy over log n, {kind}"] = area
        return replace(result, metrics=metrics)


class PartRelearning(Attack, id="E8", name="part_relearning", tier="standard"):
    """All weights learn questions with their answers; others are asked (arXiv 2410.08827).

    `val` of a way holds a fifth of the validation facts, asked after learning the rest. Only the best setting, or that
    which the exam asks `only`, has a `test`: it learns the whole validation half. At a constant rate, one training
    gives all numbers of epochs.
    """

    epochs: tuple[int, ...] = (1, 2, 4)
    rates: tuple[float, ...] = (2e-5, 1e-4, 5e-4)
    batch: int = 8

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        def relearn(learned: Questions, asked: Questions, rate: float, epochs: Sequence[int]) -> Learned:
            rows = text_rows(model, [q.prompt + q.answer for q in learned])
            steps = [math.ceil(len(rows) / self.batch) * n for n in epochs]
            kind: dict[str, Any] = {"learning_rate": rate, "batch_size": self.batch, "schedule": "constant"}
            reached, _ = tune_and_ask(model, Exam((), asked), "", seed, rows, steps, **kind)
            return {(rate, n): way.val for n, way in zip(epochs, reached, strict=False)}  # fewer where it diverges

        settings = {(r, n): f"{n} epochs at {r:g}" for r, n in product(self.rates, self.epochs)}
        tried: Learned = {setting: () for setting, name in settings.items() if name == exam.only}
        if not exam.only:
            rest, held = split_validation(exam, seed)
            for rate in self.rates:
                tried |= relearn(rest, held, rate, self.epochs)
        best = max(tried, key=lambda setting: sum(tried[setting]), default=None)
        final = relearn(exam.val, exam.test, best[0], best[1:]) if best else {}
        if not final:
            raise NotApplicable("fine-tuning this model gives losses that are not finite")
        ways = [Setting(settings[setting], right, final.get(setting, ())) for setting, right in tried.items()]
        return AttackResult(ways, budget={"facts learned": len({*list_facts(exam.val)})})


def time_step(model: Subject, batch: int, tokens: int) -> float:
    """The seconds that a step of all weights takes, on so many texts of so many tokens."""
    rows: list[Row] = [([], [0] * tokens)] * batch
    with model.editable("*") as edited:
        two_steps = partial(tune_model, edited, rows, steps=2, learning_rate=0.0, batch_size=batch, seed=0)
        return repeat(two_steps, repeat=2, number=1)[1] / 2  # the first call gets going


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
        trainings = {
            f"{optimiser}, {rate:g}, {schedule}": {"learning_rate": rate, "optimiser": optimiser, "schedule": schedule}
            for rate, optimiser, schedule in product(self.rates, self.optimisers, self.schedules)
        }
        common: dict[str, Any] = {"rows": rows, "steps": self.steps, "batch_size": self.batch}
        return tune_kinds(model, exam, trainings, seed, {"texts": len(rows)}, **common)

    def cost(self, model: Subject) -> tuple[str, float]:
        runs = len(self.rates) * len(self.optimisers) * len(self.schedules)
        work = f"{runs} x {max(self.steps):,} steps on {self.batch} texts of {self.tokens} tokens"
        return work, runs * max(self.steps) * time_step(model, self.batch, self.tokens)


LIGHT: Kinds = (("LoRA", 5e-4, 8),)
QUICK: dict[Tier, dict[str, Any]] = {
    "smoke": {"steps": (5, 10, 20, 50), "text_steps": (), "kinds": LIGHT, "small_kinds": LIGHT}
}


class RelearningSteps(Attack, id="E19", name="relearning_steps", tier="standard", by_tier=QUICK):
    """One training a kind, its rate constant after the warm-up; the exam is held on its way.

    It learns four fifths of the validation facts, as questions and statements; `val` of a way holds the last fifth.
    Where it is named at tier smoke it is one short training of LoRA, on facts alone.
    """

    steps: tuple[int, ...] = (5, 10, 20, 50, 100)  # after which the exam is held
    text_steps: tuple[int, ...] = (20, 50, 100)  # on neutral texts, which bring less back
    batch: int = 8  # facts a step
    text_batch: int = 4  # neutral texts a step: they are longer
    kinds: Kinds = (("LoRA", 2e-4, 8), ("full weights", 1e-4, 0))
    small_kinds: Kinds = (("LoRA", 1e-3, 8), ("full weights", 1e-4, 0), ("full weights at 5e-4", 5e-4, 0))
    text_rate: float = 1e-4

    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        learned, held = split_validation(exam, seed)
        asked = replace(exam, val=held)
        facts = text_rows(model, state_facts(learned))
        on_facts = {"rows": facts, "steps": self.steps, "batch_size": self.batch}
        trainings = {
            kind: {**on_facts, "learning_rate": rate, "rank": rank}
            for kind, rate, rank in (self.small_kinds if is_small(model) else self.kinds)
        }
        if self.text_steps:
            neutral = text_rows(model, texts.neutral)
            on_texts = {"rows": neutral, "steps": self.text_steps, "batch_size": self.text_batch}
            trainings["neutral texts, full weights"] = {**on_texts, "learning_rate": self.text_rate}
        plain = ask_exam(model, asked, "")
        budget = {"facts learned": len({*list_facts(learned)})}
        result = tune_kinds(model, asked, trainings, seed, budget, schedule="constant")
        before = [replace(plain, setting=f"{name}, 0 steps") for name in result.budget["steps"]]
        return replace(result, ways=[*before, *result.ways])
