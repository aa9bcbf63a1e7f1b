"""The training loop: closed forms of its steps, and what it leaves behind when it stops."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers.models import VOCABULARY, pico_module, save_pico, texts, word_tokenizer
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine.losses import mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.rounding import QUANTISERS
from srmu.engine.stopping import CHECKED_BATCHES
from srmu.engine.topic import Topic
from srmu.engine.train import FINISHED, Terms, TrainOptions, fit_model
from srmu.errors import DivergedError, SrmuError
from srmu.methods import METHODS, RMU, SRMU
from srmu.methods.base import Session
from srmu.runs.config import make_config
from srmu.runs.run import unlearn_config

STEPS = 6


def topic(name: str = "bio") -> Topic:
    tokenizer = word_tokenizer()
    forget, retain = (
        list(batch_rows(tokenise_texts(texts(4, seed), tokenizer, 64), tokenizer, 2, "mask")) for seed in (1, 2)
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
    model: EditableModel, loss: Callable[..., Terms], topics: int = 1, history: Weights | None = None, **options: Any
) -> tuple[list[dict[str, Any]], Weights]:
    """What was logged, and the weights after each step (the first entry: before any)."""
    logged: list[dict[str, Any]] = []
    history = [] if history is None else history
    history.append([p.detach().clone() for p in model.trained.values()])

    def log(step: int, values: dict[str, Any]) -> None:
        logged.append({"step": step} | values)
        history.append([p.detach().clone() for p in model.trained.values()])

    parts = [(topic(name), loss) for name in ("bio", "cyber")[:topics]]
    fit_model(model, parts, TrainOptions(**{"learning_rate": 1e-3, "max_steps": STEPS} | options), log)
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


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ("cosine", [0, 1 / 3, 2 / 3, 1, 3 / 4, 1 / 4]),
    ],
)
def test_the_rate_rises_and_then_stays_or_falls(schedule: Any, shares: list[float]) -> None:
    """As transformers' schedules: from 0 over `warmup_steps` to the whole rate, then to 0 or level."""
    model, steps = editable(), len(shares)
    options = {"schedule": schedule, "warmup_steps": 3, "max_steps": steps}
    _, weights = train(model, linear(model, 1.0), **options)
    for share, before, after in zip(shares, weights, weights[1:], strict=False):
        for old, new in zip(before, after, strict=True):
            expected = torch.full_like(new, -1e-3 * share)
            torch.testing.assert_close(new - old, expected, rtol=0, atol=1e-6)
    theirs = transformers.get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        torch.optim.SGD([torch.zeros(1)], lr=1e-3),
        num_warmup_steps=3,
        num_training_steps=steps,
    )
    for step in range(steps):
        rate = TrainOptions(learning_rate=1e-3, **options).rate(step)
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-6), step
        theirs.optimizer.step()
        theirs.step()


def old_adamw(gradients: list[float], weight: float, rate: float, epsilon: float) -> list[float]:
    """transformers' former AdamW of one weight, in plain numbers: epsilon beside the root of v as it is."""
    m = v = 0.0
    weights = []
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        weight -= rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + epsilon)
        weights.append(weight)
    return weights


@pytest.mark.parametrize("size", [2e-7, 2e-5, 2e-4, 1.0])
def test_epsilon_beside_the_uncorrected_root_is_the_former_adamw(size: float) -> None:
    """With gradients as small as those of RMU the first steps are up to 1 / sqrt(0.001) times smaller."""
    slopes = [1.0, -0.5, 2.0, 0.25]
    moves = {}
    for form in ("torch", "transformers"):
        model = editable()
        for parameter in model.trained.values():
            parameter.data.zero_()

        def loss(forget: Any, retain: Any, step: int, model: Any = model) -> Terms:
            return Terms({"forget": sum(size * slopes[step] * p.sum() for p in model.trained.values())}, {})

        options = {"max_steps": len(slopes), "adam_epsilon": 1e-6, "adam_epsilon_form": form}
        _, history = train(model, loss, **options)
        assert all(t.unique().numel() == 1 for tensors in history for t in tensors)
        moves[form] = [float(tensors[0].flatten()[0]) for tensors in history[1:]]
    expected = old_adamw([size * slope for slope in slopes], 0.0, 1e-3, 1e-6)
    assert moves["transformers"] == pytest.approx(expected, rel=1e-5)
    ratio = moves["torch"][0] / moves["transformers"][0]
    assert ratio == pytest.approx((size + 1e-6 / 0.001**0.5) / (size + 1e-6), rel=1e-3)  # 27 at 2e-7


