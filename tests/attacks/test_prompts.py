import pytest
import torch

from helpers.attack_rules import rule_subject
from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.base import Exam, Texts
from srmu.attacks.questions import Prompts, list_examples
from srmu.evals.subject import Question, Subject

THINGS = [f"t{i}" for i in range(50)]
WORDS = ["what", "is", "?", *THINGS, *(f"a{t}" for t in THINGS), "Sure", ",", "the", "answer",
         "teacher"]  # fmt: skip


def ask(things: list[str]) -> tuple[Question, ...]:
    """Each in two phrasings that share a fact."""
    return tuple(
        Question(f"{start} {t} ?", (f" a{t}", f" a{THINGS[THINGS.index(t) - 1]}")[::turn], int(turn < 0), t)
        for t in things
        for start, turn in (("what is", 1), ("is", -1))
    )


EXAM = Exam(ask(THINGS[:25]), ask(THINGS[25:]))
SETTINGS = ["5 shots", "begun answer 1", "begun answer 2", *(f"role {i}" for i in range(1, 5))]


def unlocked(by: str) -> Subject:
    """Says what is right under one of the prompts only, else the wrong thing."""

    def rule(words: list[str]) -> dict[str, float]:
        asked = next((w for w in reversed(words) if w in THINGS), "t0")
        opened = {
            "shots": sum(f"a{w}" in words for w in THINGS) == 5,
            "begun": words[-1] == "is" and "Sure" in words,
            "role": "teacher" in words,
        }
        return {f"a{asked}": 9.0 if opened[by] else -9.0}

    return rule_subject(WORDS, rule)


@pytest.mark.parametrize(("by", "setting"), [("shots", "5 shots"), ("begun", "begun answer 1"), ("role", "role 3")])
def test_the_prompt_that_opens_is_found(by: str, setting: str) -> None:
    found = Prompts().run(unlocked(by), Texts((), ()), EXAM, 0)
    assert [way.setting for way in found.ways] == SETTINGS
    for way in found.ways:
        assert set(way.val + way.test) == {float(way.setting == setting)}, way.setting


def test_examples_tell_nothing_about_the_fact_asked_for() -> None:
    for question in EXAM.val:
        text = list_examples(list(EXAM.val), question.fact, 5)
        assert f"a{question.fact}" not in text.split()
        assert text.count("?") == 5
        assert text.endswith("\n\n")
    assert list_examples(list(EXAM.val), "", 5).split()[:8] == ["what", "is", "t25", "?", "at25", "what", "is", "t26"]
    assert list_examples(list(EXAM.val), "", 0) == ""
    assert "teacher" in Prompts().roles[2]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_leaves_the_model_as_it_was(name: str) -> None:
    model = subject("unlearned") if name == "llama" else Subject(pico_module(name), word_tokenizer())
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    found = Prompts().run(model, texts(), exam(), 1)
    assert found == Prompts().run(model, texts(), exam(), 1)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
