"""Forget quality: none of it lost against oneself, and all of it in what was memorised."""

import math

import pytest
import torch
from scipy.stats import ks_2samp

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.measures import ForgetQuality, log_truth_ratios
from srmu.evals.subject import NotApplicable, Question, Subject, list_facts


def attack(model: Subject):
    return ForgetQuality().run(model, texts(), exam(), 0)


def test_oneself() -> None:
    found = attack(subject("oracle", oracle=subject("oracle"))).metrics
    assert [found[name].value for name in ("ks distance", "ks p")] == [0, 1]
    assert found["ks distance"].high == 0
    assert found["ks distance"].n == found["ks p"].n == len(exam().test)


def test_what_was_learned() -> None:
    original = attack(subject("original", oracle=subject("oracle"))).metrics
    assert original["ks distance"].low > 0.5 and original["ks p"].value < 1e-6
    # of those who know, the wrong answers are far less likely than the right one
    assert original["truth ratio"].value < 0.05
    oracle = attack(subject("oracle", oracle=subject("original"))).metrics
    assert oracle["truth ratio"].value > 0.2
    assert oracle["ks distance"].value == original["ks distance"].value


def test_numbers_are_scipys_and_by_hand() -> None:
    unlearned = subject("unlearned")
    assert unlearned.oracle is not None
    found = attack(unlearned).metrics
    own, other = (log_truth_ratios(model, exam().test) for model in (unlearned, unlearned.oracle))
    expected = ks_2samp(own, other)
    assert found["ks distance"].value == pytest.approx(expected.statistic)
    assert found["ks p"].value == expected.pvalue
    ratios = [math.exp(x) for x in own]
    mean = sum(min(r, 1 / r) for r in ratios) / len(ratios)
    assert found["truth ratio"].value == pytest.approx(mean)
    assert len(list_facts(exam().test)) == found["truth ratio"].n


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_ratio_of_answers_of_several_tokens(name: str) -> None:
    """Each answer's probability is the geometric mean of its tokens'."""
    module = pico_module(name)
    question = Question("w1 w2", (" w3", " w4 w5", " w6 w7 w8"), 1, "fact")

    def normalised(answer: str) -> float:
        ids = word_tokenizer()("w1 w2" + answer)["input_ids"]
        p = module(torch.tensor([ids])).logits[0].detach().double().softmax(-1)
        chances = [float(p[t - 1, ids[t]]) for t in range(3, len(ids))]
        return math.prod(chances) ** (1 / len(chances))

    wrong = math.sqrt(normalised(" w3") * normalised(" w6 w7 w8"))
    found = log_truth_ratios(Subject(module, word_tokenizer()), [question])
    assert math.exp(found[0]) == pytest.approx(wrong / normalised(" w4 w5"), rel=1e-4)


def test_subject_is_as_before_and_numbers_come_again() -> None:
    model = subject("unlearned")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    assert attack(model) == attack(model)
    assert all(torch.equal(t, before[name]) for name, t in model.module.state_dict().items())


def test_without_an_oracle() -> None:
    with pytest.raises(NotApplicable, match="no oracle"):
        attack(subject("original"))
