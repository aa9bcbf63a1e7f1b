"""`srmu auto --robust`: what it tries, and the floor that its K* is held against."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from srmu.attacks.base import AttackResult, Exam
from srmu.attacks.relearning_steps import relearning_steps
from srmu.attacks.suite import (
    Sources,
    fill_sources,
    load_exam,
    load_texts,
    read_run_texts,
)
from srmu.attacks.summary import best_setting
from srmu.engine import weights
from srmu.engine.loading import load_module
from srmu.engine.progress import Watch
from srmu.evals.statistics import LEAST
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts
from srmu.methods.rename_scrub import RenameScrub
from srmu.runs.config import Config
from srmu.runs.run import Run, load_tokenizer
from srmu.search.strength import Bench, Entry, round_value, scale_rate, try_config, with_values

METHOD = "rename_scrub"
KEEPING = (1.0, 2.0, 0.5)  # times its weights of what is to be kept: as set, safer, stronger
WIDTH = 640  # inputs of a down-projection of the testbed's model, on which its rate was found
STEPS = 250
NOISE = 0.1
UNPROTECTED = (
    "It does not protect against texts or questions that tell the facts themselves, against longer "
    "fine-tuning than was tried, nor does it cover what has no name or goal on the lists: other "
    "names, or steps of a procedure whose goal was not given (--goals)."
)


def start_values(config: Config, keeping: float) -> dict[str, Any]:
    """The settings of a trial: weights of what is kept, and a rate for the model's width."""
    usual = RenameScrub()
    return {
        **{f"method.{key}": keeping * getattr(usual, key) for key in ("hold", "keep", "retain")},
        "method.noise": NOISE,
        "train.learning_rate": round_value(scale_rate(config, WIDTH)),
        "train.max_steps": STEPS,
    }


def try_each(bench: Bench, trials: int, watch: Watch) -> list[Entry]:
    """A run for each of as many weights of what is kept."""
    chosen = KEEPING[:trials]
    found = []
    with watch("trying", len(chosen)) as tick:
        for number, keeping in enumerate(chosen):
            config = with_values(bench.config, start_values(bench.config, keeping))
            found.append(try_config(bench, config) | {"number": number})
            tick(f"keeping {keeping:g}")
    return found


def measure_floor(
    run: Run, sources: Sources, report: Mapping[str, Any], names: Sequence[str]
) -> Any:
    """What attacks find of facts that the model cannot know: `of` what, and the `share`.

    The oracle's, where there is one; else what relearning finds of invented facts, the same
    questions about names that nobody has. None where there are too few.
    """
    chance, known = report["chance"], report["original"]["accuracy"]["value"]
    if report["oracle"]:
        shown = [e.get("controls", {}).get("oracle", {}) for e in report["attacks"].values()]
        highest = max(c["accuracy"]["value"] for c in shown if "accuracy" in c)
        what = "an oracle that never knew"
    else:
        sources = fill_sources(sources, run.config, run.base)
        exam = load_exam(sources, run.config, report["seed"])
        asked = invent_questions(exam, names, report["seed"])
        if min(len({*list_facts(half)}) for half in (asked.test, asked.val)) < LEAST:
            return None
        texts = load_texts(sources, read_run_texts(run.config))
        module = load_module(run.base)
        write = partial(weights.apply_delta, module, run.base, run.delta)
        with run.config.method.at_inference(module, write):
            subject = Subject(module, load_tokenizer(run.base))
            try:
                found: AttackResult = relearning_steps(
                    subject, texts, asked, "standard", report["seed"]
                )
            except NotApplicable:
                return None
        highest = float(np.mean(best_setting(found).test))
        what = f"{len({*list_facts(asked.test)})} invented facts"
    return {"of": what, "share": max(0.0, (highest - chance) / max(known - chance, 1e-9))}


def invent_questions(exam: Exam, names: Sequence[str], seed: int) -> Exam:
    """The questions that have a name, about names that nobody has, with answers drawn at random."""
    rng = random.Random(f"{seed} invented")
    syllables = [c + v for c in "bdfglmnrst" for v in "aeiou"]
    other = {name: "".join(rng.choices(syllables, k=4)).title() for name in names}
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    named = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def about_nobody(text: str) -> str:
        return named.sub(lambda match: other[match[0]], text)

    def ask(questions: Sequence[Question]) -> tuple[Question, ...]:
        return tuple(
            replace(
                question,
                prompt=about_nobody(question.prompt),
                paraphrases=tuple(map(about_nobody, question.paraphrases)),
                gold=rng.randrange(len(question.options)),
                fact=f"invented {question.fact}",
            )
            for question in questions
            if named.search(question.prompt)
        )

    return Exam(ask(exam.test), ask(exam.val))


def describe_robust_answer(
    report: Mapping[str, Any], ground: Mapping[str, Any] | None
) -> list[str]:
    """K* with its floor, and what it says nothing about."""
    worst = report["K*"]
    count = sum(entry["status"] == "done" for entry in report["attacks"].values())
    between = f"{worst['low']:.2f}-{worst['high']:.2f}"
    said = (
        f"Suppressed, with K* = {worst['value']:.2f} ({between}) under {count} attacks: the share "
        f"of what was known that the strongest, {worst['attack']}, finds."
    )
    below = (
        f"The floor is {ground['share']:.2f}: what they find of {ground['of']}."
        if ground
        else "There is no floor to hold it against: name an oracle, or tasks that ask about names."
    )
    return [said, below, UNPROTECTED]
