"""What srmu leaves out changes no bit: cut layers, the single model, activations that are kept.

The reference is the loop anyone would write: two whole models as transformers loads them, every
parameter with a gradient, full forwards with a plain hook. It is told the direction and the batches
and nothing else. All comparisons are `torch.equal`.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.models import ARCHITECTURES, save_pico, texts, word_tokenizer
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine.activation_cache import Activations
from srmu.engine.model import EditableModel
from srmu.engine.topic import Topic
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.methods import RMU, SRMU, AdaptiveRMU, Misdirection
from srmu.methods.base import Session
from srmu.methods.importance import draw_direction

LAYER, STEPS, SIZE = 2, 4, 3
ROOM = 1 << 30
OPTIONS: dict[str, Any] = {"learning_rate": 4e-3, "max_steps": STEPS, "batch_size": SIZE}
DOWN = {
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h.weight",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "phi": "model.layers.{}.mlp.fc2.weight",
    "mixtral": "model.layers.{}.mlp.experts.down_proj",
    "qwen3_moe": "model.layers.{}.mlp.experts.down_proj",
}
USUAL = "model.layers.{}.mlp.down_proj.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Result(NamedTuple):
    """What a run gave: the trained tensors, the two losses of each step, calls of each layer."""

    weights: dict[str, Tensor]
    losses: list[tuple[float, float]]
    calls: list[int]


def topic(padding: Any = "mask") -> Topic:
    """Batches of unequal lengths, and two of each set, so that the third step repeats a batch."""
    tokenizer = word_tokenizer()
    rows = [texts(5, 1, range(30)), texts(6, 2, range(20, 60))]
    forget, retain = (list(batch_rows(tokenise_texts(r, tokenizer, 64), tokenizer, SIZE, padding)) for r in rows)
    assert len(forget) == len(retain) == 2
    assert any((b["attention_mask"] == 0).any() for b in (*forget, *retain))
    return Topic("t", forget, retain, seed=5, vocabulary=torch.arange(4, 64))


def whole(folder: Path, dtype: str = "auto") -> Any:
    """The model as transformers gives it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def naive(arch: str, module: Any, method: RMU, topic: Topic, weights: str = "fp32", **adam: Any) -> Result:
    """RMU as a plain loop over two whole models."""
    live, first = copy.deepcopy(module), copy.deepcopy(module)
    last, window = method.site.layer, method.window
    names = [DOWN.get(arch, USUAL).format(i) for i in range(last - window + 1, last + 1)]
    place = DOWN.get(arch, USUAL).partition(".mlp")[0].format(last)
    parameters = [live.get_parameter(name).requires_grad_(True) for name in names]
    mixed = weights == "fp32" and parameters[0].dtype != torch.float32
    stepped = [p.detach().float().clone() if mixed else p for p in parameters]
    optimiser = torch.optim.AdamW(stepped, lr=OPTIONS["learning_rate"], eps=1e-8, weight_decay=0.0, **adam)
    width = live.config.hidden_size
    target = method.coeff * draw_direction("unit_uniform", width, topic.generator("direction"))
    losses = []

    def hidden(model: Any, batch: Any) -> Tensor:
        seen = []
        handle = model.get_submodule(place).register_forward_hook(lambda *a: seen.append(a[2]))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def mse(value: Tensor, target: Tensor, batch: Any) -> Tensor:
        mask = batch["labels"] != -100
        squares = (value.float() - target.float()).square().mean(dim=-1)
        return (squares * mask).sum() / mask.sum()

    for forget, retain in itertools.islice(topic.pairs(), STEPS):
        with torch.no_grad():
            anchor = hidden(first, retain)
        away = mse(hidden(live, forget), target, forget)
        held = method.alpha * mse(hidden(live, retain), anchor, retain)
        live.zero_grad()
        (away + held).backward()
        if mixed:
            for master, parameter in zip(stepped, parameters, strict=True):
                master.grad = parameter.grad.float()
        optimiser.step()
        if mixed:
            for master, parameter in zip(stepped, parameters, strict=True):
                parameter.data.copy_(master)
        losses.append((float(away.detach()), float(held.detach())))
    for name, parameter in zip(names, parameters, strict=True):
        assert not torch.equal(parameter, first.get_parameter(name)), "nothing was trained"
    return Result({n: p.detach() for n, p in zip(names, parameters, strict=True)}, losses, [])