@pytest.mark.parametrize("steps", [-1, 20])
def test_a_warm_up_ends_before_the_training_does(steps: int) -> None:
    with pytest.raises(SrmuError, match=rf"warmup_steps must be .* below train.max_steps=20, not {steps}"):
        TrainOptions(warmup_steps=steps, max_steps=20)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*QUANTISERS])
def test_training_through_a_quantiser_equals_a_loop(kind: Any, dtype: torch.dtype) -> None:
    """After the first step the loss sees rounded weights, its gradient goes to the others (straight through)."""

    def loss_of(weights: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum((w.float() ** 2 * (i + 1)).sum() for i, w in enumerate(weights))  # type: ignore[return-value]

    model = editable(dtype)
    given = [p.detach().clone() for p in model.trained.values()]
    options = {"quantise_aware": kind, "max_steps": 3, "learning_rate": 0.01}
    train(model, lambda *_: Terms({"forget": loss_of([*model.trained.values()])}, {}), **options)

    masters = [torch.nn.Parameter(w.float()) for w in given]
    optimiser = torch.optim.AdamW(masters, lr=0.01, weight_decay=0.0)
    seen = given
    for _ in range(3):
        leaves = [w.detach().requires_grad_() for w in seen]
        gradients = torch.autograd.grad(loss_of(leaves), leaves)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        optimiser.step()
        seen = [QUANTISERS[kind].round_matrix(m.detach().to(dtype).float()).to(dtype) for m in masters]
    assert same([*model.trained.values()], [m.detach().to(dtype) for m in masters])
    assert not same(seen, [m.detach().to(dtype) for m in masters])


def test_only_matrices_are_rounded() -> None:
    model = EditableModel(pico_module(), ["*"])
    with pytest.raises(
        SrmuError, match=r"train.quantise_aware=q4_0 rounds whole matrices, and .*norm.weight is not one"
    ):
        train(model, linear(model), quantise_aware="q4_0")


def test_bf16_weights_need_a_bf16_model() -> None:
    model = editable()
    with pytest.raises(SrmuError, match=r"weights=bf16 needs a bf16 model.*float32.*dtype"):
        train(model, linear(model), weights="bf16")
    assert model.delta() == {}


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_max_grad_norm_scales_the_whole_gradient(limit: float) -> None:
    """With Adam's epsilon at 1 the first step is lr * g / (g + 1) for a gradient g > 0."""
    model = editable()
    logged, weights = train(model, linear(model), max_steps=1, adam_epsilon=1.0, max_grad_norm=limit)
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
    [(0, "step 0, topic bio, batch 0"), (1, "step 1, topic cyber, batch 0"), (4, "step 4, topic bio, batch 2")],
)
def test_a_loss_that_is_not_finite(step: int, place: str, bad: float, dtype: torch.dtype) -> None:
    """The model holds the last weights whose loss was finite: those before the last update."""
    model, history = editable(dtype), []
    plain = linear(model)

    def loss(forget: Any, retain: Any, now: int) -> Terms:
        terms = plain(forget, retain, now)
        return Terms({"forget": terms.losses["forget"] * (bad if now == step else 1)}, {})

    with pytest.raises(DivergedError, match=rf"the loss is not finite at {place}.*train.learning_rate"):
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

    with pytest.raises(DivergedError, match=f"gradient is not finite at step {step}, topic bio, batch"):
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

    with pytest.raises(DivergedError, match="the weights are not finite after step 11, topic bio, batch 11"):
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
    with pytest.raises(DivergedError, match="not finite at step 1"):
        method.apply(model, [topic()], Session(options, log))
    assert len(history) == 1
    assert model.delta() == {}  # the first update did the harm


def test_diverged_is_a_users_error() -> None:
    assert issubclass(DivergedError, SrmuError)


def test_a_loss_that_does_not_reach_the_trained_tensors() -> None:
    model = editable()
    with pytest.raises(SrmuError, match="wrong layer or window"):
        train(model, lambda *_: Terms({"forget": torch.ones(())}, {}))
    assert model.delta() == {}


