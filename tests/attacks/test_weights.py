"""What all attacks on the weights have in common; fine-tuning against a loop written out."""

import sys
from functools import partial
from typing import Any

import pytest
import torch

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks import ATTACKS
from srmu.attacks.base import Attack, ask_changed, find_matrices
from srmu.attacks.heavy_tuning import HeavyTuning
from srmu.attacks.tuning import text_rows
from srmu.engine.fine_tune import rate_factor, tune_model
from srmu.engine.model import EditableModel
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

    for name in ("ask_exam", "mark_answers"):
        monkeypatch.setattr(f"srmu.attacks.base.{name}", fail)
        monkeypatch.setattr(sys.modules[type(attack).__module__], name, fail, raising=False)
    with pytest.raises(RuntimeError, match="in the middle"):
        attack.run(model, texts(), exam(), 0)
    assert unchanged(model, before, weights)


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


@pytest.mark.parametrize(
    ("arch", "turned", "count"), [("llama", False, 7), ("gpt2", True, 4), ("mixtral", False, 6)]
)
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
                "srmu.attacks.base.ask_exam",
                lambda model, *_, changed=changed: changed.update(weights_of(model)),
            )
            ask_changed(model, exam(), "double", double)
        assert {shape: seen.count(shape) for shape in seen} == {
            k: 4 * v for k, v in expected.items()
        }
        names = find_matrices(model.module)
        for name, weight in weights_of(model).items():
            assert torch.equal(changed[name], weight * (2 if name in names else 1)), name


def test_rate_rises_and_falls() -> None:
    linear = [rate_factor(done, 40, "linear") for done in range(40)]
    assert linear[:3] == [0.5, 1.0, 1.0]  # 5 % of 40 steps rise
    assert linear[3] == pytest.approx(37 / 38)
    assert linear[-1] == pytest.approx(1 / 38)
    assert [rate_factor(done, 40, "constant") for done in range(40)] == [0.5] + [1.0] * 39
    assert [rate_factor(done, 2, "linear") for done in range(2)] == pytest.approx([1, 1 / 1.9])


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_tune_is_the_loop_written_out(optimiser: Any) -> None:
    """Rows of several lengths in one batch; only what is to be said counts."""
    rows = [([1, 5], [6, 7, 8]), ([], [1, 9, 10]), ([1, 11, 12, 13], [14])]
    tuned, naive = pico_module(), pico_module()
    done: list[int] = []
    options: Any = {"learning_rate": 1e-2, "batch_size": 3, "optimiser": optimiser}
    model = EditableModel(tuned, ["*"])
    assert tune_model(model, rows, steps=4, seed=0, after=done.append, **options) == 4
    assert done == [1, 2, 3, 4]

    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in naive.parameters()]
    for step in range(4):
        losses = []
        for before, said in rows:
            ids = torch.tensor([before + said])
            logs = naive(ids).logits[0].log_softmax(-1)
            losses += [-logs[t - 1, ids[0, t]] for t in range(max(len(before), 1), ids.shape[1])]
        grads = torch.autograd.grad(torch.stack(losses).mean(), [*naive.parameters()])
        rate = 1e-2 * min(1.0, (4 - step) / (4 - 0.2))
        with torch.no_grad():
            for p, g, (m, v) in zip(naive.parameters(), grads, moments, strict=True):
                if optimiser == "sgd":
                    m.mul_(0.9).add_(g)
                    p -= rate * m
                else:
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    one, two = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                    p -= rate * one / (two.sqrt() + 1e-8)
    for name, weight in naive.named_parameters():
        # where a gradient is almost 0, Adam's step is its sign: rounding decides it
        close = torch.isclose(model.trained[name], weight, atol=2e-4)
        assert close.float().mean() > 0.999, name


def test_each_epoch_reads_each_row_once() -> None:
    model = EditableModel(pico_module(), ["*.linear"])
    read: list[int] = []
    logits = model.logits
    model.logits = lambda batch: (  # type: ignore[method-assign]
        read.extend(batch["input_ids"][:, 1].tolist()) or logits(batch)
    )
    rows = [([], [1, word, 9]) for word in range(20, 30)]
    tune_model(model, rows, steps=6, learning_rate=1e-3, batch_size=4, seed=0)
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(20, 30))
    assert read[:10] != read[10:]


def test_small_steps_add_up_in_bf16() -> None:
    """A step of 2e-5 on a weight of 0.15 rounds to nothing: float32 copies keep it."""
    rows = text_rows(subject("oracle"), texts().neutral[:4])
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = EditableModel(pico_module(dtype=dtype), ["*.linear"])
        tune_model(
            model, rows, steps=60, learning_rate=2e-5, batch_size=4, seed=0, schedule="constant"
        )
        name = next(iter(model.trained))
        found[dtype] = (model.trained[name] - model.original[name]).detach().flatten().float()
    cosine = torch.cosine_similarity(*found.values(), dim=0)
    assert cosine > 0.8


def test_tune_stops_before_what_is_not_finite() -> None:
    model = EditableModel(pico_module(), ["*.linear"])
    rows = text_rows(subject("oracle"), texts().neutral)
    taken = tune_model(
        model, rows, steps=20, learning_rate=1e30, batch_size=4, seed=0, schedule="constant"
    )
    assert 0 < taken < 20


def test_rows_are_cut_and_there_must_be_some() -> None:
    model = subject("oracle")
    assert [len(row) for _, row in text_rows(model, ["w1 " * 100, "w1 w2"])] == [64, 3]
    with pytest.raises(NotApplicable, match="no neutral texts"):
        text_rows(model, [])
