"""What all attacks on the weights have in common."""

from functools import partial
from typing import Any

import pytest
import torch

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks import ATTACKS
from srmu.attacks.base import Attack
from srmu.attacks.perturbations import find_matrices, mark_changed
from srmu.attacks.relearning import HeavyTuning, text_rows
from srmu.evals.subject import NotApplicable, Subject

BENIGN, QUANTISATION, PART, NOISE, STEPS = (
    ATTACKS[name].at_tier("smoke")
    for name in (
        "benign_relearning", "quantisation", "part_relearning", "noise", "relearning_steps",
    )
)  # fmt: skip
EACH = (BENIGN, QUANTISATION, PART, NOISE, STEPS, HeavyTuning(steps=(1, 2)))
named = partial(pytest.mark.parametrize, ids=lambda attack: attack.name)


def state(model: Subject) -> dict[str, Any]:
    """All that an attack could leave behind."""
    return {
        "parts": [name for name, _ in model.module.named_modules()],
        "attributes": sorted(vars(model.module)),
        "modes": [part.training for part in model.module.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in model.module.parameters()],
    }


def unchanged(model: Subject, before: dict[str, Any], weights: dict[str, torch.Tensor]) -> bool:
    now = model.module.state_dict()
    return state(model) == before and all(torch.equal(now[n], w) for n, w in weights.items())


def weights_of(model: Subject) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


@pytest.mark.slow(keep=2)
@named("attack", EACH)
def test_weights_come_back_and_the_seed_decides(attack: Attack) -> None:
    model = subject("unlearned")
    before, weights = state(model), weights_of(model)
    random = torch.get_rng_state()
    first = attack.run(model, texts(), exam(), 3)
    assert unchanged(model, before, weights)
    assert torch.equal(random, torch.get_rng_state())
    assert attack.run(model, texts(), exam(), 3) == first
    assert first.ways and len({way.setting for way in first.ways}) == len(first.ways)
    assert {len(way.test) for way in first.ways} - {0} == {len(exam().test)}


@named("attack", EACH)
def test_weights_come_back_after_an_error(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject("unlearned")
    before, weights = state(model), weights_of(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("in the middle")

    for place in ("base", "perturbations"):
        monkeypatch.setattr(f"srmu.attacks.{place}.mark_answers", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        attack.run(model, texts(), exam(), 0)
    assert unchanged(model, before, weights)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("arch", "attack"),
    [("mixtral", BENIGN), ("mixtral", QUANTISATION), *(("gpt2", attack) for attack in EACH)],
    ids=lambda value: getattr(value, "name", value),
)
def test_other_architectures(arch: str, attack: Attack) -> None:
    model = Subject(pico_module(arch, torch.bfloat16), word_tokenizer())
    before, weights = state(model), weights_of(model)
    found = attack.run(model, texts(), exam(), 0)
    assert found.ways
    assert unchanged(model, before, weights)


@named("attack", EACH)
def test_fixed_weights_are_not_attacked(attack: Attack) -> None:
    with pytest.raises(NotApplicable, match="it answers with two models"):
        attack.run(subject("oracle", fixed="it answers with two models"), texts(), exam(), 0)


@pytest.mark.parametrize(("arch", "turned", "count"), [("llama", False, 7), ("gpt2", True, 4), ("mixtral", False, 6)])
def test_matrices_are_those_of_the_layers(arch: str, turned: bool, count: int) -> None:
    found = find_matrices(pico_module(arch))
    assert len(found) == 4 * count  # mixtral: attention, and two stacks of experts
    assert set(found.values()) == {turned}


def test_change_gets_outputs_by_inputs() -> None:
    """Conv1D and stacked experts come as (outputs, inputs), and only linear matrices change."""
    for arch, expected in (
        ("gpt2", {(96, 32): 1, (32, 32): 1, (48, 32): 1, (32, 48): 1}),
        ("mixtral", {(32, 32): 2, (16, 32): 2, (96, 32): 3, (32, 48): 3}),
    ):
        model = Subject(pico_module(arch), word_tokenizer())
        seen: list[tuple[int, ...]] = []

        def double(matrix: torch.Tensor, seen: list[Any] = seen) -> torch.Tensor:
            seen.append(tuple(matrix.shape))
            return 2 * matrix

        with pytest.MonkeyPatch.context() as patch:
            changed = {}
            patch.setattr(
                "srmu.attacks.perturbations.mark_answers",
                lambda model, *_, changed=changed: changed.update(weights_of(model)),
            )
            mark_changed(model, double, ())
        assert {shape: seen.count(shape) for shape in seen} == {k: 4 * v for k, v in expected.items()}
        names = find_matrices(model.module)
        for name, weight in weights_of(model).items():
            assert torch.equal(changed[name], weight * (2 if name in names else 1)), name


def test_rows_are_cut_and_there_must_be_some() -> None:
    model = subject("oracle")
    assert [len(row) for _, row in text_rows(model, ["w1 " * 100, "w1 w2"])] == [64, 3]
    with pytest.raises(NotApplicable, match="no texts to fine-tune on"):
        text_rows(model, [])