def ours(model: EditableModel, method: Misdirection, topic: Topic, activations: Activations, **options: Any) -> Result:
    """The same through srmu, with the activations that an earlier run may have left."""
    model.activations = activations
    calls = [0] * len(model.layers)
    for number, layer in enumerate(model.layers):

        def count(module: Any, args: Any, kwargs: Any, number: int = number) -> None:
            calls[number] += 1
            value = args[0] if args else kwargs["hidden_states"]
            # A gradient starts at the first trained tensor, inside this layer or above it.
            assert number > model.fixed or not value.requires_grad

        next(layer.children()).register_forward_pre_hook(
            count, with_kwargs=True
        )  # of one whose output is known none runs
    losses = []

    def log(step: int, values: dict[str, Any]) -> None:
        losses.append((values["forget"], values["retain"]))

    method.apply(model, [topic], Session(TrainOptions(**OPTIONS, **options), log))
    for name, parameter in model.module.named_parameters():
        assert parameter.requires_grad == (name in model.trained)
        assert parameter.grad is None
    assert set(model.delta()) == set(model.trained), "nothing was trained"
    return Result({n: p.detach().clone() for n, p in model.trained.items()}, losses, calls)


def same(got: Result, expected: Result) -> None:
    assert got.losses == expected.losses
    assert list(got.weights) == list(expected.weights)
    for name, tensor in expected.weights.items():
        assert got.weights[name].dtype == tensor.dtype
        assert torch.equal(got.weights[name], tensor), name


def all_ways(
    modules: Sequence[Callable[[], EditableModel]], method: Misdirection, topic: Topic, folder: Path, **options: Any
) -> list[Result]:
    """Uncached, then in memory and in files, both cold and warm; `modules` take turns."""

    def complain(text: str) -> None:
        raise AssertionError(text)

    def on_disk() -> Activations:
        return Activations(0, folder, 10**9, say=complain)

    folder.mkdir()
    memory = Activations(ROOM)
    results = []
    turns = itertools.cycle(modules)
    for activations in (Activations(), memory, memory, on_disk(), on_disk()):
        hits, warm = activations.hits, bool(results) and len(results) % 2 == 0
        model = next(turns)()
        result = ours(model, method, topic, activations, **options)
        calls = result.calls
        assert all(calls[model.fixed : method.site.layer + 1])
        assert not any(calls[method.site.layer + 1 :]), "a layer above the site was run"
        assert activations.hits > hits
        assert any(calls[: model.fixed]) != (warm or not model.fixed), "fixed layers were run"
        results.append(result)
    return results


# --- RMU against the loop ------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_way_of_running_equals_two_whole_models(arch: str, dtype: str, tmp_path: Path) -> None:
    """Right padding in float32 and left padding, which is counted, in bf16, from the same files."""
    padding = {"float32": "mask", "bfloat16": "count"}[dtype]
    folder = save_pico(tmp_path / "model", arch, DTYPES[dtype])
    method, batches = RMU(layer=LAYER, window=2, coeff=3.0, alpha=7.0), topic(padding)
    module = whole(folder)
    assert module.dtype == DTYPES[dtype]
    ways = [
        lambda: EditableModel.load(folder, depth=method.depth, trainable=method.trainable),
        lambda: EditableModel(copy.deepcopy(module), method.trainable),
    ]
    expected = naive(arch, module, method, batches)
    assert expected.losses[0][1] == 0 < expected.losses[-1][1]
    for result in all_ways(ways, method, batches, tmp_path / "kept", padding=padding):
        same(result, expected)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("arch", "stored", "asked"),
    [
        *((arch, "bfloat16", "float32") for arch in ARCHITECTURES),
        *((arch, "float32", "bfloat16") for arch in ("llama", "gpt2", "gemma3", "mixtral")),
    ],
)
def test_loading_in_another_dtype_equals_two_whole_models(arch: str, stored: str, asked: str, tmp_path: Path) -> None:
    """Here the module is built shallow, which must not show."""
    folder = save_pico(tmp_path / "model", arch, DTYPES[stored])
    method, batches = RMU(layer=LAYER, window=2, coeff=3.0, alpha=7.0), topic()
    module = whole(folder, asked)
    expected = naive(arch, module, method, batches)
    activations = Activations(ROOM)
    for _ in range(2):
        model = EditableModel.load(folder, depth=method.depth, trainable=method.trainable, dtype=asked)
        assert model.module.dtype == DTYPES[asked]
        same(ours(model, method, batches, activations), expected)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("arch", "dtype", "padding", "window", "weights"),
    [
        ("llama", "float32", "count", 2, "fp32"),
        ("gpt2", "float32", "count", 2, "fp32"),
        ("qwen3", "bfloat16", "mask", 2, "fp32"),
        ("llama", "bfloat16", "mask", 2, "bf16"),
        ("gpt2", "bfloat16", "count", 2, "bf16"),
        ("mixtral", "bfloat16", "mask", 2, "bf16"),
        ("gemma2", "bfloat16", "mask", 1, "bf16"),
        ("llama", "float32", "mask", 3, "fp32"),
        ("falcon", "bfloat16", "mask", 3, "fp32"),
        ("qwen3_moe", "float32", "count", 3, "fp32"),
        ("gemma3", "float32", "mask", 1, "fp32"),
    ],
)
def test_paddings_windows_and_bare_weights(
    arch: str, dtype: str, padding: str, window: int, weights: str, tmp_path: Path
) -> None:
    """With a window of 3 nothing is fixed, and only the targets are found again."""
    folder = save_pico(tmp_path / "model", arch, DTYPES[dtype])
    method, batches = RMU(layer=LAYER, window=window, coeff=3.0, alpha=7.0), topic(padding)
    module = whole(folder)
    ways = [lambda: EditableModel(copy.deepcopy(module), method.trainable, method.depth)]
    assert ways[0]().fixed == 3 - window
    expected = naive(arch, module, method, batches, weights)
    options = {"padding": padding, "weights": weights}
    for result in all_ways(ways, method, batches, tmp_path / "kept", **options):
        same(result, expected)


