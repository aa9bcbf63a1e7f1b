"""What the methods of one layer's activations promise beyond the contract of all methods."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from helpers.models import ARCHITECTURES, VOCABULARY, batches, pico_module, texts, topic
from srmu.engine.activation_cache import Activations
from srmu.engine.losses import is_counted
from srmu.engine.model import EditableModel
from srmu.engine.sites import Site, Stream
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import Terms, TrainOptions
from srmu.errors import SrmuError
from srmu.methods import METHODS as ALL_METHODS
from srmu.methods import RMU, SRMU, AdaptiveRMU, Method, Misdirection
from srmu.methods.base import Session
from srmu.methods.importance import Direction, Fusion, Statistic, draw_direction
from srmu.methods.own_texts import write_anchors

LAYER = 2
TRAIN = TrainOptions(learning_rate=1e-3, max_steps=2, batch_size=2)
SPECIAL_IDS = {0, 1, 2, 3}
METHODS = {n: cls for n, cls in ALL_METHODS.items() if issubclass(cls, Misdirection)}


def variants() -> list[Method]:
    """Every method at its defaults, and every value of every option that takes one of a few."""
    common: list[dict[str, Any]] = [
        {},
        *({"stream": s} for s in get_args(Stream)),
        {"window": 1},
        {"window": 1, "stream": "mlp_post"},
        {"coeff": 2.0},
        {"kappa": 2.0},
        {"anchors": "random"},
        {"columns": 0.25},
        {"skip_first": False},
        {"map_batches": 1},
        {"matrices": "mlp"},
        {"error": "sum"},
    ]
    srmu: list[dict[str, Any]] = [
        *({"importance": v} for v in get_args(Fusion)),
        *({"statistic": v} for v in get_args(Statistic)),
        *({"map_mode": v} for v in ("static", "per_batch", "ema")),
        *({"direction": v} for v in get_args(Direction)),
        *({"target_mode": v} for v in ("absolute", "additive")),
        {"shared_direction": True},
        {"clip_quantile": 0.9},
        {"map_mode": "per_batch", "direction": "resampled", "target_mode": "additive"},
    ]
    adaptive = [
        {"norm_source": source, "norm_when": when}
        for source in ("frozen", "updated")
        for when in ("first_batch", "per_batch", "per_sample", "per_token")
    ]
    own = {"srmu": srmu, "adaptive_rmu": [*adaptive, {"coeff": 0.5, "scale": 3.0}]}
    return [
        cls(**{"layer": LAYER, "window": 2} | options)
        for name, cls in METHODS.items()
        for options in [*common, *own.get(name, [])]
    ]


def label(method: Method) -> str:
    changed = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "layer"}
    defaults = {f.name: f.default for f in fields(method)}
    return method.name + "".join(f"-{k}={v}" for k, v in changed.items() if v != defaults[k])


each_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
each_variant = pytest.mark.parametrize("method", variants(), ids=label)


def run(
    method: Method, topics: list[Topic], train: TrainOptions = TRAIN, arch: str = "llama",
    whole: bool = False,
) -> tuple[EditableModel, list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    model = EditableModel(pico_module(arch), method.trainable, None if whole else method.depth)
    logged: list[dict[str, Any]] = []
    states = method.apply(model, topics, Session(train, lambda step, values: logged.append(values))).states
    return model, logged, states


def first_terms(method: Any, some: Topic, arch: str = "llama") -> tuple[Terms, EditableModel, Any]:
    """What the method returns for the first step, before anything is optimised."""
    model = EditableModel(pico_module(arch), method.trainable, method.depth)
    state = method.setup(model, some)
    forget, retain = next(method.prepared(some).pairs())
    return method.loss(model, state, forget, retain, 0), model, state


def quiet(method: Any) -> Any:
    """RNA without its noise, which is drawn for each place of a batch."""
    return replace(method, noise=0.0) if hasattr(method, "noise") else method


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@each_variant
def test_only_the_declared_tensors_change(method: Method) -> None:
    """All others are bitwise what they were. The run repeats itself bit for bit, and the model
    cut to the declared depth ends with the same weights as the whole one."""
    model, logged, _ = run(method, [topic()])
    last = LAYER - (method.stream == "mlp_post")
    kinds = ("gate_proj", "up_proj", "down_proj") if method.matrices == "mlp" else ("down_proj",)
    layers = range(last - method.window + 1, last + 1)
    declared = {f"model.layers.{i}.mlp.{kind}.weight" for i in layers for kind in kinds}
    assert set(model.delta()) == set(model.trained) == declared
    before, after = pico_module().state_dict(), model.module.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (name not in declared), name
    assert all(torch.tensor(v).isfinite() for row in logged for v in row.values() if v != "bio")
    assert method.depth == len(model.layers) == LAYER + 1
    whole, again, _ = run(method, [topic()], whole=True)
    assert len(whole.layers) == 4
    assert equal(whole.delta(), model.delta())
    assert again == logged


@pytest.mark.slow(keep=2)
@each_variant
def test_step_0_in_closed_form(method: Any) -> None:
    """Retain loss 0 with zero gradient; forget gradient 2(h - T) / (counted elements)."""
    method = quiet(method)
    terms, model, _ = first_terms(method, topic())
    state = method.setup(model, topic())  # anew: a resampled direction draws the same again
    weights = list(model.trained.values())
    assert terms.loss_values["retain"] == 0
    gradients = torch.autograd.grad(terms.loss_values["retain"], weights, retain_graph=True)
    assert all(g.eq(0).all() for g in gradients)
    forget, retain = topic().forget[0], topic().retain[0]
    hidden = model.hidden(forget, method.site)
    target = method.target(model, state, forget, retain, hidden.detach())
    mask = is_counted(forget["labels"])
    size = 1 if method.error == "sum" else hidden.shape[-1]
    slope = 2 * (hidden - target).detach() / (int(mask.sum()) * size) * mask[..., None]
    loss = ((hidden - target).square().sum(dim=-1) / size)[mask].mean()
    assert terms.loss_values["forget"].item() == pytest.approx(loss.item(), rel=1e-6)
    expected = torch.autograd.grad(hidden, weights, slope)
    got = torch.autograd.grad(terms.loss_values["forget"], weights)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("method", [m for m in variants() if m.anchors == "none"], ids=label)
def test_padding_changes_nothing(method: Any) -> None:
    """Eight more columns of padding give the same losses (anchor rows are as long as the batch)."""

    def padded(batch: Any) -> Any:
        extra = torch.ones(len(batch["labels"]), 8, dtype=torch.long)
        fills = {"input_ids": 9, "attention_mask": 0, "labels": -100}
        return Batch({k: torch.cat([batch[k], fill * extra], dim=1) for k, fill in fills.items()})

    some = topic()
    longer = replace(some, forget=[*map(padded, some.forget)], retain=[*map(padded, some.retain)])
    one, other = (run(quiet(method), [t])[1] for t in (some, longer))
    for short, long in zip(one, other, strict=True):
        for key in ("loss", "forget", "retain"):
            assert long[key] == pytest.approx(short[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize(
    "method", [AdaptiveRMU(norm_when="per_token"), SRMU(target_mode="additive"), RMU()], ids=lambda m: m.name
)
def test_logged_numbers_ignore_padding(method: Any) -> None:
    """What stands under the padding enters no mean that is logged, the target's norm included."""
    some, junk = topic(), topic()
    assert any((batch["attention_mask"] == 0).any() for batch in some.forget)
    for batch in junk.forget:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])
    one, other = (run(replace(method, layer=LAYER), [t])[1] for t in (some, junk))
    for clean, dirty in zip(one, other, strict=True):
        assert clean.pop("topic") == dirty.pop("topic")
        assert dirty == pytest.approx(clean, rel=1e-5, abs=1e-5)


