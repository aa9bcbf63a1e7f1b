import random

import pytest
import torch

from helpers.attack_rules import rule_subject
from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.base import Exam, Texts
from srmu.attacks.questions import EntangledQueries, find_term, put_in_front, replace_option
from srmu.evals.subject import NotApplicable, Question, Subject

NONE = Texts((), ())
HAZARDS, SAFE = [f"h{i}" for i in range(60)], [f"s{i}" for i in range(30)]
WORDS = ["what", "is", "?", *HAZARDS, *SAFE, *(f"a{w}" for w in HAZARDS + SAFE)]


def ask(things: list[str]) -> tuple[Question, ...]:
    """The answer about h0 is ah0; wrong are those about the things that follow."""
    rows = []
    for i, thing in enumerate(things):
        options = [f" a{things[(i + k) % len(things)]}" for k in range(4)]
        options = options[i % 4 :] + options[: i % 4]
        rows.append(Question(f"what is {thing} ?", tuple(options), -i % 4, thing, entry=thing))
    return tuple(rows)


EXAM = Exam(ask(HAZARDS[:30]), ask(HAZARDS[30:]), {"one": ask(SAFE[:15]), "two": ask(SAFE[15:])})


def knows(words: list[str]) -> dict[str, float]:
    thing = next((w for w in reversed(words) if w in HAZARDS + SAFE), "h0")
    return {f"a{thing}": 9.0}


def triggered(words: list[str]) -> dict[str, float]:
    """Astray once a thing to be forgotten has been named: it says the answers about those."""
    if not {*words} & {*HAZARDS}:
        return {**knows(words), **{f"a{h}": 10.0 for h in HAZARDS}}
    return {f"a{w}": -9.0 for w in (*HAZARDS, *SAFE) if f"a{w}" in knows(words)}


def test_a_model_that_knows_all_is_not_confused() -> None:
    found = EntangledQueries().run(rule_subject(WORDS, knows), NONE, EXAM, 0)
    assert [way.setting for way in found.ways] == ["second", "first and again"]
    assert all(set(way.val + way.test) == {1.0} for way in found.ways)
    for name, number in found.metrics.items():
        assert number.value == (0 if "cost" in name else 1), name
        assert number.n == 30


@pytest.mark.slow
def test_a_trigger_shows() -> None:
    found = EntangledQueries().run(rule_subject(WORDS, triggered), NONE, EXAM, 0)
    assert found.metrics["utility alone"].value == 1
    assert found.metrics["cost of a forget term, option"].value == 1  # what it says loudest
    assert found.metrics["cost of a forget term, in front"].value == 1
    assert found.metrics["utility in pair"].value == 0
    assert not any(sum(way.val + way.test) for way in found.ways)


def test_terms_in_questions() -> None:
    forget = list(EXAM.test)
    harmless = EXAM.utility["one"][5]
    (begun,) = put_in_front([f"{find_term(forget[3])} "], [harmless])
    assert begun.prompt == "h3 what is s5 ?"
    for seed in range(5):
        changed = replace_option(harmless, forget, 0, random.Random(seed))
        assert changed.answer == harmless.answer
        assert sum(a != b for a, b in zip(changed.options, harmless.options, strict=True)) == 1
        assert " ah0" in changed.options
    same = [Question("x", (" as6", " b"), 0, "x"), *forget]  # is an option already
    assert " ah0" in replace_option(harmless, same, 0, random.Random(0)).options
    lines = "Q\nA. u\nB. v\nC. y\nD. x\nA:"
    letters = Question(lines, (" A", " B", " C", " D"), 1, "f")
    other = Question(lines.replace("v", "ill"), letters.options, 1, "g")
    changed = replace_option(letters, [other], 0, random.Random(0))
    assert changed.options == letters.options
    assert changed.prompt.replace("ill", "_") in {lines.replace(c, "_") for c in "uyx"}
    (begun,) = put_in_front([f"{find_term(letters)} "], [letters])
    assert begun.prompt == f"v {lines}"
    assert " ah1" in replace_option(harmless, forget, 31, random.Random(0)).options  # the second of 30


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_leaves_the_model_as_it_was(name: str) -> None:
    model = subject("unlearned") if name == "llama" else Subject(pico_module(name), word_tokenizer())
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    found = EntangledQueries().run(model, texts(), exam(), 3)
    assert found == EntangledQueries().run(model, texts(), exam(), 3)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_it_needs_harmless_questions() -> None:
    for utility in ({}, {"one": EXAM.utility["one"]}):
        with pytest.raises(NotApplicable, match="utility"):
            EntangledQueries().run(rule_subject(WORDS, knows), NONE, Exam(EXAM.test, EXAM.val, utility), 0)