def test_a_loss_that_reaches_some_of_the_trained_tensors() -> None:
    """Of a whole model some tensors may take no part; the others are trained."""
    model = editable()
    first = next(iter(model.trained))
    train(model, lambda *_: Terms({"forget": model.trained[first].sum()}, {}), weight_decay=0.1)
    assert list(model.delta()) == [first]


# --- stop rules ----------------------------------------------------------------------------------

LN_V = math.log(VOCABULARY)
GA, GRADDIFF, NPO = METHODS["ga"], METHODS["graddiff"], METHODS["npo"]


@pytest.fixture(scope="module")
def taught() -> Any:
    """A pico model that has learnt the texts of `topic`, both roles alike."""
    model = EditableModel(pico_module(), ["*"])

    def loss(forget: Any, retain: Any, step: int) -> Terms:
        parts = (mean_nll(model.logits(batch), batch["labels"]) for batch in (forget, retain))
        return Terms(dict(zip(("one", "other"), parts, strict=True)), {})

    fit_model(model, [(topic(), loss)], TrainOptions(learning_rate=3e-3, max_steps=60), lambda *_: None)
    return model.module.requires_grad_(False)


class Stopped:
    """A run of a method on a taught model: why it ended, rows, weights before and after steps."""

    def __init__(self, module: Any, method: Any = None, topics: Sequence[Topic] = (), **options: Any) -> None:
        method = method or GA()
        self.model = EditableModel(copy.deepcopy(module), method.trainable)
        self.rows: list[dict[str, Any]] = []
        self.weights = [self.now()]

        def log(step: int, values: dict[str, Any]) -> None:
            self.rows.append(values)
            self.weights.append(self.now())

        train = TrainOptions(**{"learning_rate": 1e-3, "max_steps": 20} | options)
        self.reason = method.apply(self.model, topics or [topic()], Session(train, log)).stop_reason

    def now(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.trained.values()]


def nats(module: Any, batches: Sequence[Any]) -> list[float]:
    """What each next token of the batches costs, in a loop over them."""
    found = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask == 1]
            with torch.no_grad():
                log_p = module(input_ids=row[None]).logits[0].double().log_softmax(-1)
            found += [-float(log_p[i, token]) for i, token in enumerate(row[1:])]
    return found


def divergences(one: Any, other: Any, batches: Sequence[Any]) -> list[float]:
    """KL(one || other) at each place where they predict a token, in a loop over them."""
    found = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask == 1][None]
            with torch.no_grad():
                p, q = (m(input_ids=row).logits[0, :-1].double().log_softmax(-1) for m in (one, other))
            found += [float(sum(a.exp() * (a - b))) for a, b in zip(p, q, strict=True)]
    return found


@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_without_an_end_is_stopped_at_the_logarithm_of_the_vocabulary(every: int, taught: Any) -> None:
    """There a model knows no more than one that guesses."""
    got = Stopped(taught, check_every=every)
    measured = {i: row["forget_nll"] for i, row in enumerate(got.rows) if "forget_nll" in row}
    assert list(measured) == list(range(every - 1, len(got.rows), every))
    *before, last = measured.values()
    assert all(value < LN_V for value in before) and last >= LN_V
    assert len(before) > 0 and len(got.rows) < 20
    assert got.reason == (
        f"forget_ceiling: {last:.3g} nats a forget token after step {len(got.rows) - 1} (train.forget_ceiling=4.16)"
    )
    assert same(got.now(), got.weights[-1])  # what was asked for: nothing is put back


def test_which_runs_have_a_ceiling(taught: Any) -> None:
    """Those of an endless loss, unless it is switched off, and those that ask for one."""
    endless = {name for name, cls in METHODS.items() if cls.endless}
    assert endless >= {"ga", "graddiff"} and not endless & {"npo", "srmu"}
    never = Stopped(taught, forget_ceiling=float("inf"))
    assert (never.reason, len(never.rows)) == (FINISHED, 20)
    bounded = Stopped(taught, NPO(), max_steps=5)
    assert bounded.reason == FINISHED
    assert not any("forget_nll" in row for row in bounded.rows)
    asked = Stopped(taught, NPO(), forget_ceiling=1.0, check_every=1)
    assert asked.reason.startswith("forget_ceiling: ") and "ceiling=1)" in asked.reason
    assert asked.rows[-1]["forget_nll"] >= 1 > asked.rows[-2]["forget_nll"]


