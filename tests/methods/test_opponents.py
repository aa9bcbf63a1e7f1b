"""The methods that are to make suppression last: each against the same by hand."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from helpers.models import pico_module, save_pico, texts, topic, write_jsonl
from srmu.engine.losses import is_counted, is_predicted, mean_nll, token_mse
from srmu.engine.model import EditableModel
from srmu.engine.topic import Batch
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.methods.base import Session
from srmu.methods.iterated import Iterated
from srmu.methods.logits import fine_tune
from srmu.methods.multi_site import MultiSite
from srmu.methods.rmu import RMU
from srmu.methods.rmu_lat import RMULAT, shift_inputs
from srmu.methods.srmu import SRMU
from srmu.methods.suppressing import Suppressing
from srmu.methods.tar import TAR
from srmu.methods.undo import Undo
from srmu.runs import estimate, run
from srmu.runs.config import make_config

LAYER = 2
BRIEF: dict[str, Any] = {"layer": LAYER, "teacher_steps": 3, "teacher_learning_rate": 1e-3}
WINDOW = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}


def editable(method: Any, arch: str = "llama") -> EditableModel:
    return EditableModel(pico_module(arch), method.trainable, method.depth)


def values(model: EditableModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.trained.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def moved(model: EditableModel, size: float = 0.05) -> EditableModel:
    """The model some way off the original."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.trained.values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def adamw(module: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0)


def step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def logits(module: Any, batch: Batch) -> Tensor:
    return module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def slow_kl(wanted: Any, module: Any, batch: Batch) -> float:
    """KL(wanted || module), mean over the tokens that the batch counts, one by one."""
    found = []
    with torch.no_grad():
        p, q = (logits(m, batch).double().softmax(-1) for m in (wanted, module))
    for row, labels in enumerate(batch["labels"].tolist()):
        for t in range(1, len(labels)):
            if labels[t] != -100:
                a, b = p[row, t - 1], q[row, t - 1]
                found.append(float((a * (a / b).log()).sum()))
    return sum(found) / len(found)


# --- what they share -----------------------------------------------------------------------------


def test_only_some_of_the_trained_tensors_get_gradients() -> None:
    model = EditableModel(pico_module(), ("*",))
    with model.only(("2.mlp_down",)):
        assert [n for n, p in model.trained.items() if p.requires_grad] == ["model.layers.2.mlp.down_proj.weight"]
        with model.only(("*",)):
            assert all(p.requires_grad for p in model.trained.values())
        assert sum(p.requires_grad for p in model.trained.values()) == 1
    assert all(p.requires_grad for p in model.trained.values())


@pytest.mark.parametrize("scope", ["window", "all"])
@pytest.mark.parametrize("first", ["srmu", "rmu"])
def test_the_first_method_is_that_method(first: Any, scope: Any) -> None:
    """As much as a run of it by itself; with scope=all it moves all layers below, too."""
    method = Undo(first=first, scope=scope, **BRIEF)
    model = editable(method)
    state = method.suppress(model, topic())
    cls = SRMU if first == "srmu" else RMU
    alone = cls(layer=LAYER, kappa=method.kappa, alpha=method.alpha)
    if scope == "all":
        assert len(model.delta()) > 3
        assert not any(name.startswith("model.layers.3") for name in model.delta())
        return
    assert set(model.delta()) == WINDOW
    other = EditableModel(pico_module(), alone.trainable, alone.depth)
    train = TrainOptions(max_steps=3, learning_rate=1e-3)
    outcome = alone.apply(other, [topic()], Session(train, lambda *row: None))
    assert same(model.delta(), other.delta())
    assert torch.equal(state.tensors["target"], outcome.states["bio"].tensors["target"])


def test_fine_tuning_by_hand() -> None:
    """Likelihood of the forget texts, and KL(original || model) where something is to be kept."""
    part = topic()
    for keep in (0.0, 2.0):
        model, module, original = EditableModel(pico_module(), ("*",)), pico_module(), pico_module()
        fine_tune(model, part, 3, 1e-3, keep)
        optimiser = adamw(module, 1e-3)
        for i in range(3):
            forget, retain = part.forget[i % 2], part.retain[i % 2]
            loss = mean_nll(logits(module, forget), forget["labels"]).value
            if keep:
                p, q = (logits(m, retain).log_softmax(-1) for m in (original, module))
                kl = (p.exp() * (p - q)).sum(-1)[:, :-1][is_predicted(retain["labels"])].mean()
                loss = loss + keep * kl
            step(optimiser, loss)
        expected = dict(module.named_parameters())
        for name, parameter in model.trained.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("cls", [Undo, TAR, Iterated])