@each_method
def test_a_batch_equals_its_rows(cls: Any) -> None:
    """The loss of a batch is the token-weighted mean of the losses of its rows."""
    method, some = quiet(cls(layer=LAYER, coeff=1.5, alpha=5.0)), topic()
    if isinstance(method, AdaptiveRMU):
        method = replace(method, norm_when="per_token")
    model = EditableModel(pico_module(), method.trainable, method.depth)
    state = method.setup(model, some)
    for parameter in model.trained.values():  # so that the retain loss is not zero
        parameter.data += 0.05
    forget, retain = some.forget[0], some.retain[0]

    def row(batch: Any, i: int) -> Any:
        length = int(batch["attention_mask"][i].sum())
        return batch.cut(slice(i, i + 1), slice(None, length))

    whole = method.loss(model, state, forget, retain, 0).loss_values
    assert whole["retain"] > 0.01
    rows = [method.loss(model, state, row(forget, i), row(retain, i), 0).loss_values for i in range(2)]
    for key, batch in (("forget", forget), ("retain", retain)):
        counts = is_counted(batch["labels"]).sum(dim=1)
        expected = sum(r[key].item() * int(n) for r, n in zip(rows, counts, strict=True))
        assert whole[key].item() == pytest.approx(expected / int(counts.sum()), rel=1e-5)


@each_method
def test_the_seed_decides_the_delta(cls: Any) -> None:
    method = cls(layer=LAYER)
    assert equal(run(method, [topic(seed=3)])[0].delta(), run(method, [topic(seed=3)])[0].delta())
    one, other = (run(method, [topic(seed=s)]) for s in (3, 4))
    assert not equal(one[0].delta(), other[0].delta())
    v, w = (r[2]["bio"].tensors["direction"] for r in (one, other))
    assert not torch.equal(v, w)


@each_method
def test_topics_have_directions_of_their_own(cls: Any) -> None:
    states = run(cls(layer=LAYER), [topic("bio"), topic("cyber")])[2]
    bio, cyber = (states[n].tensors["direction"] for n in ("bio", "cyber"))
    assert not torch.equal(bio, cyber)


@pytest.mark.parametrize("direction", ["signs", "uniform", "unit_uniform", "gaussian", "resampled"])
def test_topics_can_share_a_direction(direction: Any) -> None:
    method = SRMU(layer=LAYER, shared_direction=True, direction=direction)
    states = run(method, [topic("bio"), topic("cyber")])[2]
    bio, cyber = (states[n].tensors["direction"] for n in ("bio", "cyber"))
    assert torch.equal(bio, cyber)


@pytest.mark.slow(keep=2)
@each_variant
def test_a_single_document_is_enough(method: Method) -> None:
    """One text of two words each; a batch of one row."""
    some = replace(topic(), forget=batches(["w1 w2"]), retain=batches(["w30 w31"]))
    if method.anchors == "random":
        method = replace(method, anchor_share=1.0)
    model, logged, _ = run(method, [some])
    assert len(logged) == TRAIN.max_steps
    assert set(model.delta()) == set(model.trained)


