"""The training loop: closed forms of its steps, and what it leaves behind when it stops."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import VOCABULARY, pico_module, texts, word_tokenizer
from srmu.data import Topic, batch_up, tokenise
from srmu.errors import Diverged, UserError
from srmu.methods import RMU, SRMU
from srmu.model import EditableModel
from srmu.train import Terms, TrainOptions, fit

STEPS = 6


def topic(name: str = "bio") -> Topic:
    tokenizer = word_tokenizer()
    forget, retain = (
        list(batch_up(tokenise(texts(4, seed), tokenizer, 64), tokenizer, 2, "mask"))
        for seed in (1, 2)
    )
    return Topic(name, forget, retain, vocabulary=torch.arange(4, VOCABULARY))


def editable(dtype: torch.dtype = torch.float32) -> EditableModel:
    return EditableModel(pico_module(dtype=dtype), ["0.mlp_down", "1.mlp_down"], 2)


def linear(model: EditableModel, slope: float = 1.0) -> Callable[..., Terms]:
    """A loss whose gradient is `slope` in every element, so that each Adam step is the rate."""

    def loss(forget: Any, retain: Any, step: int) -> Terms:
        total = sum(p.float().sum() for p in model.trained.values())
        return Terms({"forget": slope * total}, {"extra": torch.tensor(2.5)})

    return loss


Weights = list[list[torch.Tensor]]


def train(
    model: EditableModel,
    loss: Callable[..., Terms],
    topics: int = 1,
    history: Weights | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], Weights]:
    """What was logged, and the weights after each step (the first entry: before any)."""
    logged: list[dict[str, Any]] = []
    history = [] if history is None else history
    history.append([p.detach().clone() for p in model.trained.values()])

    def log(step: int, values: dict[str, Any]) -> None:
        logged.append({"step": step} | values)
        history.append([p.detach().clone() for p in model.trained.values()])

    parts = [(topic(name), loss) for name in ("bio", "cyber")[:topics]]
    fit(model, parts, TrainOptions(**{"learning_rate": 1e-3, "max_steps": STEPS} | options), log)
    return logged, history


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [1.0, -3.0])
def test_adam_steps_by_the_learning_rate(slope: float) -> None:
    """A constant gradient: each step moves every weight by learning_rate against its sign."""
    model = editable()
    logged, weights = train(model, linear(model, slope))
    for step in range(STEPS):
        for before, after in zip(weights[step], weights[step + 1], strict=True):
            expected = torch.full_like(after, -1e-3 if slope > 0 else 1e-3)
            torch.testing.assert_close(after - before, expected, rtol=0, atol=1e-6)
    count = sum(p.numel() for p in model.trained.values())
    assert logged[0]["grad_norm"] == pytest.approx(abs(slope) * count**0.5, rel=1e-5)


def test_float32_masters_keep_small_steps_of_bf16_weights() -> None:
    """Below 1 the bf16 numbers are 2^-8 apart: steps of 0.001 round away unless a float32 copy
    keeps them; five of them reach 0.995, which rounds to 1 - 2^-8."""
    ends = {}
    for weights in ("fp32", "bf16"):
        model = editable(torch.bfloat16)
        for parameter in model.trained.values():
            parameter.data.fill_(1.0)
        _, history = train(model, linear(model), max_steps=5, weights=weights)
        ends[weights] = [{float(t[0].unique()) for t in tensors} for tensors in history]
        assert all(p.dtype == torch.bfloat16 for p in model.trained.values())
    assert all(values == {1.0} for values in ends["bf16"])
    # 0.999 -> 1; 0.998 -> 1 - 2^-8 or 1 (1 - 0.002 is nearer to 1 - 0.0039 than to 1)
    near = [1.0 if k * 1e-3 < 2**-9 else 1 - 2**-8 for k in range(6)]
    assert [values.pop() for values in ends["fp32"]] == near


def test_masters_of_bf16_equal_a_float32_run_that_is_rounded() -> None:
    """A gradient that does not depend on the weights: the same steps as in float32."""
    wide, narrow = editable(), editable(torch.bfloat16)
    for name, parameter in wide.trained.items():
        parameter.data.copy_(narrow.trained[name])
    _, one = train(wide, linear(wide))
    _, other = train(narrow, linear(narrow))
    for step in range(STEPS + 1):
        assert same([t.bfloat16() for t in one[step]], other[step])


def test_bf16_weights_need_a_bf16_model() -> None:
    model = editable()
    with pytest.raises(UserError, match=r"weights=bf16 needs a bf16 model.*float32.*dtype"):
        train(model, linear(model), weights="bf16")
    assert model.delta() == {}


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_max_grad_norm_scales_the_whole_gradient(limit: float) -> None:
    """With Adam's epsilon at 1 the first step is lr * g / (g + 1) for a gradient g > 0."""
    model = editable()
    logged, weights = train(
        model, linear(model), max_steps=1, adam_epsilon=1.0, max_grad_norm=limit
    )
    count = sum(p.numel() for p in model.trained.values())
    g = min(1.0, limit / count**0.5)
    for before, after in zip(*weights, strict=True):
        expected = torch.full_like(after, -1e-3 * g / (g + 1))
        torch.testing.assert_close(after - before, expected, rtol=0, atol=6e-8)
    assert logged[0]["grad_norm"] == pytest.approx(count**0.5, rel=1e-5)  # before the clipping


