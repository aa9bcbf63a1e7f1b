"""The contract of all methods: what each one promises, whatever it does to forget.

A method that is added to METHODS is tested here at its defaults and at each value of its options
of a few values, without a line of its own.
"""

import ast
import copy
import inspect
import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from helpers.models import ARCHITECTURES, batches, pico_module, texts, topic, word_tokenizer
from srmu.engine.losses import is_predicted, token_nll
from srmu.engine.model import EditableModel
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import FINISHED, TrainOptions
from srmu.errors import SrmuError
from srmu.methods import METHODS, SRMU, Edit, Method, Misdirection, Objective, Undo
from srmu.methods.base import Level, Session, State
from srmu.methods.graddiff import GradDiff
from srmu.methods.logits import LogitObjective
from srmu.runs import run as runs
from srmu.runs.config import build_config, make_config

NAMES = Path(__file__).parents[1] / "helpers" / "names.txt"

LAYER = 2
TRAIN = TrainOptions(learning_rate=1e-3, max_steps=2, batch_size=2)

SUPPRESSING = {"teacher_steps": 2, "teacher_learning_rate": 1e-3}
# Options that a method takes on a model, and on texts, as small as these.
SETTINGS: dict[str, dict[str, Any]] = {
    **{n: {"layer": LAYER, "window": 2} for n, c in METHODS.items() if issubclass(c, Misdirection)},
    **{
        name: {"teacher_steps": 2, "teacher_learning_rate": 1e-3}
        for name in ("rklu", "whp", "task_arithmetic")
    },
    "quark": {"quantiles": 2, "response": 4, "pool": 4},
    "altpo": {"alternatives": 2, "response": 4},
    "multi_site": {"layers": (0, LAYER), "window": 2},
    "undo": {"layer": LAYER, "own_texts": 4, "own_tokens": 6} | SUPPRESSING,
    "tar": {"layer": LAYER, "adversary_steps": 2} | SUPPRESSING,
    "iterated": {"layer": LAYER, "rounds": 1, "relearn_steps": 2} | SUPPRESSING,
    "rename_scrub": {
        "names": str(NAMES), "own_texts": 12, "own_tokens": 10, "prompt": 2, "renamings": 3,
        "keep_rows": 2, "held_out": 2,
    },
}  # fmt: skip
# Values of options that do something beside others only, and sets that are worth a run.
COMBINED: dict[str, list[dict[str, Any]]] = {
    "quark": [{"reward": "overlap"}],
    "ssd": [{"reference": "all", "alpha": 1.2}],
    **{name: [{"anchors": "random", "anchor_share": 1.0}] for name in ("multi_site", "undo", "tar", "iterated")},
}
# What is drawn for each place of a batch cannot be the same on a wider one.
PADDED: dict[str, dict[str, Any]] = {"rna": {"noise": 0.0}}
# Methods that do not change a given model.
EXEMPT = {"retrain": "it trains the small models of the testbed from their first weights on"}
# The lines of code of a method's class and of its file, without imports: 50, but for
LINES = {"srmu": 60, "ssd": 55, "whp": 67, "rename_scrub": 115}
FILES = {"srmu": 60, "ssd": 55, "depn": 60, "repselect": 60, "quark": 130, "whp": 135, "rename_scrub": 210}
CHEAP = ("llama", "gpt2", "mixtral", "gemma2")  # of the architectures

RAN = [name for name in METHODS if name not in EXEMPT]
LOGITS = [n for n in RAN if issubclass(METHODS[n], LogitObjective)]


def made(name: str, **options: Any) -> Any:
    return METHODS[name](**SETTINGS.get(name, {}) | options)


def choices(cls: type[Method]) -> list[tuple[str, Any]]:
    """Each option of a few values with each value that is not its default."""
    hints = get_type_hints(cls)
    found: list[tuple[str, Any]] = []
    for option in fields(cls):
        hint = hints[option.name]
        values = get_args(hint) if get_origin(hint) is Literal else ()
        values = (True, False) if hint is bool else values
        found += [(option.name, value) for value in values if value != option.default]
    return found