@each_method
def test_two_topics_alternate_with_options_of_their_own(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps f0, f1, f0, f1; each topic's batches in order, its own coeff and alpha."""
    seen, plain = [], cls.loss

    def loss(self: Any, model: Any, state: Any, forget: Any, retain: Any, step: int) -> Terms:
        seen.append((step, self.coeff, self.alpha, forget["input_ids"], retain["input_ids"]))
        return plain(self, model, state, forget, retain, step)

    monkeypatch.setattr(cls, "loss", loss)
    method = cls(layer=LAYER, coeff=2.0, alpha=10.0)
    two = replace(topic("cyber", coeff=5.0, alpha=3.0), forget=batches(texts(4, 7)))
    train = replace(TRAIN, max_steps=6)
    _, logged, states = run(method, [topic("bio"), two], train)
    assert [row["topic"] for row in logged] == ["bio", "cyber"] * 3
    assert [s[:3] for s in seen] == [(i, *((2.0, 10.0), (5.0, 3.0))[i % 2]) for i in range(6)]
    for i, (_, _, _, forget, retain) in enumerate(seen):
        part = (topic("bio"), two)[i % 2]
        assert torch.equal(forget, part.forget[i // 2 % 2]["input_ids"])
        assert torch.equal(retain, part.retain[i // 2 % 2]["input_ids"])
    if cls is not AdaptiveRMU:  # whose coefficient multiplies a norm
        assert [states[n].numbers["coeff"] for n in ("bio", "cyber")] == pytest.approx([2, 5])


@each_method
def test_a_topics_strength_replaces_the_methods(cls: Any) -> None:
    """kappa for one topic beside coeff for all is no contradiction."""
    states = run(cls(layer=LAYER, coeff=2.0), [topic("bio"), topic("cyber", kappa=3.0)])[2]
    numbers = states["cyber"].numbers
    assert numbers["target_norm"] == pytest.approx(3 * numbers["activation_norm"], rel=1e-5)


def test_the_whole_mlp() -> None:
    """Gate, up and down of one layer."""
    method = SRMU(layer=LAYER, window=1, matrices="mlp", stream="mlp_out", error="sum")
    model = run(method, [topic()])[0]
    names = {name.rpartition("mlp.")[2] for name in model.delta()}
    assert names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"} and len(model.trained) == 3
    with pytest.raises(SrmuError, match=r"method\.columns has no effect without matrices=down"):
        SRMU(matrices="mlp", columns=0.5)


def test_summed_errors_are_the_width_times_their_mean() -> None:
    mean, total = (first_terms(SRMU(layer=LAYER, error=error), topic())[0].loss_values for error in ("mean", "sum"))
    assert float(total["forget"].detach()) == pytest.approx(32 * float(mean["forget"].detach()), rel=1e-6)


@each_variant
def test_methods_are_frozen_and_hashable(method: Method) -> None:
    assert {method, copy.deepcopy(method)} == {method}
    with pytest.raises(AttributeError):
        method.alpha = 1.0  # type: ignore[attr-defined]


@each_method
def test_the_global_random_state_decides_nothing(cls: Any) -> None:
    method = cls(layer=LAYER)
    torch.manual_seed(1)
    one = run(method, [topic()])[0].delta()
    torch.manual_seed(2)
    assert equal(one, run(method, [topic()])[0].delta())


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@each_method
def test_every_architecture_unlearns(cls: Any, arch: str) -> None:
    method = cls(layer=LAYER, window=2)
    if hasattr(method, "budget"):  # the adversary of RMU + LAT has nothing to seek in step 0
        method = replace(method, budget=0.0)
    some = replace(topic(), forget=topic().forget[:1])
    model, logged, _ = run(method, [some], arch=arch)
    assert len(model.delta()) == 2
    assert logged[1]["forget"] < logged[0]["forget"]


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        *((cls, {"coeff": 2.0, "kappa": 2.0}, "coeff.*kappa") for cls in METHODS.values()),
        *((cls, {"anchor_share": 0.3}, "anchor_share") for cls in METHODS.values()),
        *((cls, {"anchors": "random", "anchor_share": 0.0}, "anchor_share") for cls in (SRMU,)),
        *((cls, {"anchors": "random", "anchor_share": 1.1}, "anchor_share") for cls in (SRMU,)),
        (SRMU, {"own_texts": 8}, "own_texts"),
        (SRMU, {"anchors": "random", "own_ratio": 3.0}, "own_ratio"),
        (SRMU, {"anchors": "self", "own_texts": 0}, "own_texts"),
        (SRMU, {"columns": 0.0}, "columns"),
        (SRMU, {"columns": 1.1}, "columns"),
        *((cls, {"window": 0}, "window") for cls in METHODS.values()),
        *((cls, {"map_batches": 0}, "map_batches") for cls in METHODS.values()),
        (SRMU, {"ema_decay": 0.5}, "ema_decay"),
        (SRMU, {"ema_decay": 1.0, "map_mode": "ema"}, "ema_decay"),
        (SRMU, {"ema_decay": 0.5, "map_mode": "per_batch"}, "ema_decay"),
        (SRMU, {"lam": 0.5}, "lam"),
        (SRMU, {"eps": 1e-3, "importance": "difference"}, "eps"),
        (SRMU, {"eps": 1e-3, "importance": "uniform"}, "eps"),
        (SRMU, {"eps": 0.0}, "eps"),
        (SRMU, {"importance": "uniform", "map_mode": "ema"}, "map_mode"),
        (SRMU, {"importance": "uniform", "statistic": "rms"}, "statistic"),
        (SRMU, {"importance": "uniform", "clip_quantile": 0.9}, "clip_quantile"),
        (SRMU, {"clip_quantile": 0.0}, "clip_quantile"),
        (SRMU, {"clip_quantile": 1.5}, "clip_quantile"),
        (AdaptiveRMU, {"scale": 3.0}, "scale"),
        (AdaptiveRMU, {"scale": 3.0, "kappa": 2.0}, "scale"),
        *(  # V is the same for all topics there anyway
            (SRMU, {"shared_direction": True, "direction": d}, "shared_direction") for d in ("plus", "minus", "zero")
        ),
    ],
)
def test_options_that_cannot_take_effect_are_errors(cls: Any, options: Any, named: str) -> None:
    with pytest.raises(SrmuError, match=named):
        cls(layer=LAYER, **options)


@pytest.mark.slow(keep=2)
@each_method
@pytest.mark.parametrize("kappa", [None, 0.0, 0.5, 3.0])
def test_kappa_sets_the_targets_norm(cls: Any, kappa: float | None) -> None:
    """||target|| = kappa * mean norm of forget activations; 8 where no strength is given."""
    method, some = cls(layer=LAYER, kappa=kappa), topic()
    if cls is AdaptiveRMU:  # whose target follows the first batch
        some = replace(some, forget=some.forget[:1])
    state = run(method, [some])[2]["bio"]
    module = pico_module()
    norms = []
    for batch in some.forget:
        with torch.no_grad():
            outputs = module(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                output_hidden_states=True,
            )  # fmt: skip
        hidden = outputs.hidden_states[LAYER + 1]
        for row, mask in zip(hidden, batch["attention_mask"], strict=True):
            norms += [float(token.norm()) for token in row[1 : int(mask.sum())]]
    mean = sum(norms) / len(norms)
    expected = 8.0 if kappa is None else kappa
    assert state.numbers["activation_norm"] == pytest.approx(mean, rel=1e-5)
    assert state.numbers["kappa"] == pytest.approx(expected, rel=1e-5)
    assert state.numbers["target_norm"] == pytest.approx(expected * mean, rel=1e-5)
    assert state.tensors["target"].norm() == pytest.approx(expected * mean, rel=1e-5)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_adaptive_numbers_tell_its_strength(scale: float | None) -> None:
    """With coeff the target is scale * coeff * norm, and the recorded kappa says so."""
    method = AdaptiveRMU(layer=LAYER, coeff=0.5, scale=scale)
    numbers = run(method, [topic()])[2]["bio"].numbers
    factor = 0.5 * (5.0 if scale is None else scale)
    assert numbers["kappa"] == pytest.approx(factor, rel=1e-5)
    assert numbers["target_norm"] == pytest.approx(factor * numbers["activation_norm"], rel=1e-5)


@pytest.mark.parametrize("source", ["frozen", "updated"])
@pytest.mark.parametrize("when", ["first_batch", "per_batch", "per_sample", "per_token"])
def test_adaptive_rmu_records_the_norm_that_it_used(when: Any, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first batch, or of the last: not the mean over all forget texts, measured before the first step."""
    used, plain = [], AdaptiveRMU.target

    def target(self: Any, model: Any, state: Any, forget: Any, *rest: Any) -> torch.Tensor:
        found = plain(self, model, state, forget, *rest)
        wide = found.expand(*forget["labels"].shape, found.shape[-1])
        used.append(float(wide.norm(dim=-1)[self.measured_tokens(forget)].mean()))
        return found

    monkeypatch.setattr(AdaptiveRMU, "target", target)
    method = AdaptiveRMU(layer=LAYER, kappa=3.0, norm_when=when, norm_source=source)
    before = method.setup(EditableModel(pico_module(), method.trainable, method.depth), topic()).numbers
    state = run(method, [topic()], replace(TRAIN, max_steps=2))[2]["bio"]
    assert len(used) == 2 and (used[0] == pytest.approx(used[1], rel=1e-6)) == (when == "first_batch")
    if when != "per_sample":  # whose mean over texts weighs short ones as much
        assert state.numbers["target_norm"] == pytest.approx(used[1], rel=1e-5)
    assert state.numbers["target_norm"] == pytest.approx(3 * state.numbers["activation_norm"], rel=1e-6)
    assert state.tensors["target"].norm() == pytest.approx(state.numbers["target_norm"], rel=1e-5)
    assert state.numbers["target_norm"] != pytest.approx(before["target_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("layers", "options", "layer"),
    [
        (32, {}, 7),  # the papers' layer
        (32, {"stream": "mlp_post"}, 7),
        (64, {}, 14),
        (4, {}, 2),  # the lowest that holds a window of three
        (4, {"stream": "mlp_post"}, 3),
        (4, {"window": 1}, 1),
        (4, {"window": 1, "stream": "mlp_post"}, 1),
        (4, {"layer": 3}, 3),
        (1, {"window": 1}, 0),
    ],
)
@each_method
def test_the_layer_in_proportion_to_the_depth(cls: Any, layers: int, options: Any, layer: int) -> None:
    config = SimpleNamespace(num_hidden_layers=layers)
    method = cls(**options).resolved(config)
    assert method.layer == layer
    assert method.kappa == 8.0  # the strength where none is given, written out
    assert method.resolved(config) == method
    assert cls(coeff=2.0, **options).resolved(config).kappa is None


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (2, {}),
        (4, {"layer": 4}),
        (4, {"layer": 1}),
        (4, {"layer": 2, "stream": "mlp_post"}),
        (4, {"layer": 0, "window": 1, "stream": "mlp_post"}),
    ],
)
@each_method
def test_a_layer_or_window_that_does_not_fit(cls: Any, layers: int, options: Any) -> None:
    with pytest.raises(SrmuError, match=r"layer|window"):
        cls(**options).resolved(SimpleNamespace(num_hidden_layers=layers))


# --- anchors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "rows"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_anchors_replace_their_share_of_retain_rows(share: float, rows: int) -> None:
    some = replace(topic(), retain=batches(texts(8, 2), size=4), vocabulary=torch.tensor([10, 20, 30]))
    method = SRMU(layer=LAYER, anchors="random", anchor_share=share)
    mixed, again = method.prepared(some), method.prepared(some)
    for before, after in zip(some.forget, mixed.forget, strict=True):
        assert before is after
    for before, after, same in zip(some.retain, mixed.retain, again.retain, strict=True):
        assert all(torch.equal(after[k], same[k]) for k in after)
        assert all(torch.equal(after[k][:-rows], before[k][:-rows]) for k in after)
        new = after["input_ids"][-rows:]
        assert set(new[:, 1:].flatten().tolist()) <= {10, 20, 30}
        assert new[:, 0].eq(1).all()  # <s> stays
        assert after["attention_mask"][-rows:].eq(1).all()
        assert torch.equal(after["labels"][-rows:], new)
        assert not torch.equal(new, before["input_ids"][-rows:])
    other = method.prepared(replace(some, seed=1))
    assert not torch.equal(other.retain[0]["input_ids"], mixed.retain[0]["input_ids"])


def test_anchors_without_a_leading_special_token() -> None:
    """The first token of a text without <s> is drawn as the others."""
    ids = torch.arange(10, 40).reshape(3, 10)
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    some = replace(topic(), retain=[batch], vocabulary=torch.arange(4, VOCABULARY))
    mixed = some.add_anchors(1.0).retain[0]["input_ids"]
    assert (mixed >= 4).all()
    assert not torch.equal(mixed[:, 0], ids[:, 0])


def test_anchors_of_a_share_that_is_no_row_are_refused() -> None:
    with pytest.raises(SrmuError, match="anchor_share"):
        topic().add_anchors(0.1)


@each_method
def test_anchors_survive_a_short_last_batch(cls: Any) -> None:
    """Seven texts in batches of two leave a batch of one: the default share must not refuse it."""
    some = replace(topic(), retain=batches(texts(7, 2)))
    method = cls(layer=LAYER, anchors="random")
    assert len(run(method, [some], replace(TRAIN, max_steps=5))[1]) == 5


def test_own_texts_take_the_place_of_retain_rows() -> None:
    """In turn over the batches, cut to the batch, and what is behind their end counts nowhere."""
    width = 6
    ids = torch.arange(10, 10 + 8 * width).reshape(8, width)
    whole = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    parts = [whole.cut(slice(i, i + 4)) for i in (0, 4)]
    own = ([1, 5, 6], [1, *range(20, 40)], [1, 7])
    mixed = replace(topic(), retain=parts, own=own).add_anchors(0.5).retain
    for before, after in zip(parts, mixed, strict=True):
        assert all(torch.equal(after[k][:2], before[k][:2]) for k in after)
    rows = [row for after in mixed for row in zip(*(v[2:].tolist() for v in after.values()),
                                                  strict=True)]  # fmt: skip
    for i, (tokens, mask, labels) in enumerate(rows):
        text = own[i % 3][:width]
        rest = width - len(text)
        assert tokens == [*text, *[0] * rest]
        assert mask == [1] * len(text) + [0] * rest
        assert labels == [*text, *[-100] * rest]


def leaked(rows: Any, some: Topic, own: Any, ratio: float) -> list[bool]:
    """Of each row whether it has a token that forget texts have so many times as often."""
    given = [
        int(i) for batch in some.forget
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        for i in ids[mask == 1]
    ]  # fmt: skip
    written = [i for row in own for i in row]
    found = []
    for row in rows:
        shares = [
            (given.count(i) / len(given), (written.count(i) + 1) / (len(written) + 1), given.count(i)) for i in row
        ]
        found.append(any(f > ratio * o and n > 1 for f, o, n in shares))
    return found


def test_own_anchors_hold_no_token_of_the_forget_texts() -> None:
    """The pico model writes all words alike, so that forget words leak without the filter."""
    some, method = topic(), SRMU(layer=LAYER, anchors="self")
    model = EditableModel(pico_module(), method.trainable, method.depth)
    everything, none = write_anchors(model, some, 200, 1e9)
    assert none == 0
    kept, dropped = write_anchors(model, some, 200, 2.5)
    bad = leaked(everything, some, everything, 2.5)
    assert 0 < len(kept) < len(everything)
    assert dropped == sum(bad) == len(everything) - len(kept)
    assert kept == [row for row, leaks in zip(everything, bad, strict=True) if not leaks]


def test_own_anchors_train_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original wrote them, what is left says how many, and they repeat bit for bit."""
    seen: list[Any] = []
    loss = SRMU.loss

    def watched(self: Any, model: Any, state: Any, forget: Any, retain: Any, step: int) -> Any:
        seen.append(retain["input_ids"].tolist())
        assert not any("own" in key for key in (*state.memory, *state.tensors))
        return loss(self, model, state, forget, retain, step)

    monkeypatch.setattr(SRMU, "loss", watched)
    method = SRMU(layer=LAYER, anchors="self", own_texts=100)
    train = replace(TRAIN, max_steps=3)
    model, logged, states = run(method, [topic()], train)
    assert logged[0]["retain"] == 0
    assert len(model.layers) == 4 and method.depth is None
    counts = states["bio"].numbers["anchors"]
    assert counts["kept"] > 0 and counts["kept"] + counts["dropped"] == 100
    again, _, _ = run(method, [topic()], train)
    assert equal(model.delta(), again.delta())
    kept, _ = write_anchors(EditableModel(pico_module(), method.trainable), topic(), 100, method.own_ratio)
    width = len(seen[0][0])
    assert seen[0][1] == (kept[0] + [0] * width)[:width]
    other, _, _ = run(replace(method, anchors="random", own_texts=480), [topic()], train)
    assert not equal(model.delta(), other.delta())


def test_activations_of_own_texts_stay_in_memory(tmp_path: Path) -> None:
    method = SRMU(layer=LAYER, anchors="self", own_texts=100)
    model = EditableModel(pico_module(), method.trainable, method.depth)
    model.activations = Activations(0, tmp_path / "kept", 1 << 30)
    method.apply(model, [topic()], Session(TRAIN, lambda *args: None))
    assert model.activations.kept == "memory"
    assert not [*tmp_path.iterdir()]


def test_no_own_text_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srmu.methods.own_texts.typical_tokens", lambda *args: set(range(VOCABULARY)))
    method = RMU(layer=LAYER, anchors="self", own_texts=8)
    with pytest.raises(SrmuError, match=r"each of 8 texts .* method\.anchors=random") as error:
        run(method, [topic()])
    assert "\n" not in str(error.value)


# --- columns -------------------------------------------------------------------------------------


def read_squares(arch: str, layer: int, some: Topic, role: str) -> torch.Tensor:
    """The mean squares of what a down-projection reads, a text at a time, without its first."""
    module = pico_module(arch)
    model = EditableModel(module, (f"{layer}.mlp_down",))
    (name,) = model.trained
    rows: list[torch.Tensor] = []

    def catch(part: Any, args: Any) -> None:
        rows.extend(args[0].reshape(-1, args[0].shape[-1])[1:])

    module.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(catch)
    for batch in getattr(some, role):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            module(ids[mask == 1][None])
    sums = [0.0] * len(rows[0])
    for row in rows:
        for j, value in enumerate(row.tolist()):
            sums[j] += value * value
    return torch.tensor([value / len(rows) for value in sums])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.25, 0.001])
def test_columns_of_the_highest_ratio_change(arch: str, share: float) -> None:
    """These and no others: all else is bitwise as it was, in the model's own layout."""
    method = SRMU(layer=LAYER, window=2, columns=share)
    model, logged, _ = run(method, [topic()], replace(TRAIN, max_steps=4), arch)
    assert logged[0]["retain"] == 0
    for layer, (name, parameter) in zip((1, 2), model.trained.items(), strict=True):
        ratio = read_squares(arch, layer, topic(), "forget") / read_squares(arch, layer, topic(), "retain")
        count = max(1, round(share * len(ratio)))
        expected = sorted(range(len(ratio)), key=lambda j: -float(ratio[j]))[:count]
        moved = parameter.ne(model.original[name]).any(1 if arch == "gpt2" else 0)
        assert len(moved) == len(ratio)
        assert {*moved.nonzero()[:, 0].tolist()} == {*expected}
        assert parameter._backward_hooks is None or not parameter._backward_hooks


def test_columns_stay_in_half_precision() -> None:
    method = RMU(layer=LAYER, window=1, columns=0.5)
    model = EditableModel(pico_module(dtype=torch.bfloat16), method.trainable, method.depth)
    method.apply(model, [topic()], Session(replace(TRAIN, learning_rate=1e-2), lambda *args: None))
    (name,) = model.trained
    moved = model.trained[name].ne(model.original[name]).any(0)
    assert moved.sum() == len(moved) // 2


def test_columns_that_cannot_be_held() -> None:
    method = RMU(layer=LAYER, columns=0.5)
    with pytest.raises(SrmuError, match=r"train\.weight_decay=0\.1 would move"):
        method.check([topic()], replace(TRAIN, weight_decay=0.1))
    with pytest.raises(SrmuError, match=r"mixture of experts, each with neurons of its own"):
        run(method, [topic()], arch="mixtral")


# --- RMU (methods.md 2.6) ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_rmu_draws_a_unit_vector_without_negative_entries(seed: int) -> None:
    terms, model, state = first_terms(RMU(layer=LAYER, coeff=6.5), topic(seed=seed))
    u = state.tensors["direction"]
    assert u.norm() == pytest.approx(1, rel=1e-6)
    assert (u >= 0).all()
    assert torch.equal(state.tensors["target"], 6.5 * u)
    assert len(model.trained) == 3
    expected = model.hidden(topic().forget[0], Site(LAYER)) - 6.5 * u
    mask = topic().forget[0]["attention_mask"].bool()
    loss = expected[mask].square().mean().item()
    assert terms.loss_values["forget"].item() == pytest.approx(loss, rel=1e-6)


def test_rmu_turns_forget_activations_and_holds_retain_activations() -> None:
    method = RMU(layer=LAYER, kappa=2.0, alpha=100.0)
    train = replace(TRAIN, max_steps=60, learning_rate=2e-3)
    _, logged, _ = run(method, [topic()], train)
    cosines = [row["forget_cos"] for row in logged]
    assert cosines[-1] > cosines[0] + 0.1
    assert min(row["retain_cos"] for row in logged) > 0.95
    assert logged[0]["retain_cos"] == pytest.approx(1, abs=1e-6)


@each_method
def test_counting_padding_differs_only_where_there_is_some(cls: Any) -> None:
    method = cls(layer=LAYER, coeff=2.0)

    def losses(documents: list[list[str]]) -> list[float]:
        values = []
        for padding in ("mask", "count"):
            forget, retain = (batches(d, padding=padding) for d in documents)
            some = replace(topic(), forget=forget, retain=retain)
            values.append(first_terms(method, some)[0].loss_values["forget"].item())
        return values

    mask, count = losses([["w1 w2 w3", "w4 w5 w6"], ["w30 w31", "w32 w33"]])
    assert mask == count
    mask, count = losses([["w1 w2 w3", "w4 w5 w6 w7 w8"], ["w30 w31", "w32 w33"]])
    assert mask != pytest.approx(count, rel=1e-3)


# --- Adaptive RMU (methods.md 3.5) ---------------------------------------------------------------


def adaptive_target(method: AdaptiveRMU, factor: float = 1.0, batch: Any = None) -> torch.Tensor:
    """The target on a model whose activations at the site are `factor` times larger."""
    model = EditableModel(pico_module(), method.trainable, method.depth)
    plain = model.hidden
    model.hidden = lambda *args: factor * plain(*args)  # type: ignore[method-assign]
    some = topic()
    state = method.setup(model, some)
    forget = some.forget[0] if batch is None else batch
    hidden = model.hidden(forget, method.site).detach()
    return method.target(model, state, forget, some.retain[0], hidden)


NORMS = [
    {"norm_source": source, "norm_when": when}
    for source in ("frozen", "updated")
    for when in ("first_batch", "per_batch", "per_sample", "per_token")
]


@pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_the_adaptive_target_scales_with_the_activations(options: Any, factor: float) -> None:
    method = AdaptiveRMU(layer=LAYER, coeff=1.0, **options)
    assert torch.equal(adaptive_target(method, factor), factor * adaptive_target(method))


@pytest.mark.parametrize("when", ["first_batch", "per_batch", "per_sample", "per_token"])
def test_frozen_and_updated_norms_agree_at_step_0(when: Any) -> None:
    method = AdaptiveRMU(layer=LAYER, norm_when=when)
    updated = adaptive_target(replace(method, norm_source="updated"))
    assert torch.equal(adaptive_target(method), updated)


def targets_of_a_run(method: Any, steps: int = 4) -> list[torch.Tensor]:
    """The target of each step."""
    cls, seen = type(method), []

    def target(self: Any, *args: Any) -> torch.Tensor:
        seen.append(cls.target(self, *args).clone())
        return seen[-1]

    spy = type("Spy", (cls,), {"target": target})
    options = {f.name: getattr(method, f.name) for f in fields(method)}
    run(spy(**options), [topic()], replace(TRAIN, max_steps=steps))
    return seen


@pytest.mark.parametrize("source", ["frozen", "updated"])
@pytest.mark.parametrize("strength", [{"kappa": 0.1}, {"coeff": 0.7, "scale": 1.3}, {"kappa": 3.3}])
def test_the_first_batchs_target_holds_for_all_steps(source: Any, strength: Any) -> None:
    """Bit for bit: the first step's target is that of the second."""
    targets = targets_of_a_run(AdaptiveRMU(layer=LAYER, norm_source=source, **strength))
    assert all(torch.equal(t, targets[0]) for t in targets)


@pytest.mark.parametrize("when", ["per_batch", "per_sample", "per_token"])
def test_the_other_targets_follow_the_batch(when: Any) -> None:
    """The third step sees the first batch again: only the updated model's norms have moved."""
    frozen = targets_of_a_run(AdaptiveRMU(layer=LAYER, norm_when=when))
    updated = targets_of_a_run(AdaptiveRMU(layer=LAYER, norm_when=when, norm_source="updated"))
    assert not torch.equal(frozen[0].flatten()[-8:], frozen[1].flatten()[-8:])
    assert torch.equal(frozen[0], frozen[2])
    assert torch.equal(frozen[0], updated[0])
    assert not torch.equal(updated[0], updated[2])


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_rmu_reproduces_rmu(seed: int) -> None:
    """scale * ||h|| * coeff = 6.5 is RMU with coeff 6.5, bit for bit."""
    some = topic(seed=seed)
    expected = run(RMU(layer=LAYER, coeff=6.5), [some])[0].delta()
    probe = AdaptiveRMU(layer=LAYER, coeff=1.0, scale=1.0)
    norm = run(probe, [some])[2]["bio"].numbers["activation_norm"]
    method = AdaptiveRMU(layer=LAYER, coeff=1.0, scale=6.5 / norm)
    assert equal(run(method, [some])[0].delta(), expected)


@pytest.mark.parametrize("source", ["frozen", "updated"])
def test_per_sample_is_per_token_where_there_is_one_token(source: Any) -> None:
    """A batch of one row with one counted token."""
    ids = torch.tensor([[7, 8, 9]])
    one = Batch(input_ids=ids, attention_mask=torch.ones_like(ids))
    one["labels"] = torch.tensor([[-100, -100, 9]])
    sample, token, batch = (
        adaptive_target(AdaptiveRMU(layer=LAYER, norm_when=when, norm_source=source, skip_first=False), batch=one)
        for when in ("per_sample", "per_token", "per_batch")
    )
    assert torch.equal(sample[0, 0], token[0, -1])
    torch.testing.assert_close(batch, token[0, -1])


# --- SRMU (methods.md 1.5) -----------------------------------------------------------------------


@pytest.mark.parametrize("strength", [{"coeff": 6.5}, {"kappa": 2.0}, {}])
@pytest.mark.parametrize("stream", get_args(Stream))
def test_rmu_is_srmu_with_a_uniform_map_and_rmus_direction(strength: Any, stream: Any) -> None:
    options = {"layer": LAYER, "stream": stream, "window": 2, **strength}
    srmu = SRMU(**options, direction="unit_uniform", importance="uniform")
    topics = [topic("bio"), topic("cyber")]
    one, other = run(srmu, topics), run(RMU(**options), topics)
    assert one[1] == other[1]
    assert equal(one[0].delta(), other[0].delta())


def test_rmu_is_srmu_with_its_direction_as_the_map() -> None:
    """I_norm := u / max(u), V := +1, c_map := c * max(u) give RMU's loss."""
    expected, _, state = first_terms(RMU(layer=LAYER, coeff=6.5), topic())
    u = state.tensors["direction"]
    method = SRMU(layer=LAYER, coeff=6.5 * float(u.max()), direction="plus")
    model = EditableModel(pico_module(), method.trainable, method.depth)
    plus = draw_direction("plus", len(u), torch.Generator())
    injected = method.state(plus * (u / u.max()), 1.0, direction=plus, importance=u / u.max())
    forget, retain = next(topic().pairs())
    got = method.loss(model, injected, forget, retain, 0)
    torch.testing.assert_close(got.loss_values["forget"], expected.loss_values["forget"], rtol=1e-6, atol=0)


def test_a_uniform_map_is_the_ratio_map_of_equal_sets() -> None:
    """Forget and retain alike: the ratio map selects nothing."""
    some = replace(topic(), retain=topic().forget)
    ratio, uniform = (first_terms(SRMU(layer=LAYER, coeff=2.0, importance=kind), some) for kind in ("ratio", "uniform"))
    torch.testing.assert_close(ratio[2].tensors["target"], uniform[2].tensors["target"], rtol=1e-2, atol=0)
    assert ratio[0].loss_values["forget"].isclose(uniform[0].loss_values["forget"], rtol=1e-2)


@pytest.mark.parametrize("strength", [{"coeff": 2.0}, {"kappa": 2.0}])
def test_a_difference_map_of_equal_sets_is_the_zero_target(strength: Any) -> None:
    some = replace(topic(), retain=topic().forget)
    one, other = (
        run(SRMU(layer=LAYER, **options, **strength), [some])
        for options in ({"importance": "difference"}, {"direction": "zero"})
    )
    assert one[2]["bio"].tensors["importance"].eq(0).all()
    assert [row["forget"] for row in one[1]] == [row["forget"] for row in other[1]]
    assert equal(one[0].delta(), other[0].delta())


@pytest.mark.parametrize("kind", [k for k in get_args(Fusion) if k != "uniform"])
@pytest.mark.parametrize("mode", ["per_batch", "ema"])
def test_a_static_map_of_one_batch_is_the_batchs_own(kind: Any, mode: Any) -> None:
    some = topic()
    some = replace(some, forget=some.forget[:1], retain=some.retain[:1])
    one, other = (
        run(SRMU(layer=LAYER, importance=kind, map_mode=m, kappa=2.0), [some], replace(TRAIN)) for m in ("static", mode)
    )
    maps = [r[2]["bio"].tensors["importance"] for r in (one, other)]
    torch.testing.assert_close(*maps)
    for name, tensor in one[0].delta().items():
        torch.testing.assert_close(other[0].delta()[name], tensor, rtol=0, atol=1e-6)
    if mode == "per_batch":
        assert equal(one[0].delta(), other[0].delta())


@pytest.mark.parametrize("statistic", ["abs_mean", "mean_abs", "rms"])
def test_maps_are_measured_on_the_original_model(statistic: Any) -> None:
    """A map per batch does not follow the weights that are trained."""
    some = topic()
    some = replace(some, forget=some.forget[:1], retain=some.retain[:1])
    method = SRMU(layer=LAYER, map_mode="per_batch", statistic=statistic)
    maps = []
    for steps in (1, 5):
        train = replace(TRAIN, max_steps=steps, learning_rate=1e-2)
        maps.append(run(method, [some], train)[2]["bio"].tensors["importance"])
    assert torch.equal(*maps)


def test_map_batches_limits_what_is_measured() -> None:
    some = topic()
    short = replace(some, forget=some.forget[:1], retain=some.retain[:1])
    one = first_terms(SRMU(layer=LAYER, map_batches=1), some)[2].tensors["importance"]
    assert torch.equal(one, first_terms(SRMU(layer=LAYER), short)[2].tensors["importance"])
    assert not torch.equal(one, first_terms(SRMU(layer=LAYER), some)[2].tensors["importance"])


def test_a_resampled_direction_changes_at_every_step() -> None:
    method = SRMU(layer=LAYER, direction="resampled", importance="uniform", coeff=2.0)
    seen = targets_of_a_run(method, 3)
    assert all(target.abs().eq(2).all() for target in seen)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert all(torch.equal(*pair) for pair in zip(seen, targets_of_a_run(method, 3), strict=True))


def test_the_additive_target_starts_from_the_frozen_activation() -> None:
    """Eq. 1: at step 0 the forget loss is ||c V I_norm||^2 / D whatever the text."""
    terms, _, state = first_terms(SRMU(layer=LAYER, kappa=2.0, target_mode="additive"), topic())
    target = state.tensors["target"]
    assert terms.loss_values["forget"].item() == pytest.approx(target.square().mean().item(), rel=1e-5)
    nothing = SRMU(layer=LAYER, direction="zero", target_mode="additive")
    assert first_terms(nothing, topic())[0].loss_values["forget"] == 0


def planted(method: SRMU, steps: int, learning_rate: float) -> dict[str, Any]:
    """A run on a two-layer toy whose forget words light up features 0-7 and whose retain words
    light up features 8-31: distances to the target, and where forget activations went."""
    module = pico_module()
    module.model.layers = module.model.layers[:2]
    module.config.num_hidden_layers = 2
    table = module.get_input_embeddings().weight.data
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    table.copy_(0.2 * noise)
    table[4:34, :8] += 3.0  # words w0-w29
    table[34:, 8:] += 3.0
    some = Topic(
        "toy", batches(texts(4, 1, range(30))), batches(texts(4, 2, range(30, 60))), 0,
        torch.arange(4, VOCABULARY),
    )  # fmt: skip
    model = EditableModel(module, method.trainable, method.depth)
    forget, retain = some.forget[0], some.retain[0]
    mask = forget["attention_mask"].bool() & (forget["input_ids"] != 1)  # <s> leads both sets
    with torch.no_grad():
        before, held = model.hidden(forget, method.site), model.hidden(retain, method.site)
    distances, drifts = [], []

    def log(*_: Any) -> None:
        with torch.no_grad():
            hidden, kept = model.hidden(forget, method.site), model.hidden(retain, method.site)
        counts = retain["attention_mask"].bool()
        distances.append(hidden)
        drifts.append(float((kept - held)[counts].square().mean() / held[counts].square().mean()))

    options = TrainOptions(learning_rate=learning_rate, max_steps=steps)
    some = replace(some, forget=some.forget[:1], retain=some.retain[:1])
    state = method.apply(model, [some], Session(options, log)).states["toy"]
    target, map_ = state.tensors["target"], state.tensors["importance"]
    return {
        "distances": [float((h - target)[mask].norm()) for h in [before, *distances]],
        "drifts": drifts,
        "moved": (distances[-1] - before)[mask].square().mean(dim=0),
        "map": map_,
    }


@pytest.mark.parametrize("kind", ["ratio", "difference"])
def test_srmu_moves_selected_features_and_holds_the_others(kind: Any) -> None:
    """||h_f - T|| falls at every step, retain activations stay, and the displacement lies in
    the features that the map selects, more than with a uniform map."""
    options = {"layer": 1, "window": 2, "kappa": 2.0, "alpha": 20.0, "target_mode": "additive"}
    got = planted(SRMU(**options, importance=kind), steps=40, learning_rate=2e-3)
    flat = planted(SRMU(**options, importance="uniform"), steps=40, learning_rate=2e-3)
    distances = got["distances"]
    assert all(later < earlier for earlier, later in pairwise(distances))
    assert max(got["drifts"]) < 0.01
    top = got["map"].topk(8).indices
    assert set(top.tolist()) == set(range(8))  # the planted features
    share, uniform = (float(m["moved"][top].sum() / m["moved"].sum()) for m in (got, flat))
    assert share > 0.7
    assert share > uniform + 0.3


@pytest.mark.parametrize("name", ["coeff", "kappa", "alpha"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("cls", METHODS.values(), ids=lambda cls: cls.name)
def test_strengths_are_finite_and_not_negative(cls: Any, name: str, value: float) -> None:
    with pytest.raises(SrmuError, match=rf"method\.{name}=.*at least 0"):
        cls(**{name: value})


@pytest.mark.parametrize(("method", "batches"), [(RMU, 3), (SRMU, 5), (AdaptiveRMU, 3)])
def test_measuring_shows_each_batch(method: Any, batches: int) -> None:
    """On a large model a batch takes many seconds: the progress counts batches."""
    shown: list[tuple[str, int, int]] = []

    @contextmanager
    def watch(label: str, total: int) -> Iterator[Any]:
        ticks: list[str] = []
        yield ticks.append
        shown.append((label, total, len(ticks)))

    ids = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    shifted = [batch.map(lambda v, i=i: v.roll(i, 1)) for i in range(5)]
    topic = Topic("t", shifted[:3], shifted[3:])
    made = method(layer=2, window=1, kappa=1.0)
    model = EditableModel(pico_module(), made.trainable, made.depth)
    made.apply(model, [topic], Session(TrainOptions(max_steps=2, learning_rate=1e-5), lambda *_: None, watch))
    assert shown == [("measuring and preparing", batches, batches), (made.name, 2, 2)]