def test_weight_decay_shrinks_the_weights() -> None:
    """AdamW: w <- w (1 - lr * decay) beside the step; no decay unless it is asked for."""
    model = editable()
    _, weights = train(model, linear(model), max_steps=1, weight_decay=0.5)
    for before, after in zip(*weights, strict=True):
        torch.testing.assert_close(after, before * (1 - 0.5e-3) - 1e-3, rtol=0, atol=1e-6)
    assert TrainOptions().weight_decay == 0


@pytest.mark.parametrize("topics", [1, 2])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_log_gets_one_call_a_step(topics: int, steps: int) -> None:
    model = editable()
    logged, _ = train(model, linear(model), topics, max_steps=steps)
    assert [row["step"] for row in logged] == list(range(steps))
    assert [row["topic"] for row in logged] == [("bio", "cyber")[i % topics] for i in range(steps)]
    for row in logged:
        assert set(row) == {"step", "topic", "loss", "forget", "extra", "grad_norm"}
        assert row["extra"] == 2.5
        assert all(isinstance(v, float) for k, v in row.items() if k not in ("step", "topic"))


def test_losses_are_summed_and_logged_numbers_are_not() -> None:
    model = editable()

    def loss(*_: Any) -> Terms:
        first, second = (p.float().sum() for p in model.trained.values())
        return Terms({"one": first, "two": 2 * second}, {"three": first.detach() * 100})

    logged, weights = train(model, loss, max_steps=1)
    one, two = (t.double().sum().item() for t in weights[0])
    assert logged[0]["loss"] == pytest.approx(one + 2 * two, rel=1e-4, abs=1e-4)
    assert logged[0]["three"] == pytest.approx(100 * one, rel=1e-4, abs=1e-2)


# --- stops ---------------------------------------------------------------------------------------

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("step", "place"),
    [
        (0, "step 0, topic bio, batch 0"),
        (1, "step 1, topic cyber, batch 0"),
        (4, "step 4, topic bio, batch 2"),
    ],
)
def test_a_loss_that_is_not_finite(step: int, place: str, bad: float, dtype: torch.dtype) -> None:
    """The model holds the last weights whose loss was finite: those before the last update."""
    model, history = editable(dtype), []
    plain = linear(model)

    def loss(forget: Any, retain: Any, now: int) -> Terms:
        terms = plain(forget, retain, now)
        return Terms({"forget": terms.losses["forget"] * (bad if now == step else 1)}, {})

    with pytest.raises(Diverged, match=rf"the loss is not finite at {place}.*train.learning_rate"):
        train(model, loss, 2, history, learning_rate=0.05)
    assert len(history) == step + 1  # one for the start, one a finished step
    assert same(list(model.trained.values()), history[max(step - 1, 0)])
    if step > 1:
        assert not same(list(model.trained.values()), history[step])


