"""E0 and E18 against loops written by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import attack_world as world
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.base import AttackResult, Exam
from srmu.attacks.measures import Utility
from srmu.attacks.questions import ForcedChoice
from srmu.evals.subject import Subject, option_scores


def found(name: str, **given: Any) -> AttackResult:
    return Utility().run(world.subject(name), world.texts(), world.exam(), 0)


def logits(name: str, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    subject = world.subject(name)
    ids = torch.tensor([subject.tokens(text)])
    with torch.no_grad():
        return subject.module(ids).logits[0].log_softmax(-1), ids[0]


@pytest.mark.slow
def test_what_neutral_texts_cost() -> None:
    """Tokens of a text weigh alike, then texts: the bootstrap draws texts."""
    costs, drifts = [], []
    for text in world.texts().neutral:
        logs, ids = logits("unlearned", text)
        before, _ = logits("original", text)
        steps = range(len(ids) - 1)
        costs.append(sum(-float(logs[i, ids[i + 1]]) for i in steps) / len(steps))
        kl = [float((before[i].exp() * (before[i] - logs[i])).sum()) for i in steps]
        drifts.append(sum(kl) / len(steps))
    metrics = found("unlearned").metrics
    mean = sum(costs) / len(costs)
    assert metrics["nats a neutral token"].value == pytest.approx(mean, rel=1e-5)
    assert metrics["perplexity of neutral text"].value == pytest.approx(float(torch.tensor(mean).exp()), rel=1e-5)
    drift = sum(drifts) / len(drifts)
    assert metrics["KL of neutral text"].value == pytest.approx(drift, rel=1e-4)
    assert drift > 0.001
    assert "KL of neutral text" not in found("original").metrics


@pytest.mark.slow
def test_answers_to_what_is_kept() -> None:
    (way,) = found("original").ways
    assert (way.setting, way.val, sum(way.test)) == ("harmless", (), 40)
    assert found("original").metrics["accuracy, harmless"].value == 1


@pytest.mark.slow
def test_repetition_of_a_model_that_says_one_word() -> None:
    """A constant continuation repeats all its sequences of four but the first."""
    module = pico_module()
    with torch.no_grad():
        module.model.norm.weight.zero_()  # all logits 0: the first word of the vocabulary
    subject = Subject(module, word_tokenizer())
    metrics = Utility().run(subject, world.texts(), world.exam(), 0).metrics
    assert metrics["repetition"].value == pytest.approx(28 / 29)
    known = found("original").metrics["repetition"].value
    assert 0 <= known <= 1


@pytest.mark.slow
def test_few_texts_leave_the_rest() -> None:
    few = replace(world.texts(), neutral=world.texts().neutral[:5])
    metrics = Utility().run(world.subject("unlearned"), few, world.exam(), 0).metrics
    assert set(metrics) == {"accuracy, harmless", "repetition"}
    small = Exam(world.exam().test, world.exam().val, {"few": world.exam().test[:4]})
    one = Utility().run(world.subject("original"), few, small, 0)
    assert set(one.metrics) == {"repetition"}
    assert one.ways[0].test == (1.0,) * 4


def test_the_right_options_probability() -> None:
    subject, exam = world.subject("unlearned"), world.exam()
    scores = torch.tensor(option_scores(subject, exam.test))
    gold = torch.tensor([q.gold for q in exam.test])
    chances = scores.softmax(-1).gather(1, gold[:, None])
    one = ForcedChoice().run(subject, world.texts(), exam, 0)
    assert one.metrics["probability"].value == pytest.approx(float(chances.mean()), rel=1e-5)
    assert one.ways[0].test == tuple((scores.argmax(-1) == gold).float().tolist())


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
def test_another_architecture(arch: str) -> None:
    subject = Subject(pico_module(arch, torch.bfloat16), word_tokenizer())
    before = {name: p.clone() for name, p in subject.module.state_dict().items()}
    one = Utility().run(subject, world.texts(), world.exam(), 0)
    assert one == Utility().run(subject, world.texts(), world.exam(), 0)
    assert all(p.equal(before[name]) for name, p in subject.module.state_dict().items())