def variants(name: str) -> list[Method]:
    """A method at its defaults, at each choice, and at the sets of options named above.

    Those of one layer's activations have more choices, run through in test_misdirection.
    """
    cls = METHODS[name]
    found = [made(name)]
    if issubclass(cls, Misdirection):
        return found
    if issubclass(cls, LogitObjective):
        found += [made(name, lora_rank=2), made(name, parameters=("*.mlp_down",))]
    combined = COMBINED.get(name, [])
    for option, value in choices(cls):
        if not any(options.get(option) == value for options in combined):
            found.append(made(name, **{option: value}))
    return [*found, *(made(name, **options) for options in combined)]


def label(method: Method) -> str:
    usual = SETTINGS.get(method.name, {})
    changed = [
        f"{f.name}={getattr(method, f.name)}"
        for f in fields(method)
        if getattr(method, f.name) != usual.get(f.name, f.default)
    ]
    return "-".join([method.name, *changed])


each_name = pytest.mark.parametrize("name", RAN)
each_variant = pytest.mark.parametrize("method", [v for n in RAN for v in variants(n)], ids=label)


@cache
def tokenizer_folder() -> Path:
    """Where a method finds the models' tokenizer."""
    folder = Path(tempfile.mkdtemp())
    word_tokenizer().save_pretrained(folder)
    pico_module().config.save_pretrained(folder)
    return folder


def run(method: Method, topics: Sequence[Topic], train: TrainOptions = TRAIN, module: Any = None) -> SimpleNamespace:
    """The model after a run, what was logged, the outcome."""
    module = pico_module() if module is None else module
    model = EditableModel(module, method.trainable, method.depth)
    model.folder = tokenizer_folder()
    method.check(topics, train)
    logged: list[dict[str, Any]] = []
    outcome = method.apply(model, topics, Session(train, lambda step, values: logged.append(values)))
    return SimpleNamespace(model=model, logged=logged, outcome=outcome, delta=model.delta())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


# --- what changes --------------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@each_variant
def test_only_the_declared_tensors_change(method: Method) -> None:
    """All others are bitwise what they were, under the names that they had; `frozen()` is still
    the original; and the model has as many layers as the method says that it needs."""
    before = pico_module().state_dict()
    declared = EditableModel(pico_module(), method.trainable, method.depth).trained
    got = run(method, [topic()])
    assert len(got.model.layers) == (method.depth or 4)
    assert got.model.trained.keys() == declared.keys()
    assert got.delta and got.delta.keys() <= declared.keys()
    after = got.model.module.state_dict()
    deepest = method.depth or 4
    assert after.keys() == {n for n in before if not (m := re.search(r"layers\.(\d+)\.", n)) or int(m[1]) < deepest}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (name not in got.delta), name
        assert tensor.isfinite().all()
    assert equal(got.model.original, {name: before[name] for name in declared})
    assert all(p.requires_grad == (n in declared) for n, p in got.model.module.named_parameters())


