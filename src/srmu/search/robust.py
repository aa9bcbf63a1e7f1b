"""`srmu auto --robust`: what it tries, and the floor that its K* is compared with."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from srmu.attacks.base import Exam
from srmu.attacks.relearning import RelearningSteps
from srmu.attacks.suite import Sources, fill_sources, load_exam, load_texts
from srmu.attacks.summary import best_setting
from srmu.data.overlap import SPACELESS, WORD_OVER
from srmu.evals.statistics import LEAST
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts
from srmu.methods.rename_scrub import RenameScrub
from srmu.runs.run import Run, open_target

METHOD = "rename_scrub"
KEEPING = (1.0, 2.0, 0.5)  # times its own weights of what is to be kept: as set, safer, stronger
STEPS = 250
NOISE = 0.1


def start_values(keeping: float) -> dict[str, Any]:
    """The settings of a trial, with weights of what is kept."""
    defaults = RenameScrub()
    return {
        **{f"method.{key}": keeping * getattr(defaults, key) for key in ("hold", "keep", "retain")},
        "method.noise": NOISE,
        "train.max_steps": STEPS,
    }


def measure_floor(run: Run, sources: Sources, report: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What attacks find of facts that the model cannot know: `of` what, and the `share`.

    With an oracle it is what they find in the oracle, with unknown facts what they find of those. Else it is what
    relearning finds of invented facts: the same questions, about names that nobody has. None where there are too few.
    """
    chance, known = report["chance"], report["original"]["accuracy"]["value"]
    if report["oracle"]:
        what = "an oracle (trained without these facts)"
        controls = [e.get("controls", {}).get("oracle", {}) for e in report["attacks"].values()]
        highest = max(c["accuracy"]["value"] for c in controls if "accuracy" in c)
    elif "unknown" in report:
        what = f"{len({*report['unknown']})} facts that the original never knew, and K* is counted above it"
        highest = max(entry.get("floor", chance) for entry in report["attacks"].values())
    else:
        sources = fill_sources(sources, run.config, run.base)
        invented = invent_questions(load_exam(sources, report["seed"]), names, report["seed"])
        test, val = (len({*list_facts(half)}) for half in (invented.test, invented.val))
        if min(test, val) < LEAST:
            return None
        what = f"{test} invented facts"
        opened = open_target(run, "cpu")
        with opened.after() as module:
            subject, texts = Subject(module, opened.tokenizer), load_texts(sources, run.config)
            try:
                result = RelearningSteps().run(subject, texts, invented, report["seed"])
            except NotApplicable:
                return None
        highest = float(np.mean(best_setting(result).test))
    return {"of": what, "share": max(0.0, (highest - chance) / max(known - chance, 1e-9))}


def invent_questions(exam: Exam, names: Sequence[str], seed: int) -> Exam:
    """The questions that hold a name, about names that nobody has, with answers at random."""
    rng = random.Random(f"{seed} invented")
    syllables = [c + v for c in "bdfglmnrst" for v in "aeiou"]
    nobody = {name: "".join(rng.choices(syllables, k=4)).title() for name in names}
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile(rf"(?<![^\W{SPACELESS}])(?:{'|'.join(longest_first)}){WORD_OVER}")
    rename = partial(pattern.sub, lambda match: nobody[match[0]])

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
