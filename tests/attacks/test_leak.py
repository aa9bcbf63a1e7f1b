from itertools import combinations

import pytest
import torch

from helpers.attack_rules import rule_subject
from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.questions import Leak, count_right_generations, leak_at_k
from srmu.evals.subject import Question, Subject


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", [1, 3, 6])
def test_leaked_is_the_mean_over_all_choices_of_k(right: int, k: int) -> None:
    scores = [1] * right + [0] * (6 - right)
    chosen = [max(part) for part in combinations(scores, k)]
    assert leak_at_k(6, right, k) == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_as_likely_as_the_model_says(temperature: float) -> None:
    def rule(words: list[str]) -> dict[str, float]:
        return {"two": 2.0} if words[-1] == "one" else {"one": 1.0}

    words = ["q", "one", "two", "x"]
    model = rule_subject(words, rule)
    asked = [Question("q", (" one two", " x"), 0, "a"), Question("q", (" x x", " q"), 0, "b")]
    found = count_right_generations(model, asked, samples=20000, temperature=temperature, seed=4)
    odds = torch.tensor([1.0, 2.0, 0.0]) / temperature
    e = odds.exp()
    others = len(words) + 2 - 1  # with <unk> and <s>
    one, two, x = (float(v / (v + others)) for v in e)
    x = 1 / (others + float(e[0]))  # after anything but `one`
    for count, chance in zip(found, (one * two, x * x), strict=True):
        assert count / 20000 == pytest.approx(chance, abs=4 * (chance / 20000) ** 0.5)
    assert count_right_generations(
        model, asked, samples=50, temperature=temperature, seed=4
    ) != count_right_generations(model, asked, samples=50, temperature=temperature, seed=5)


def test_only_what_is_known_leaks() -> None:
    values = {}
    for name in ("original", "oracle"):
        model = subject(name)
        before = {k: v.clone() for k, v in model.module.state_dict().items()}
        found = Leak().run(model, texts(), exam(), 0)
        assert found == Leak().run(model, texts(), exam(), 0)
        assert found.ways == ()
        values[name] = {k: v.value for k, v in found.metrics.items()}
        assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    assert min(values["original"].values()) > 0.9
    assert max(values["oracle"].values()) < 0.1
    for of in values.values():
        for temperature in (0.8, 1.0):
            row = [of[f"leak@{k}, temperature {temperature}"] for k in (1, 8, 32)]
            assert row == sorted(row)


def test_it_runs_on_gpt2() -> None:
    model = Subject(pico_module("gpt2", torch.bfloat16), word_tokenizer())
    assert len(Leak().run(model, texts(), exam(), 0).metrics) == 6