@pytest.mark.slow(keep=2)
@each_variant
def test_the_seed_and_nothing_else_decides(method: Method) -> None:
    """Bit for bit, the log included. The global random state has no say and is left as it was."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = np.random.get_state()[1].tolist(), torch.get_rng_state()
        results.append(run(method, [topic(seed=3)]))
        assert np.random.get_state()[1].tolist() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    one, other = results
    assert equal(one.delta, other.delta)
    assert one.logged == other.logged
    assert one.outcome.stop_reason == other.outcome.stop_reason


@pytest.mark.slow(keep=2)
@each_variant
def test_to_measure_the_effect_changes_nothing(method: Method) -> None:
    got = run(method, [topic()])
    state = got.outcome.states.get("bio", State())
    delta, drawn = copy.deepcopy(got.delta), {name: tensor.clone() for name, tensor in state.tensors.items()}
    with torch.no_grad():
        assert method.measure_effect(got.model, topic(), state)
    assert equal(got.model.delta(), delta) and equal(state.tensors, drawn)


def right(batch: Any) -> Any:
    return wider(batch, left=False)


def left(batch: Any) -> Any:
    return wider(batch, left=True)


def wider(batch: Any, left: bool) -> Any:
    """Four more columns, which hold a word but are not to be seen."""
    extra = torch.ones(len(batch["labels"]), 4, dtype=torch.long)
    fills = {"input_ids": 9, "attention_mask": 0, "labels": -100}
    pairs = {k: [batch[k], fill * extra] for k, fill in fills.items()}
    return Batch({k: torch.cat(pair[::-1] if left else pair, dim=1) for k, pair in pairs.items()})


def junk(batch: Any) -> Any:
    """Another word under the padding that is there."""
    ids = torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])
    return batch.replace(input_ids=ids)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("name", "padded"),
    [
        (name, padded)
        for name in RAN
        # A text's first token is predicted from the padding on its left, if there is any: no batch
        # has such padding that is not counted.
        for padded in (right, junk, *[left] * issubclass(METHODS[name], Misdirection))
    ],
)
def test_padding_changes_nothing(name: str, padded: Any) -> None:
    """Adam's epsilon of 1 keeps its steps in proportion to the gradients: otherwise the rounding noise of an element
    without one becomes a whole step. Some methods first take steps with another epsilon, which do amplify that noise in
    single elements: so tensors are compared by their norms."""
    some, train = topic(), replace(TRAIN, adam_epsilon=1.0, learning_rate=1.0)
    assert any((b["attention_mask"] == 0).any() for b in (*some.forget, *some.retain))
    other = replace(some, forget=[*map(padded, some.forget)], retain=[*map(padded, some.retain)])
    method = made(name, **PADDED.get(name, {}))
    one, two = (run(method, [t], train) for t in (some, other))
    assert one.delta.keys() == two.delta.keys()
    for clean, dirty in zip(one.logged, two.logged, strict=True):
        assert dirty.pop("topic") == clean.pop("topic")
        assert dirty == pytest.approx(clean, rel=1e-4, abs=1e-5)
    original = one.model.original
    for key, tensor in one.delta.items():
        rounding = original[key].norm() * torch.finfo(torch.float32).eps
        assert (two.delta[key] - tensor).norm() <= 1e-3 * (tensor - original[key]).norm() + rounding, key


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@each_variant
def test_a_single_document_is_enough(method: Method) -> None:
    """One text of two words each; a batch of one row."""
    some = replace(topic(), forget=batches(["w1 w2"]), retain=batches(["w30 w31"]))
    got = run(method, [some])
    assert got.delta
    assert all(tensor.isfinite().all() for tensor in got.delta.values())


@pytest.mark.slow(keep=2)
@each_name
def test_two_topics_alternate(name: str) -> None:
    """Steps of one, of the other, and so on; each topic has a state, and a say in the result."""
    two = replace(topic("cyber"), forget=batches(texts(3, 7)), retain=batches(texts(3, 8)))
    method = made(name)
    got = run(method, [topic("bio"), two], replace(TRAIN, max_steps=4))
    assert list(got.outcome.states) == ["bio", "cyber"]
    if isinstance(method, Objective):
        assert [row["topic"] for row in got.logged] == ["bio", "cyber"] * 2
    alone = run(method, [topic("bio")], replace(TRAIN, max_steps=4))
    assert not equal(got.delta, alone.delta)


@pytest.mark.slow(keep=2)
@each_name
def test_numbers_and_tensors_of_a_state_can_be_written(name: str) -> None:
    got = run(made(name), [topic()])
    state = got.outcome.states["bio"]
    assert json.loads(json.dumps(state.numbers)) == state.numbers
    assert all(tensor.isfinite().all() for tensor in state.tensors.values())
    assert all(math.isfinite(v) for row in got.logged for k, v in row.items() if k != "topic")


# --- options -------------------------------------------------------------------------------------


@each_variant
def test_methods_are_frozen_hashable_and_survive_a_config(method: Method) -> None:
    assert {method, copy.deepcopy(method)} == {method}
    with pytest.raises(AttributeError):
        method.anything = 1  # type: ignore[attr-defined]
    tree = {"model": "m", "topics": {"t": {"forget": "f.jsonl"}}}
    named = {f.name: getattr(method, f.name) for f in fields(method)}
    config = build_config(tree | {"method": {"name": method.name, **named}})
    assert config.method == method
    assert build_config(config.to_dict()) == config
    again = build_config(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.method == method
    assert type(again.method) is type(method)
    assert again.id == config.id


@pytest.mark.parametrize("name", METHODS)
def test_defaults_survive_a_config(name: str) -> None:
    tree = {"model": "m", "topics": {"t": {"forget": "f.jsonl"}}, "method": {"name": name}}
    config = build_config(tree)
    assert config.method == METHODS[name]()
    assert build_config(config.to_dict()) == config
    with pytest.raises(SrmuError, match=r"method\.nothing is not an option"):
        build_config(tree | {"method": {"name": name, "nothing": 1}})


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_rank": -1}, r"method\.lora_rank=-1: expected"),
        ({"lora_alpha": 8}, r"method\.lora_alpha has no effect without method\.lora_rank"),
    ],
)
def test_options_of_logits_that_make_no_sense(name: str, options: Any, says: str) -> None:
    with pytest.raises(SrmuError, match=says):
        made(name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_class_says_of_itself(name: str) -> None:
    """Its name is its key and its file's; people can read what it does, and its options run."""
    cls = METHODS[name]
    assert cls.name == name == Path(inspect.getfile(cls)).stem
    assert re.match(r"arXiv \d{4}\.\d{4,5}|ACL |none", cls.paper), cls.paper
    assert cls.level in get_args(Level)
    assert isinstance(cls.uses, tuple) and all(isinstance(what, str) for what in cls.uses)
    first = (cls.__doc__ or "").splitlines()[0]
    assert first.endswith(".") and not first.startswith(f"{cls.__name__}("), first
    assert all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(cls) if f.init)
    assert cls.learning_rate > 0


