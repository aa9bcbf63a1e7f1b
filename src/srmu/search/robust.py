"""`srmu auto --robust`: what it tries, and the floor that its K* is compared with."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from srmu.attacks.base import Exam
from srmu.attacks.relearning_steps import RelearningSteps
from srmu.attacks.suite import Sources, fill_sources, load_exam, load_texts, read_run_texts
from srmu.attacks.summary import best_setting
from srmu.engine.progress import Watch
from srmu.errors import SrmuError
from srmu.evals.statistics import LEAST
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts
from srmu.methods.rename_scrub import RenameScrub
from srmu.runs.config import Config
from srmu.runs.open import open_target
from srmu.runs.run import Run
from srmu.search.objective import Bench, Entry, search_configs
from srmu.search.space import round_value, scale_rate

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
    defaults = RenameScrub()
    return {
        **{f"method.{key}": keeping * getattr(defaults, key) for key in ("hold", "keep", "retain")},
        "method.noise": NOISE,
        "train.learning_rate": round_value(scale_rate(config, WIDTH)),
        "train.max_steps": STEPS,
    }


def search_weights(bench: Bench, trials: int, watch: Watch) -> list[Entry]:
    """Runs with other weights of what is kept, the method's own first: at most three.

    SrmuError where the first fails: the others are compared with it.
    """
    settings = [start_values(bench.config, keeping) for keeping in KEEPING[:trials]]
    entries = search_configs(bench, "weights", settings, watch)
    if not entries[0]["values"]:
        raise SrmuError(entries[0]["why"])
    return entries


def measure_floor(run: Run, sources: Sources, report: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What attacks find of facts that the model cannot know: `of` what, and the `share`.

    With an oracle it is what they find in the oracle. Without one it is what relearning finds of
    invented facts: the same questions, about names that nobody has. None where there are too few.
    """
    chance, known = report["chance"], report["original"]["accuracy"]["value"]
    if report["oracle"]:
        controls = [e.get("controls", {}).get("oracle", {}) for e in report["attacks"].values()]
        highest = max(c["accuracy"]["value"] for c in controls if "accuracy" in c)
        what = "an oracle that never knew"
    else:
        sources = fill_sources(sources, run.config, run.base)
        exam = load_exam(sources, run.config, report["seed"])
        invented = invent_questions(exam, names, report["seed"])
        if min(len({*list_facts(half)}) for half in (invented.test, invented.val)) < LEAST:
            return None
        texts = load_texts(sources, read_run_texts(run.config))
        opened = open_target(run, "cpu")
        with opened.after() as module:
            subject = Subject(module, opened.tokenizer)
            try:
                result = RelearningSteps().run(subject, texts, invented, report["seed"])
            except NotApplicable:
                return None
        highest = float(np.mean(best_setting(result).test))
        what = f"{len({*list_facts(invented.test)})} invented facts"
    return {"of": what, "share": max(0.0, (highest - chance) / max(known - chance, 1e-9))}


def invent_questions(exam: Exam, names: Sequence[str], seed: int) -> Exam:
    """The questions that hold a name, about names that nobody has, with answers at random."""
    rng = random.Random(f"{seed} invented")
    syllables = [c + v for c in "bdfglmnrst" for v in "aeiou"]
    nobody = {name: "".join(rng.choices(syllables, k=4)).title() for name in names}
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def rename(text: str) -> str:
        return pattern.sub(lambda match: nobody[match[0]], text)

    def invent(questions: Sequence[Question]) -> tuple[Question, ...]:
        return tuple(
            replace(
                question,
                prompt=rename(question.prompt),
                paraphrases=tuple(map(rename, question.paraphrases)),
                gold=rng.randrange(len(question.options)),
                fact=f"invented {question.fact}",
            )
            for question in questions
            if pattern.search(question.prompt)
        )

    return Exam(invent(exam.test), invent(exam.val))


def describe_robust_answer(report: Mapping[str, Any], floor: Mapping[str, Any] | None) -> list[str]:
    """K* with its floor, and what it does not cover."""
    worst = report["K*"]
    count = sum(entry["status"] == "done" for entry in report["attacks"].values())
    interval = f"{worst['low']:.2f}-{worst['high']:.2f}"
    return [
        f"Suppressed, with K* = {worst['value']:.2f} ({interval}) under {count} attacks: the share "
        f"of what was known that the strongest, {worst['attack']}, finds.",
        f"The floor is {floor['share']:.2f}: what they find of {floor['of']}."
        if floor
        else "There is no floor to hold it against: name an oracle, or tasks that ask about names.",
        UNPROTECTED,
    ]