def test_the_layer_is_filled_in(cls: Any) -> None:
    config = LlamaConfig(num_hidden_layers=12)
    assert cls().resolved(config).layer == RMU().resolved(config).layer
    assert cls(first="graddiff").resolved(config).layer is None
    with pytest.raises(SrmuError, match="layer"):
        cls(layer=12).resolved(config)


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (Undo, {"first": "graddiff", "kappa": 8.0}, "method.kappa has no effect"),
        (Undo, {"gamma": 1.0}, "method.gamma has no effect without first=graddiff"),
        (Undo, {"anchor_share": 0.3}, "method.anchor_share has no effect"),
        (Undo, {"noise": 1.5}, "method.noise=1.5: expected a number from 0 to 1"),
        (Undo, {"noise": 0.0, "beta": 2.0}, "method.beta has no effect"),
        (Undo, {"own_texts": 0, "own_tokens": 9}, "method.own_tokens has no effect"),
        (TAR, {"adversary_steps": 0}, "method.adversary_steps=0"),
        (TAR, {"teacher_steps": 0}, "method.teacher_steps=0"),
        (Iterated, {"rounds": 0}, "method.rounds=0"),
        (RMULAT, {"budget": -1.0}, "method.budget=-1.0"),
        (MultiSite, {"window": 0}, "method.window=0"),
        (MultiSite, {"anchor_share": 0.3}, "method.anchor_share has no effect"),
    ],
)
def test_options_that_make_no_sense(cls: Any, options: Any, says: str) -> None:
    with pytest.raises(SrmuError, match=says) as caught:
        cls(**options)
    assert "\n" not in str(caught.value)


# --- UNDO ----------------------------------------------------------------------------------------


def test_undo_shrinks_matrices_into_noise() -> None:
    method = Undo(noise=0.3, beta=2.0, own_texts=2, own_tokens=4, **BRIEF)
    model = editable(method)
    state = method.setup(model, topic())
    teacher, generator = state.memory["teacher"], topic().generator("noise", shared=True)
    suppressed = editable(method)
    method.suppress(suppressed, topic())
    assert same(teacher, values(suppressed))
    vectors = 0
    for name, parameter in model.trained.items():
        if parameter.ndim == 1:
            vectors += 1
            assert torch.equal(parameter, teacher[name])
            continue
        draw = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 * 2.0 * model.module.config.initializer_range
        torch.testing.assert_close(parameter.data, 0.7 * teacher[name] + scale * draw)
    assert vectors


def test_undo_distils_the_teacher() -> None:
    method = Undo(noise=0.5, own_texts=3, own_tokens=5, **BRIEF)
    model, part = editable(method), topic()
    state = method.setup(model, part)
    teacher = copy.deepcopy(model.module)
    for name, tensor in state.memory["teacher"].items():
        teacher.get_parameter(name).data.copy_(tensor)
    texts_of = state.memory["texts"]
    for turn in range(2):
        retain = part.retain[turn]
        terms = method.loss(model, state, part.forget[turn], retain, turn)
        want = slow_kl(teacher, model.module, retain)
        assert float(terms.loss_values["retain"].detach()) == pytest.approx(want, rel=1e-4)
        rows = [texts_of[(2 * turn + i) % len(texts_of)] for i in range(2)]
        each = [(len(r) - 1, slow_kl(teacher, model.module, one_row(r))) for r in rows]  # weighted by tokens
        want = sum(n * k for n, k in each) / sum(n for n, _ in each)
        assert float(terms.loss_values["own"].detach()) == pytest.approx(want, rel=1e-4)


def one_row(ids: list[int]) -> Batch:
    row = torch.tensor([ids])
    return Batch(input_ids=row, attention_mask=torch.ones_like(row), labels=row)


def test_undo_without_noise_has_nothing_to_learn() -> None:
    method = Undo(noise=0.0, own_texts=0, **BRIEF)
    model, part = editable(method), topic()
    state = method.setup(model, part)
    terms = method.loss(model, state, part.forget[0], part.retain[0], 0)
    assert list(terms.loss_values) == ["retain"]
    assert float(terms.loss_values["retain"].detach()) == 0
    assert set(model.delta()) == WINDOW


# --- RMU with latent adversarial training --------------------------------------------------------


def lat(**options: Any) -> RMULAT:
    return RMULAT(**{"layer": LAYER, "window": 2, "kappa": 4.0} | options)


