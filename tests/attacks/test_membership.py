"""Membership attacks where it is known who was a member."""

import random
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from helpers.models import texts as random_texts
from srmu.attacks.base import AttackResult, Texts
from srmu.attacks.measures import Membership, Memorisation
from srmu.evals.statistics import area_under_curve
from srmu.evals.subject import SCORES, NotApplicable, Subject, gradient_norms, membership_scores, memorisation_scores


def attack(model: Subject, given: Texts | None = None, seed: int = 0, **constants: Any) -> AttackResult:
    return Membership(**constants).run(model, given or texts(), exam(), seed)


def test_what_was_learned_is_told_apart() -> None:
    known = attack(subject("original"))
    assert not known.ways
    assert set(known.metrics) == {f"auc {name}" for name in SCORES}
    for name, found in known.metrics.items():
        # no model of this world learns first words, which are the least likely of most texts
        assert found.low > (0.7 if name == "auc min-k" else 0.95), name
        assert found.low <= found.value <= found.high
        assert found.n == 160


def test_the_oracle_tells_nothing_apart() -> None:
    for name, found in attack(subject("oracle")).metrics.items():
        assert abs(found.value - 0.5) < 0.15, name
        assert found.low < 0.5 < found.high, name


def test_identical_sets() -> None:
    forget = texts().forget
    found = attack(subject("original"), Texts(forget, (), forget)).metrics
    assert all(estimate.value == 0.5 for estimate in found.values())


@pytest.mark.slow
def test_privleak_is_muses() -> None:
    """Negative for a model that knows its members, 0 for the oracle, positive for one that avoids
    them."""
    oracle = subject("oracle")
    original = attack(subject("original", oracle=oracle)).metrics["privleak"]
    assert -1 <= original.low < original.high < -0.4
    same = attack(subject("oracle", original={}, oracle=oracle)).metrics["privleak"]
    assert same.value == same.low == same.high == 0
    given = Texts(texts().holdout, (), texts().forget)  # the other way round
    avoids = attack(subject("original", oracle=oracle), given).metrics
    assert avoids["privleak"].value > 0.5
    # by hand
    member, unknown = (
        [membership_scores(model, kind)[:, 2] for model in (subject("original"), oracle)]
        for kind in (given.forget, given.holdout)
    )
    own, reference = (1 - area_under_curve(*pair) for pair in zip(member, unknown, strict=True))
    assert avoids["privleak"].value == pytest.approx((own - reference) / reference)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_scores_are_those_of_a_loop(name: str) -> None:
    """Token by token, one text at a time, without padding."""
    module = pico_module(name)
    model = Subject(module, word_tokenizer())
    rows = random_texts(6, 3)
    found = membership_scores(model, rows)
    for text, given in zip(rows, found, strict=True):
        ids = word_tokenizer()(text)["input_ids"]
        logits = module(torch.tensor([ids])).logits[0].detach().double()
        logps, standard = [], []
        for t in range(1, len(ids)):
            p = logits[t - 1].softmax(-1)
            mean = sum(float(x * x.log()) for x in p)
            square = sum(float(x * x.log() ** 2) for x in p)
            logps.append(float(p[ids[t]].log()))
            standard.append((logps[-1] - mean) / (square - mean**2) ** 0.5)
        few = max(1, (len(ids) - 1) // 5)
        expected = [
            np.mean(logps),
            np.mean(logps) / len(zlib.compress(text.encode())),
            np.mean(sorted(logps)[:few]),
            np.mean(sorted(standard)[:few]),
        ]
        assert given == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_memorisation_is_that_of_a_loop(name: str) -> None:
    module, rows = pico_module(name), random_texts(6, 3)
    found = memorisation_scores(Subject(module, word_tokenizer()), rows)
    for text, (exact, strength) in zip(rows, found, strict=True):
        ids = word_tokenizer()(text)["input_ids"]
        right = [int(module(torch.tensor([ids[:t]])).logits[0, -1].argmax()) == ids[t] for t in range(1, len(ids))]
        assert exact == pytest.approx(sum(right) / len(right))
        fewest = next(k for k in range(len(right) + 1) if all(right[k:]))
        assert strength == pytest.approx(1 - fewest / len(right))


def test_what_was_learned_is_memorised() -> None:
    """More than by the oracle, which never saw these texts."""
    known, never = (Memorisation().run(subject(who), texts(), exam(), 0).metrics for who in ("original", "oracle"))
    assert known["exact memorisation"].low > never["exact memorisation"].high
    assert known["extraction strength"].low > never["extraction strength"].high
    with pytest.raises(NotApplicable, match="3 forget texts are too few"):
        Memorisation().run(subject("original"), Texts(texts().forget[:3], ()), exam(), 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_norms_are_those_of_a_loop(name: str) -> None:
    rows = random_texts(3, 3)
    found = gradient_norms(Subject(pico_module(name), word_tokenizer()), rows)
    for text, norm in zip(rows, found, strict=True):
        module = pico_module(name).requires_grad_(True)
        ids = torch.tensor([word_tokenizer()(text)["input_ids"]])
        module(ids, labels=ids).loss.backward()
        assert norm == pytest.approx(sum(float(p.grad.pow(2).sum()) for p in module.parameters()) ** 0.5, rel=1e-4)


def test_likelihood_against_a_reference_and_gradients_tell_members() -> None:
    oracle = subject("oracle")
    found = attack(subject("original", oracle=oracle), gradients=True, count=40).metrics
    assert found["auc reference"].low > 0.9 and found["auc gradnorm"].low > 0.8
    same = attack(subject("oracle", original={}, oracle=oracle), count=40).metrics
    assert same["auc reference"].value == 0.5


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject("unlearned")
    rows = random_texts(9, 4)
    whole = membership_scores(model, rows)
    monkeypatch.setattr(sys.modules["srmu.evals.subject"], "LOGITS", 1)
    np.testing.assert_allclose(membership_scores(model, rows), whole, rtol=1e-4)


def test_subject_is_as_before_and_the_seed_decides() -> None:
    model = subject("unlearned")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    state, torch_state = random.getstate(), torch.get_rng_state()
    one, two, other = (attack(model, seed=seed, count=40) for seed in (0, 0, 1))
    assert one == two and one.metrics != other.metrics
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(t, before[name]) for name, t in model.module.state_dict().items())


def test_bf16() -> None:
    model = Subject(pico_module(dtype=torch.bfloat16), word_tokenizer())
    exact = Subject(pico_module(), word_tokenizer())
    rows = random_texts(6, 3)
    np.testing.assert_allclose(membership_scores(model, rows), membership_scores(exact, rows), rtol=0.1)


@pytest.mark.parametrize("holdout", [(), ("w1 w2",) * 19])
def test_without_hold_out_texts(holdout: tuple[str, ...]) -> None:
    with pytest.raises(NotApplicable, match=r"no hold-out|are too few"):
        attack(subject("original"), Texts(texts().forget, (), holdout))