# --- the other methods, cached against uncached --------------------------------------------------

METHODS: dict[str, Misdirection] = {
    "srmu": SRMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0),
    "map of each batch": SRMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0, map_mode="per_batch"),
    "moving map": SRMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0, map_mode="ema"),
    "additive": SRMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0, target_mode="additive"),
    "additive, resampled": SRMU(
        layer=LAYER, window=2, coeff=0.5, alpha=7.0, target_mode="additive", direction="resampled"
    ),
    "anchors": SRMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0, anchors="random"),
    "first tokens": SRMU(layer=LAYER, window=2, kappa=2.0, skip_first=False, map_mode="per_batch"),
    "one map batch": SRMU(layer=LAYER, window=2, kappa=2.0, map_batches=1),
    "mlp_out": SRMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0, stream="mlp_out"),
    "mlp_post": RMU(layer=LAYER, window=1, kappa=2.0, alpha=7.0, stream="mlp_post"),
    "rmu anchors": RMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0, anchors="random"),
    "first norm": AdaptiveRMU(layer=LAYER, window=2, kappa=2.0, alpha=7.0),
    **{
        f"norms of {source} {when}": AdaptiveRMU(
            layer=LAYER, window=2, kappa=2.0, alpha=7.0, norm_source=source, norm_when=when
        )
        for source in ("frozen", "updated")
        for when in ("per_batch", "per_sample", "per_token")
    },
}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", METHODS)
def test_methods_are_the_same_with_kept_activations(name: str, tmp_path: Path) -> None:
    method, batches = METHODS[name], topic()
    module = whole(save_pico(tmp_path / "model", "llama"))
    ways = [lambda: EditableModel(copy.deepcopy(module), method.trainable)]
    first, *others = all_ways(ways, method, batches, tmp_path / "kept")
    for result in others:
        same(result, first)


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_two_topics_of_the_same_texts_share_what_is_kept(arch: str, tmp_path: Path) -> None:
    """One's retain texts are the other's forget texts; methods may follow each other, too."""
    module = whole(save_pico(tmp_path / "model", arch, torch.bfloat16))
    one = topic()
    other = Topic("other", one.retain, one.forget, seed=6, vocabulary=one.vocabulary)
    kept = Activations(ROOM)

    def weights(method: Misdirection, activations: Activations) -> dict[str, Tensor]:
        model = EditableModel(copy.deepcopy(module), method.trainable, method.depth)
        model.activations = activations
        method.apply(model, [one, other], Session(TrainOptions(**OPTIONS), lambda *_: None))
        return model.trained

    for method in (METHODS["srmu"], METHODS["rmu anchors"], METHODS["map of each batch"]):
        expected = weights(method, Activations())
        for _ in range(2):
            for name, tensor in weights(method, kept).items():
                assert torch.equal(tensor, expected[name])


def test_activations_of_another_window_are_noticed(tmp_path: Path) -> None:
    """What one layer gave does not stand in for two: the first retain loss tells."""
    module, batches = whole(save_pico(tmp_path / "model")), topic()
    kept, methods = Activations(ROOM), [RMU(layer=LAYER, window=w, coeff=3.0) for w in (2, 1)]
    models = [EditableModel(copy.deepcopy(module), method.trainable) for method in methods]
    ours(models[0], methods[0], batches, kept)
    with pytest.raises(SrmuError, match=r"first retain loss is .* and not 0"):
        ours(models[1], methods[1], batches, kept)
    assert models[1].delta() == {}