def test_without_a_budget_it_is_rmu() -> None:
    part = topic()
    plain = RMU(layer=LAYER, window=2, kappa=4.0)
    one, other = lat(budget=0.0), plain
    losses = []
    for method in (one, other):
        model = moved(editable(method))
        state = method.setup(model, part)
        losses.append(method.loss(model, state, part.forget[0], part.retain[0], 1).loss_values)
    assert float(losses[0]["forget"].detach()) == pytest.approx(float(losses[1]["forget"].detach()), rel=1e-6)
    assert torch.equal(losses[0]["retain"], losses[1]["retain"])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "falcon"])
def test_one_step_of_the_adversary_by_hand(arch: str) -> None:
    """Against the gradient, to the edge of the ball around each token's input."""
    method, part = lat(adversary_steps=1, budget=0.3), topic()
    model = moved(editable(method, arch))
    batch, layer = part.forget[0], model.layers[1]
    mask = is_counted(batch["labels"])
    with model.frozen():
        before = model.hidden(batch, method.site, keep=False)
    shift = torch.zeros_like(before, requires_grad=True)
    with shift_inputs(layer, shift) as seen:
        cost = token_mse(model.hidden(batch, method.site), before, mask).value
    (slope,) = torch.autograd.grad(cost, shift)
    step_by_hand = torch.zeros_like(before)
    for row, token in mask.nonzero().tolist():
        g, h = slope[row, token], seen[0][row, token]
        step_by_hand[row, token] = -0.3 * h.norm() * g / g.norm()
    with shift_inputs(layer, step_by_hand):
        expected = model.hidden(batch, method.site)
    got = method.forget_hidden(model, batch)
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert got.requires_grad
    assert layer._forward_pre_hooks == {}


@pytest.mark.parametrize("adversary", ["activations", "likelihood"])
def test_the_adversary_gets_nearer_to_what_it_seeks(adversary: Any) -> None:
    """The model is so far off that no perturbation within the budget goes too far."""
    found = []
    for budget in (0.0, 0.05, 0.1):
        method, part = lat(adversary=adversary, budget=budget), topic()
        model = moved(editable(method), 0.5)
        batch = part.forget[0]
        if adversary == "likelihood":
            taken: list[Tensor] = []
            spy = model.layers[2].register_forward_hook(lambda m, a, out, t=taken: t.append(out))
            method.forget_hidden(model, batch)
            spy.remove()
            last = taken[-1][0] if isinstance(taken[-1], tuple) else taken[-1]

            def swap(m: Any, args: Any, out: Any, last: Tensor = last) -> Any:
                return (last, *out[1:]) if isinstance(out, tuple) else last

            handle = model.layers[2].register_forward_hook(swap)
            found.append(float(mean_nll(model.logits(batch), batch["labels"]).value.detach()))
            handle.remove()
            continue
        with model.frozen():
            before = model.hidden(batch, method.site, keep=False)
        hidden = method.forget_hidden(model, batch)
        found.append(float(token_mse(hidden, before, is_counted(batch["labels"])).value.detach()))
    assert found[0] > found[1] > found[2]


# --- TAR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tamper", ["entropy", "first"])
def test_tars_gradient_is_that_behind_the_adversary(tamper: Any) -> None:
    method = TAR(tamper=tamper, strength=3.0, hold=0.0, adversary_steps=2, **BRIEF)
    model, part = editable(method), topic()
    state = method.setup(model, part)
    forget, (attacked,) = method.prepared(part).forget[0], part.forget[1:]
    here = values(model)
    module = copy.deepcopy(model.module)
    terms = method.loss(model, state, forget, part.retain[0], 0)
    assert same(here, values(model))
    optimiser = adamw(module, method.adversary_learning_rate)
    for _ in range(2):
        step(optimiser, mean_nll(logits(module, attacked), attacked["labels"]).value)
    if tamper == "first":
        other = EditableModel(module, ("*",))
        cost = token_mse(
            other.hidden(forget, SRMU(layer=LAYER).site), state.tensors["target"], is_counted(forget["labels"])
        ).value
    else:
        p = logits(module, forget)[:, :-1].softmax(-1)
        cost = (p * p.log()).sum(-1)[is_predicted(forget["labels"])].mean()
    wanted = pytest.approx(3 * float(cost.detach()), rel=1e-3)
    assert float(terms.loss_values["forget"].detach()) == wanted
    (3.0 * cost).backward()
    got = torch.autograd.grad(
        terms.loss_values["forget"], [*model.trained.values()], materialize_grads=True, allow_unused=True
    )
    want = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    size = max(float(g.abs().max()) for g in want)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3 * size)