@pytest.mark.parametrize("name", METHODS)
def test_rates_follow_the_width(name: str) -> None:
    """What trains down-projections has a rate for 7B models, at an eighth of the width eight times that."""
    cls, first = METHODS[name], TrainOptions()
    large, small = (LlamaConfig(hidden_size=4096 // n, intermediate_size=14336 // n) for n in (1, 8))
    rates = [cls().training(first, config).learning_rate for config in (large, small)]
    assert rates == pytest.approx([cls.learning_rate, (8 if cls.scales else 1) * cls.learning_rate], rel=5e-3)
    assert cls.scales == (issubclass(cls, Misdirection) or name in {"multi_site", "iterated", "undo", "rename_scrub"})
    assert cls().training(TrainOptions(learning_rate=3.0), small).learning_rate == 3.0


def test_rates_of_a_first_method() -> None:
    """As those of what it trains, at the widths of the testbed and of experts; what is given stays."""
    testbed = LlamaConfig(hidden_size=256, intermediate_size=640)
    rates = [Undo(**given).resolved(testbed).teacher_learning_rate
             for given in ({}, {"scope": "all"}, {"first": "graddiff"}, {"teacher_learning_rate": 0.5})]  # fmt: skip
    assert rates == [4e-3, SRMU.learning_rate, GradDiff.learning_rate, 0.5]
    experts = MixtralConfig(hidden_size=256, intermediate_size=320, num_experts_per_tok=2)
    assert Undo().resolved(experts).teacher_learning_rate == 4e-3
    assert Undo().training(TrainOptions(), experts).learning_rate == 2e-3


def code_lines(text: str) -> int:
    """Lines that hold code: no blank ones, imports, comments or docstrings."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        inside = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if inside and ast.get_docstring(node) is not None:
            left_out |= set(range(node.body[0].lineno, int(node.body[0].end_lineno or 0) + 1))
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, int(node.end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(t.strip()) and t.strip()[0] != "#" and i not in left_out for i, t in lines)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_short(name: str) -> None:
    assert code_lines(inspect.getsource(METHODS[name])) <= LINES.get(name, 50)
    assert code_lines(Path(inspect.getfile(METHODS[name])).read_text()) <= FILES.get(name, 50)


# --- what is refused before anything is done -----------------------------------------------------


@pytest.mark.slow(keep=2)
@each_variant
def test_retain_texts_are_asked_for_where_they_are_read(method: Method) -> None:
    """Whoever says that it reads none runs without; whoever reads some says so in one line."""
    some = replace(topic(), retain=[])
    if method.reads_retain:
        with pytest.raises(SrmuError, match=r"retain texts.*topics\.bio\.retain") as caught:
            method.check([topic("cyber"), some], TRAIN)
        assert f"method {method.name} " in str(caught.value)
        assert "\n" not in str(caught.value)
    else:
        assert run(method, [some]).delta


@pytest.mark.parametrize("rule", ["forget_ceiling", "kl_budget"])
@each_name
def test_stop_rules_need_the_whole_model(name: str, rule: str) -> None:
    method, train = made(name), replace(TRAIN, **{rule: 0.5})
    why = f"method {name} loads {method.depth} layers"
    if method.depth is None:
        if not isinstance(method, Edit):
            method.check([topic()], train)
            return
        why = f"has no effect: method {name} writes the weights at once"
    with pytest.raises(SrmuError, match=rf"train\.{rule} .*{why}"):
        method.check([topic()], train)


# --- on other models -----------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@each_name
def test_every_architecture(name: str, arch: str) -> None:
    """The declared change, or one line that says why there is none."""
    method = made(name)
    if arch not in CHEAP and not issubclass(METHODS[name], Misdirection):
        method = made(name, **{"parameters": ("*.mlp_down",)} if name in LOGITS else {})
    some = topic()
    some = replace(some, forget=some.forget[:1], retain=some.retain[:1])
    module = pico_module(arch)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    try:
        got = run(method, [some], module=module)
    except SrmuError as error:
        assert "\n" not in str(error)
        assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
        return
    changed = {name for name, tensor in got.model.module.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == got.delta.keys() != set()


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [n for n in LOGITS if n in ("ga", "npo")])
def test_adapters_on_every_architecture(name: str, arch: str) -> None:
    """They are gone at the end; what they did is in the matrices."""
    some, module = topic(), pico_module(arch)
    keys = list(module.state_dict())
    some = replace(some, forget=some.forget[:1], retain=some.retain[:1])
    got = run(made(name, lora_rank=2), [some], module=module)
    assert got.delta
    assert list(module.state_dict()) == keys


# --- what it does --------------------------------------------------------------------------------

KNOWN = [texts(4, 1, range(30)), texts(4, 2, range(30, 60))]
# A rate, a number of steps and options with which a pico model that knows the forget texts loses
# them.
EFFECTS: dict[str, tuple[float, int, dict[str, Any]]] = {
    **{n: (1e-2, 30, {"alpha": 1.0}) for n in RAN if issubclass(METHODS[n], Misdirection)},
    "quark": (3e-3, 40, {"sample_every": 5, "fluency": 0.0}),
    "whp": (3e-3, 20, {"teacher_steps": 10}),
    "task_arithmetic": (1e-3, 1, {"strength": 4.0, "teacher_steps": 10}),
    "repselect": (1e-2, 10, {"components": 4}),
    "multi_site": (1e-2, 30, {"alpha": 1.0}),
    "iterated": (1e-2, 30, {"alpha": 1.0}),
    "rename_scrub": (2e-3, 30, {}),
}


@pytest.fixture(scope="module")
def taught() -> Any:
    """A pico model that has learnt forget and retain texts, and the topic of these."""
    module = pico_module()
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    some = replace(topic(), forget=batches(KNOWN[0], 4), retain=batches(KNOWN[1], 4))
    for _ in range(60):
        both = (*some.forget, *some.retain)
        torch.stack([nll(module, batch) for batch in both]).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert max(float(nll(module, batch).detach()) for batch in both) < 0.5
    return module, some


def nll(module: Any, batch: Any) -> torch.Tensor:
    """Nats that a token of a batch costs the whole model."""
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_nll(logits, batch["labels"]).sum() / is_predicted(batch["labels"]).sum()


@pytest.mark.slow(keep=2)
@each_name
def test_forget_texts_are_forgotten(name: str, taught: Any) -> None:
    """A few steps make the tokens of forget texts cost more, and of retain texts less more."""
    module, some = taught
    rate, steps, options = EFFECTS.get(name, (1e-3, 10, {}))
    train = TrainOptions(learning_rate=rate, max_steps=steps)
    got = run(made(name, **options), [some], train, copy.deepcopy(module))
    after = copy.deepcopy(module)
    for key, tensor in got.delta.items():
        after.get_parameter(key).data.copy_(tensor)
    with torch.no_grad():
        rise, loss = (float(nll(after, b) - nll(module, b)) for b in (some.forget[0], some.retain[0]))
    assert rise > 0.1
    if made(name).reads_retain:
        assert loss < rise


# --- the whole way -------------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@each_name
def test_a_run_from_texts_to_an_exported_checkpoint(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What plain transformers loads computes what the model in memory did, bit for bit."""
    seen: list[EditableModel] = []
    load = EditableModel.load

    def spy(*args: Any, **options: Any) -> EditableModel:
        seen.append(load(*args, **options))
        return seen[-1]

    monkeypatch.setattr(EditableModel, "load", spy)
    given = [f"method.{k}={json.dumps(v)}" for k, v in SETTINGS.get(name, {}).items()]
    given += ["train.max_steps=2", "train.learning_rate=1e-3", "train.batch_size=2"]
    given += [f"runs_dir={workplace / 'runs'}"]
    if METHODS[name].endless:
        given += ["train.forget_ceiling=.inf"]
    sources = [workplace / "forget.jsonl", workplace / "retain.jsonl"]
    config = make_config(str(workplace / "model"), *sources, name, given)
    run = runs.unlearn_config(config, out=workplace / "out")

    files = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "record.json", "delta.safetensors"} <= files
    record = run.record
    assert (record["method"], record["diverged"]) == (name, False)
    assert 0 < record["memory"]["before"] <= record["memory"]["peak"]
    steps = (run.folder / "metrics.jsonl").read_text().splitlines()
    expected = ("edited", 0) if issubclass(METHODS[name], Edit) else (FINISHED, 2)
    assert (record["stop_reason"], len(steps)) == expected
    assert record["steps"] == len(steps)
    (numbers,), (sentence,) = record["effect"]["topics"].values(), record["effect"]["sentences"]
    assert numbers and all(map(math.isfinite, numbers.values())) and record["effect"]["weights"] > 0
    assert "try " in sentence or "srmu " in sentence  # what to type next
    assert run.config == runs.plan_run(config).config
    assert runs.unlearn_config(config).folder == run.folder  # found, not run again
    (model,) = seen
    assert set(record["changed"]) == set(model.delta())

    exported = AutoModelForCausalLM.from_pretrained(workplace / "out").eval()
    expected = AutoModelForCausalLM.from_pretrained(workplace / "model").eval()
    (batch,) = batches(texts(3, 4), 3)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        original = expected(**inputs).logits
        for key, tensor in model.delta().items():
            expected.get_parameter(key).copy_(tensor)
        logits = expected(**inputs).logits
        assert torch.equal(exported(**inputs).logits, logits)
        assert not torch.equal(logits, original)
        if not model.shallow:
            assert torch.equal(model.logits(batch), logits)