@pytest.mark.parametrize("steps", [1, 4, 5, 7])
def test_a_short_run_is_measured_at_its_end(steps: int, taught: Any) -> None:
    got = Stopped(taught, forget_ceiling=1e9, max_steps=steps, check_every=5)
    measured = [i for i, row in enumerate(got.rows) if "forget_nll" in row]
    assert measured == sorted({*range(4, steps, 5), steps - 1})


def test_what_is_measured_equals_a_loop(taught: Any) -> None:
    """Token-weighted, over the first batches of each topic, of two roles and two topics."""
    tokenizer = word_tokenizer()

    def some(name: str, seed: int) -> Topic:
        forget, retain = (
            list(batch_rows(tokenise_texts(texts(count, s), tokenizer, 64), tokenizer, 2, "mask"))
            for count, s in ((12, seed), (11, seed + 1))
        )
        assert len(forget) == len(retain) == 6 > CHECKED_BATCHES
        return Topic(name, forget, retain, vocabulary=torch.arange(4, VOCABULARY))

    topics = [some("bio", 1), some("cyber", 5)]
    got = Stopped(
        taught, GRADDIFF(), topics, max_steps=3, check_every=3,
        forget_ceiling=1e9, kl_budget=1e9,
    )  # fmt: skip
    row, now = got.rows[-1], got.model.module
    forget, retain = ([b for t in topics for b in getattr(t, r)[:4]] for r in ("forget", "retain"))
    kl = divergences(taught, now, retain)
    assert row["forget_nll"] == pytest.approx(np.mean(nats(now, forget)), rel=1e-5)
    assert row["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert row["kl"] > 0.01  # something was there to measure
    assert got.reason == FINISHED


@pytest.mark.parametrize("method", [GA(), GA(lora_rank=4)], ids=["whole", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_limit_puts_the_weights_back(method: Any, dtype: torch.dtype, taught: Any) -> None:
    """To those of the last measurement that kept the limit, bit for bit."""
    module = copy.deepcopy(taught).to(dtype)
    rate = 3e-3 if method.lora_rank else 1e-3
    options = {"learning_rate": rate, "check_every": 2, "forget_ceiling": float("inf")}
    got = Stopped(module, method, **options, kl_budget=0.4)
    measured = [(i, row["kl"]) for i, row in enumerate(got.rows) if "kl" in row]
    kept, (last, broken) = measured[-2][0], measured[-1]
    held = [value <= 0.4 for _, value in measured]
    assert held == [True] * (len(held) - 1) + [False]
    assert last == len(got.rows) - 1 < 19
    said = f"kl_budget: kl {broken:.3g} after step {last} (train.kl_budget=0.4); put back to step {kept}"
    assert got.reason == said
    # A run that ends there gives the same, by itself.
    short = Stopped(module, method, **{**options, "max_steps": kept + 1})
    assert short.model.delta().keys() == got.model.delta().keys() != set()
    assert same(list(short.model.delta().values()), list(got.model.delta().values()))
    if not method.lora_rank:
        assert same(got.now(), got.weights[kept + 1])


@pytest.mark.parametrize("method", [GA(), GA(lora_rank=4)], ids=["whole", "adapters"])
def test_a_limit_broken_at_once_puts_back_the_start(method: Any, taught: Any) -> None:
    got = Stopped(taught, method, check_every=1, learning_rate=1e-2, kl_budget=1e-6)
    assert got.reason.endswith("put back to the start")
    assert len(got.rows) == 1
    assert got.model.delta() == {}


def test_measuring_changes_nothing(taught: Any) -> None:
    plain = Stopped(taught, GRADDIFF(), max_steps=6, forget_ceiling=float("inf"))
    rules = {"forget_ceiling": 1e9, "kl_budget": 1e9, "check_every": 1}
    watched = Stopped(taught, GRADDIFF(), max_steps=6, **rules)
    assert all(same(*pair) for pair in zip(plain.weights, watched.weights, strict=True))
    assert [row["loss"] for row in plain.rows] == [row["loss"] for row in watched.rows]


@pytest.mark.parametrize("rule", [{}, {"forget_ceiling": float("inf")}, {"kl_budget": 1.0}])
@pytest.mark.parametrize("rate", [1e30, 3e37])
def test_measurements_that_are_not_numbers(rule: Any, rate: float, taught: Any) -> None:
    """A model that gives no numbers is no forgetting: the last good weights come back."""
    model = EditableModel(copy.deepcopy(taught), ["*"])
    options = TrainOptions(learning_rate=rate, max_steps=3, check_every=1, **rule)
    with pytest.raises(DivergedError, match=r"not a number after step 0, topic bio.*lower train"):
        GA().apply(model, [topic()], Session(options, lambda *_: None))
    assert model.delta() == {}


def test_a_limit_on_retain_texts_needs_some() -> None:
    some, train = replace(topic(), retain=[]), TrainOptions(kl_budget=0.5)
    with pytest.raises(SrmuError, match=r"train\.kl_budget .*name them: retain, or topics\.bio\.retain"):
        GA().check([topic("cyber"), some], train)
    GA().check([topic()], train)
    GA().check([some], TrainOptions(forget_ceiling=3.0))


@pytest.mark.slow
def test_a_stopped_run_is_recorded_and_exported(workplace: Path) -> None:
    """It is no failure: it may be run again, which finds it, and written as a checkpoint."""

    def config(*given: str) -> Any:
        options = [f"runs_dir={workplace / 'runs'}", "train.learning_rate=1e-3", *given]
        sources = [workplace / "forget.jsonl", workplace / "retain.jsonl"]
        return make_config(str(workplace / "model"), *sources, "npo", options)

    stops = config("train.kl_budget=0.5", "train.check_every=1")
    run = unlearn_config(stops, out=workplace / "out")
    reason = run.record["stop_reason"]
    assert reason.startswith("kl_budget: kl ") and "put back to step " in reason
    assert run.record["diverged"] is False
    assert 1 < run.record["steps"] < 150
    assert (workplace / "out" / "config.json").exists()
    assert unlearn_config(stops).record == run.record
    with pytest.raises(SrmuError, match=r"nothing is left of 1 steps \(kl_budget: "):
        unlearn_config(config("train.kl_budget=1e-9", "train.check_every=1", "train.learning_rate=0.1"))
    assert len(list((workplace / "runs").iterdir())) == 1


def test_norms_that_are_too_coarse_to_move_are_no_failure(tmp_path: Path) -> None:
    """Below 1 bf16 numbers are 2^-8 apart: a few steps of 1e-5 do not move a norm's weight."""
    save_pico(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "forget.txt").write_text("\n".join(texts(4, 1)))
    options = [f"runs_dir={tmp_path / 'runs'}", "train.max_steps=3"]
    model = str(tmp_path / "model")
    run = unlearn_config(make_config(model, tmp_path / "forget.txt", method="npo", overrides=options))
    assert "model.layers.2.mlp.down_proj.weight" in run.delta
    assert "model.norm.weight" not in run.delta


# --- around --------------------------------------------------------------------------------------


def test_a_run_leaves_the_global_random_state_alone() -> None:
    method = SRMU(layer=2, direction="resampled", anchors="random")
    np.random.seed(1)
    torch.manual_seed(1)
    model = EditableModel(pico_module(), method.trainable, method.depth)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    method.apply(model, [topic()], Session(TrainOptions(max_steps=3, learning_rate=1e-5), lambda *_: None))
    after = np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((n, value) for n in ("learning_rate", "max_steps", "batch_size") for value in (0, -1)),
        *((n, value) for n in ("forget_ceiling", "kl_budget", "check_every") for value in (0, -1)),
        *((n, float("nan")) for n in ("forget_ceiling", "kl_budget")),
        ("learning_rate", float("nan")),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("weight_decay", -0.1),
        ("adam_epsilon", -1e-8),
    ],
)
def test_train_options_that_make_no_sense(option: str, value: float) -> None:
    with pytest.raises(SrmuError, match=f"train.{option}"):
        TrainOptions(**{option: value})


def test_train_options_are_frozen_and_hashable() -> None:
    options = TrainOptions()
    assert {options, replace(options)} == {options}
    with pytest.raises(AttributeError):
        options.max_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("options", [{"name": "ssd"}, {"name": "whp", "mode": "logits"}])
def test_rules_that_nothing_could_obey_are_refused(options: dict[str, Any], workplace: Path) -> None:
    config = make_config(
        str(workplace / "model"), workplace / "forget.jsonl", workplace / "retain.jsonl",
        options["name"],
        [f"method.{k}={v}" for k, v in options.items()] + ["train.kl_budget=1"],
    )  # fmt: skip
    with pytest.raises(SrmuError, match="kl_budget has no effect"):
        unlearn_config(config)


def test_a_rule_broken_at_once_says_what_to_do(workplace: Path) -> None:
    config = make_config(
        str(workplace / "model"), workplace / "forget.jsonl", workplace / "retain.jsonl", "ga",
        ["train.learning_rate=0.1", "train.kl_budget=1e-6", f"runs_dir={workplace / 'runs'}",
         "train.forget_ceiling=.inf"],
    )  # fmt: skip
    with pytest.raises(SrmuError, match=r"lower train\.learning_rate or"):
        unlearn_config(config)
    assert not (workplace / "runs").exists()


# --- a retain loss that runs away ---------------------------------------------------------------


def spiking(model: EditableModel, values: dict[int, float], usual: float = 0.01) -> Any:
    """A loss whose retain term is `usual`, but for some steps."""

    def loss(forget: Any, retain: Any, step: int) -> Terms:
        total = sum(p.float().sum() for p in model.trained.values())
        kept = torch.tensor(values.get(step, usual))
        return Terms({"forget": 0 * total + 1, "retain": kept + 1e-6 * total}, {})

    return loss


@pytest.mark.parametrize(
    ("step", "times", "stops"), [(15, 500, False), (15, 1500, True), (9, 1500, False), (10, 1500, True)]
)
def test_a_retain_loss_that_runs_away_stops_the_run(step: int, times: float, stops: bool) -> None:
    """At 1000 times the median of ten steps, and not before there are ten."""
    model = editable()
    loss = spiking(model, {step: 0.01 * times})
    weights: Weights = []
    if not stops:
        train(model, loss, max_steps=20, history=weights)
        return
    with pytest.raises(DivergedError, match=f"over 1000 times its usual .*, at step {step}, topic bio"):
        train(model, loss, max_steps=20, history=weights)
    assert same([p.detach() for p in model.trained.values()], weights[step - 1])


def test_many_times_nothing_is_little() -> None:
    """A retain loss begins at 0: below the loss that the run began with nothing has run away."""
    model = editable()
    train(model, spiking(model, {15: 0.9}, usual=0.0), max_steps=20)
    with pytest.raises(DivergedError, match="retain loss"):
        train(model, spiking(model, {15: 9.0}, usual=0.0), max_steps=20)


def test_the_retain_rule_can_be_set_and_left_out() -> None:
    model = editable()
    train(model, spiking(model, {15: 1e6}), max_steps=20, retain_spike=None)
    with pytest.raises(DivergedError):
        train(model, spiking(model, {15: 1.5}), max_steps=20, retain_spike=100)
    with pytest.raises(SrmuError, match=r"train.retain_spike must be above 1"):
        TrainOptions(retain_spike=1)


@pytest.mark.parametrize("stop", ["a loss that is not finite", "a stop before a step"])
def test_what_a_stopped_run_saves_is_not_rounded(stop: str) -> None:
    """Rounded weights are seen by the losses alone."""
    model, seen = editable(), list[torch.Tensor]()

    def loss(forget: Any, retain: Any, step: int) -> Terms:
        weight = next(iter(model.trained.values()))
        seen.append(weight.detach().clone())
        value = sum((p**2).sum() for p in model.trained.values())
        if step < 3:
            return Terms({"forget": value}, {})
        return Terms({"forget": value * (math.nan if stop.startswith("a loss") else 1)}, {}, stop="enough")

    if stop.startswith("a loss"):
        with pytest.raises(DivergedError):
            train(model, lambda *given: loss(*given)._replace(stop=""), quantise_aware="int4", learning_rate=0.01)
    else:
        train(model, loss, quantise_aware="int4", learning_rate=0.01)
    saved = next(iter(model.trained.values()))
    rounded = QUANTISERS["int4"].round_matrix(saved.detach())
    assert torch.allclose(seen[-1], QUANTISERS["int4"].round_matrix(seen[-1]), atol=1e-6)
    assert not torch.allclose(saved, rounded, atol=1e-4)


def test_training_through_a_quantiser_needs_masters() -> None:
    with pytest.raises(SrmuError, match="needs float32 masters"):
        TrainOptions(quantise_aware="nf4", weights="bf16")
