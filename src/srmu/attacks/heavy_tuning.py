"""E9: as much harmless fine-tuning as an attacker who is not in a hurry can do."""

import time
from collections.abc import Sequence
from itertools import product
from typing import Literal

from srmu.attacks.base import AttackResult, Exam, Setting, Texts, Tier, ask_exam
from srmu.attacks.tuning import Row, text_rows, tune_model
from srmu.evals.subject import Subject

RATES = (1e-5, 5e-5, 2e-4)
OPTIMISERS: tuple[Literal["adamw", "sgd"], ...] = ("adamw", "sgd")
SCHEDULES: tuple[Literal["constant", "linear"], ...] = ("constant", "linear")
STEPS = (100, 1000, 10_000)  # of one training, after which the exam is held
BATCH = 8
TOKENS = 128  # of a text, as `cost` guesses


def heavy_tuning(
    model: Subject, texts: Texts, exam: Exam, tier: Tier, seed: int, steps: Sequence[int] = STEPS
) -> AttackResult:
    """All weights on the neutral texts, for each rate, optimiser and schedule."""
    rows = text_rows(model, texts.neutral)
    ways: list[Setting] = []
    taken = {}
    for rate, optimiser, schedule in product(RATES, OPTIMISERS, SCHEDULES):
        setting = f"{optimiser}, {rate:g}, {schedule}"

        def after(step: int, setting: str = setting) -> None:
            if step in steps:
                ways.append(ask_exam(model, exam, f"{setting}, {step} steps"))

        with model.editable("*") as edited:
            taken[setting] = tune_model(
                edited,
                rows,
                steps=max(steps),
                learning_rate=rate,
                batch_size=BATCH,
                seed=seed,
                optimiser=optimiser,
                schedule=schedule,
                after=after,
            )
    return AttackResult(tuple(ways), budget={"texts": len(rows), "batch": BATCH, "steps": taken})


def cost(model: Subject) -> str:
    """What the attack takes, from the time of one step: to be asked before it."""
    if model.fixed:
        return f"heavy_tuning takes no time: {model.fixed}"
    rows: list[Row] = [([], [0] * TOKENS)] * BATCH
    ends: list[float] = []
    with model.editable("*") as edited:
        # The first step also makes the optimiser's state.
        tune_model(
            edited,
            rows,
            steps=2,
            learning_rate=0.0,
            batch_size=BATCH,
            seed=0,
            after=lambda step: ends.append(time.perf_counter()),
        )
    runs = len(RATES) * len(OPTIMISERS) * len(SCHEDULES)
    hours = runs * max(STEPS) * (ends[1] - ends[0]) / 3600
    return (
        f"heavy_tuning takes {runs} x {max(STEPS):,} steps on {BATCH} texts: with {TOKENS} tokens "
        f"a text {hours:,.1f} hours on this machine"
    )