@each_dtype
@pytest.mark.parametrize("step", [0, 3])
def test_a_gradient_that_is_not_finite(step: int, dtype: torch.dtype) -> None:
    """The loss of these weights is finite, so they stay as they are, unharmed."""
    model, history = editable(dtype), []
    plain = linear(model)

    def loss(forget: Any, retain: Any, now: int) -> Terms:
        terms = plain(forget, retain, now)
        if now == step:  # sqrt has an infinite slope at 0
            zero = sum((0 * p.float()).sum() for p in model.trained.values())
            terms.losses["spike"] = zero.abs().sqrt()
        return terms

    with pytest.raises(Diverged, match=f"gradient is not finite at step {step}, topic bio, batch"):
        train(model, loss, 1, history, learning_rate=0.05)
    assert len(history) == step + 1
    assert same(list(model.trained.values()), history[step])
    assert all(p.isfinite().all() for p in model.trained.values())


@each_dtype
def test_weights_that_are_not_finite_after_the_last_step(dtype: torch.dtype) -> None:
    """Twelve steps of 3e37 leave the range of float32; the eleventh's weights come back."""
    model, history = editable(dtype), []

    def loss(*_: Any) -> Terms:  # always 0, with a gradient of 1
        return Terms({"forget": sum((p - p.detach()).sum() for p in model.trained.values())}, {})

    with pytest.raises(
        Diverged, match="the weights are not finite after step 11, topic bio, batch 11"
    ):
        train(model, loss, 1, history, max_steps=12, learning_rate=3e37)
    assert not history[12][0].isfinite().any()
    assert same(list(model.trained.values()), history[11])
    assert history[11][0].isfinite().all()


@pytest.mark.parametrize("method", [RMU(layer=2), SRMU(layer=2)], ids=lambda m: m.name)
def test_a_run_that_explodes_leaves_a_working_model(method: Any) -> None:
    model = EditableModel(pico_module(), method.trainable, method.depth)
    history = []

    def log(*_: Any) -> None:
        history.append({n: p.detach().clone() for n, p in model.trained.items()})

    options = TrainOptions(learning_rate=1e25, max_steps=10)
    with pytest.raises(Diverged, match="not finite at step 1"):
        method.apply(model, [topic()], options, log)
    assert len(history) == 1
    assert model.delta() == {}  # the first update did the harm


def test_diverged_is_a_users_error() -> None:
    assert issubclass(Diverged, UserError)


def test_a_loss_that_does_not_reach_the_trained_tensors() -> None:
    model = editable()
    first = next(iter(model.trained.values()))
    with pytest.raises(UserError, match="wrong layer or window"):
        train(model, lambda *_: Terms({"forget": first.sum()}, {}))
    assert model.delta() == {}


# --- around --------------------------------------------------------------------------------------


def test_a_run_leaves_the_global_random_state_alone() -> None:
    method = SRMU(layer=2, direction="resampled", anchors="random")
    np.random.seed(1)
    torch.manual_seed(1)
    model = EditableModel(pico_module(), method.trainable, method.depth)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    method.apply(model, [topic()], TrainOptions(max_steps=3), lambda *_: None)
    after = np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((n, value) for n in ("learning_rate", "max_steps", "batch_size") for value in (0, -1)),
        ("learning_rate", float("nan")),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("weight_decay", -0.1),
        ("adam_epsilon", -1e-8),
    ],
)
def test_train_options_that_make_no_sense(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"train.{option}"):
        TrainOptions(**{option: value})


def test_train_options_are_frozen_and_hashable() -> None:
    options = TrainOptions()
    assert {options, replace(options)} == {options}
    with pytest.raises(AttributeError):
        options.max_steps = 3  # type: ignore[misc]
