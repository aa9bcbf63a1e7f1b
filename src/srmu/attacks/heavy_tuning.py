"""E9: as much harmless fine-tuning as an attacker who is not in a hurry can do."""

import time
from dataclasses import dataclass
from itertools import product
from typing import Literal

from srmu.attacks.base import Attack, AttackResult, Exam, Setting, Texts, ask_exam
from srmu.attacks.tuning import text_rows, tune_and_ask
from srmu.engine.fine_tune import Row, tune_model
from srmu.evals.subject import Subject


@dataclass(frozen=True, kw_only=True)
class HeavyTuning(Attack):
    """All weights on the neutral texts, for each rate, optimiser and schedule."""

    id = "E9"
    name = "heavy_tuning"
    tier = "deep"

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
            setting = f"{optimiser}, {rate:g}, {schedule}"

            def ask(step: int, setting: str = setting) -> Setting:
                return ask_exam(model, exam, f"{setting}, {step} steps")

            reached, taken[setting] = tune_and_ask(
                model,
                rows,
                ask,
                self.steps,
                learning_rate=rate,
                batch_size=self.batch,
                seed=seed,
                optimiser=optimiser,
                schedule=schedule,
            )
            ways += reached.values()
        budget = {"texts": len(rows), "batch": self.batch, "steps": taken}
        return AttackResult(tuple(ways), budget=budget)

    def cost(self, model: Subject) -> str:
        """From the time of one step."""
        if model.fixed:
            return f"heavy_tuning takes no time: {model.fixed}"
        rows: list[Row] = [([], [0] * self.tokens)] * self.batch
        ends: list[float] = []
        with model.editable("*") as edited:
            # The first step also makes the optimiser's state.
            tune_model(
                edited,
                rows,
                steps=2,
                learning_rate=0.0,
                batch_size=self.batch,
                seed=0,
                after=lambda step: ends.append(time.perf_counter()),
            )
        runs = len(self.rates) * len(self.optimisers) * len(self.schedules)
        hours = runs * max(self.steps) * (ends[1] - ends[0]) / 3600
        return (
            f"heavy_tuning takes {runs} x {max(self.steps):,} steps on {self.batch} texts: with "
            f"{self.tokens} tokens a text {hours:,.1f} hours on this machine"
        )