def test_tars_adversary_learns_other_batches_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    method = TAR(adversary_steps=2, **BRIEF)
    whole = topic()
    part = replace(whole, forget=[*whole.forget, *whole.retain, whole.forget[0]])  # five batches
    model = editable(method)
    state = method.setup(model, part)
    learned: list[list[Any]] = []
    monkeypatch.setattr(
        "srmu.methods.tar.fine_tune", lambda model, texts, steps, rate: learned.append([id(b) for b in texts.forget])
    )
    for turn in range(3):
        method.loss(model, state, part.forget[0], part.retain[0], turn)
    odd, even = id(part.forget[1]), id(part.forget[3])
    assert learned == [[odd, even]] * 3
    assert [id(b) for b in method.prepared(part).forget] == [id(b) for b in part.forget[::2]]
    assert state.memory["turn"] == 3


# --- unlearn and relearn -------------------------------------------------------------------------


def test_rounds_by_hand() -> None:
    method = Iterated(rounds=2, relearn_steps=2, hold=1.0, **BRIEF)
    model, other, part = editable(method), editable(method), topic()
    with method.editing(model, [part]):
        method.setup(model, part)
        assert {n for n, p in model.trained.items() if p.requires_grad} == WINDOW
    assert all(p.requires_grad for p in model.trained.values())
    for _ in range(2):
        Suppressing.suppress(method, other, part)
        fine_tune(other, part, 2, method.relearn_learning_rate, 1.0)
    assert same(values(model), values(other))


def test_the_last_round_changes_the_window_only() -> None:
    method, part = Iterated(rounds=1, relearn_steps=2, **BRIEF), topic()
    before = editable(method)
    with method.editing(before, [part]):
        method.setup(before, part)
    after = editable(method)
    method.apply(after, [part], Session(TrainOptions(max_steps=3, learning_rate=1e-3), lambda *row: None))
    one, two = values(before), values(after)
    assert {name for name in one if not torch.equal(one[name], two[name])} == WINDOW


# --- several layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["srmu", "rmu"])
def test_the_loss_is_the_mean_over_layers(target: Any) -> None:
    method = MultiSite(target=target, layers=(0, 2), window=2, kappa=4.0, alpha=10.0)
    model, part = moved(editable(method)), topic()
    state = method.setup(model, part)
    terms = method.loss(model, state, part.forget[0], part.retain[0], 1)
    cls = SRMU if target == "srmu" else RMU
    rows = []
    for layer in (0, 2):
        alone = cls(layer=layer, window=min(2, layer + 1), kappa=4.0, alpha=10.0)
        rows.append(alone.loss(model, alone.setup(model, part), part.forget[0], part.retain[0], 1).loss_values)
    for key in ("forget", "retain"):
        want = sum(float(row[key].detach()) for row in rows) / 2
        assert float(terms.loss_values[key].detach()) == pytest.approx(want, rel=1e-6)
    assert {key.partition("/")[0] for key in state.tensors} == {"0", "2"}
    assert set(method.trainable) == {"0.mlp_down", "1.mlp_down", "2.mlp_down"}


@pytest.mark.parametrize(("count", "layers"), [(32, (10, 20, 31)), (6, (1, 3, 5)), (4, (0, 2, 3)), (1, (0,))])
def test_layers_where_none_are_named(count: int, layers: tuple[int, ...]) -> None:
    method = MultiSite().resolved(SimpleNamespace(num_hidden_layers=count))
    assert method.layers == layers
    assert method.depth == count
    with pytest.raises(SrmuError, match="layer"):
        MultiSite(layers=(count,)).resolved(SimpleNamespace(num_hidden_layers=count))


# --- before a run --------------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", ["undo", "tar", "iterated", "rmu_lat", "multi_site"])
def test_a_plan_says_what_they_cost(name: str, tmp_path: Any, monkeypatch: Any) -> None:
    """More than as many steps of the method without what they do besides."""
    monkeypatch.setattr("srmu.runs.counting.measure_speed", lambda *_: 1e9)
    save_pico(tmp_path / "model")
    write_jsonl(tmp_path / "f.jsonl", texts(8, 1))
    write_jsonl(tmp_path / "r.jsonl", texts(8, 2))
    found = []
    more = {
        "undo": "method.teacher_steps={}", "tar": "method.adversary_steps={}",
        "iterated": "method.rounds={}", "rmu_lat": "method.adversary_steps={}",
        "multi_site": "method.layers={}",
    }[name]  # fmt: skip
    for value in ("[2]", "[0,1,2]") if name == "multi_site" else (1, 99):
        sources = [tmp_path / "f.jsonl", tmp_path / "r.jsonl"]
        plan = run.plan_run(make_config(str(tmp_path / "model"), *sources, name, [more.format(value)]))
        topics = run.load_topics(plan.config, run.load_tokenizer(tmp_path / "model"))
        found.append(estimate.estimate_run(plan, topics)["flops"])
    assert found[1] > 1.2 * found[0]
