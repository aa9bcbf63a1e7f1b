"""Every architecture against a plain hook on the untouched transformers model, and the errors."""

import copy
import gc
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.models import (
    ARCHITECTURES,
    EXPERTS,
    SIZES,
    VOCABULARY,
    block_name,
    down_name,
    pico_module,
    save_pico,
    texts,
    word_tokenizer,
)
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine.devices import release_memory
from srmu.engine.loading import check_layers, find_layers, load_module, read_config
from srmu.engine.model import EditableModel
from srmu.engine.sites import Site, Stream, decoder_blocks, in_role
from srmu.engine.topic import Batch
from srmu.errors import SrmuError

ROTARY = [name for name in ARCHITECTURES if name != "gpt2"]


def streams(arch: str) -> list[Any]:
    """Those that the architecture has: the experts of a layer have no common down-projection."""
    return [s for s in get_args(Stream) if s != "mlp_post" or arch not in EXPERTS]


def example(padding: Any = "mask") -> Batch:
    tokenizer = word_tokenizer()
    return next(batch_rows(tokenise_texts(texts(3, 1), tokenizer, 64), tokenizer, 3, padding))


def inputs(batch: Any) -> dict[str, torch.Tensor]:
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def whole(module: Any, place: str, inside: bool, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a hook at `place` sees in a full forward (its input when `inside`), and the logits."""
    seen = []
    handle = module.get_submodule(place).register_forward_hook(
        lambda _, args, output: seen.append(args if inside else output)
    )
    with torch.no_grad():
        logits = module(**inputs(batch)).logits
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0], logits


# --- activations ---------------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize(("arch", "stream"), [(a, s) for a in ARCHITECTURES for s in streams(a)])
def test_hidden_equals_a_plain_hook(arch: str, stream: Any, layer: int) -> None:
    """Bit for bit, from the model cut to that layer and from the whole one."""
    batch, block = example(), block_name(arch, layer)
    down = down_name(arch, layer).removesuffix(".weight")
    place = {"resid_post": block, "mlp_out": f"{block}.mlp", "mlp_post": down}[stream]
    expected, logits = whole(pico_module(arch), place, stream == "mlp_post", batch)
    role = f"{layer}.mlp_down"
    cut = EditableModel(pico_module(arch), [role], layer + 1)
    full = EditableModel(pico_module(arch), [role])
    site = Site(layer, stream)
    assert torch.equal(cut.hidden(batch, site), expected)
    assert torch.equal(full.hidden(batch, site), expected)
    assert len(cut.layers) == layer + 1
    assert len(full.layers) == 4
    assert torch.equal(full.logits(batch), logits)
    with full.frozen():
        assert torch.equal(full.hidden(batch, site), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_above_the_site_are_not_run(arch: str) -> None:
    model, ran = EditableModel(pico_module(arch), ["0.mlp_down"]), []
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    for stream in streams(arch):
        ran.clear()
        model.hidden(example(), Site(1, stream))
        assert ran == [0, 1]


@pytest.mark.parametrize("arch", EXPERTS)
def test_experts_have_no_common_down_projection(arch: str) -> None:
    model = EditableModel(pico_module(arch), ["1.mlp_down"])
    with pytest.raises(SrmuError, match=r"mixture of experts.* read resid_post or mlp_out"):
        model.hidden(example(), Site(1, "mlp_post"))


def test_hidden_leaves_no_hook_and_no_cut_behind() -> None:
    model = EditableModel(pico_module(), ["0.mlp_down"])
    bad = example().replace(input_ids=torch.full((3, 4), VOCABULARY + 5))
    for stream in get_args(Stream):
        model.hidden(example(), Site(1, stream))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model.hidden(bad, Site(1, stream))
    assert len(model.layers) == 4
    for module in model.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_right_padding_changes_no_real_token(arch: str) -> None:
    model, batch = EditableModel(pico_module(arch), ["2.mlp_down"]), example()
    together = model.hidden(batch, Site(2))
    for i, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        alone = model.hidden(batch.cut(slice(i, i + 1), slice(None, length)), Site(2))
        torch.testing.assert_close(together[i, :length], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_left_padding_equals_right_padding_on_rotary_models(arch: str) -> None:
    """Positions are relative there; gpt2's learned positions shift with the padding."""
    model = EditableModel(pico_module(arch), ["2.mlp_down"])
    hidden = []
    for padding in ("mask", "count"):
        batch = example(padding)
        real = batch["attention_mask"].bool()
        assert not real.all()
        hidden.append(model.hidden(batch, Site(2))[real])
    if arch in ROTARY:
        torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(*hidden, rtol=1e-2, atol=1e-2)


def test_dropout_is_off() -> None:
    """A model in training mode would not repeat itself, nor have a retain loss of 0 at step 0."""
    module = pico_module("gpt2").train()
    assert module.config.resid_pdrop > 0
    model = EditableModel(module, ["1.mlp_down"])
    assert torch.equal(model.hidden(example(), Site(1)), model.hidden(example(), Site(1)))


# --- which parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_roles_resolve_to_the_down_projection(arch: str) -> None:
    model = EditableModel(pico_module(arch), ["0.mlp_down", "2.mlp_down"], 3)
    expected = [down_name(arch, layer) for layer in (0, 2)]
    assert list(model.trained) == expected
    grads = [name for name, p in model.module.named_parameters() if p.requires_grad]
    assert grads == expected
    shape = {
        "gpt2": (48, 32),  # which keeps it transposed
        "falcon": (32, 128),  # always four times as wide
        "mixtral": (3, 32, 48),  # experts first
        "qwen3_moe": (4, 32, 24),
    }.get(arch, (32, 48))
    assert {tuple(p.shape) for p in model.trained.values()} == {shape}


def test_a_mixture_may_have_layers_without_experts() -> None:
    cls, sizes = ARCHITECTURES["qwen3_moe"]
    module = other_module(cls(**sizes, mlp_only_layers=[1]))
    model = EditableModel(module, ["1.mlp_down", "2.mlp_down"])
    assert list(model.trained) == [
        "model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.experts.down_proj"
    ]  # fmt: skip
    assert model.hidden(example(), Site(1, "mlp_post")).shape[-1] == 48
    with pytest.raises(SrmuError, match="mixture of experts, each with neurons of its own"):
        model.hidden(example(), Site(2, "mlp_post"))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.1.self_attn.q_proj.weight"], ["model.layers.1.self_attn.q_proj.weight"]),
        (["*.norm.weight"], ["model.norm.weight"]),
        (["model.layers.[01].mlp.up_proj.*"],
         [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]),
        (["1.mlp_down", "*.1.mlp.down_proj.weight"], ["model.layers.1.mlp.down_proj.weight"]),
    ],
)  # fmt: skip
def test_patterns_name_parameters(patterns: list[str], expected: list[str]) -> None:
    model = EditableModel(pico_module(), patterns)
    assert list(model.trained) == expected
    assert {n for n, p in model.module.named_parameters() if p.requires_grad} == set(expected)


def test_a_pattern_of_everything_takes_what_is_loaded() -> None:
    module = pico_module()
    cut = EditableModel(copy.deepcopy(module), ["*"], 2)
    assert set(cut.trained) == {n for n, _ in cut.module.named_parameters()}
    above = ("model.layers.2.", "model.layers.3.")
    expected = {n for n, _ in module.named_parameters() if not n.startswith(above)}
    assert set(cut.trained) == expected


# --- the frozen model ----------------------------------------------------------------------------


def test_using_puts_the_weights_back_after_an_exception() -> None:
    model = EditableModel(pico_module(), ["1.mlp_down", "2.mlp_down"])
    for parameter in model.trained.values():
        parameter.data += 0.1
    before = {name: p.data for name, p in model.trained.items()}
    other = {name: torch.zeros_like(p) for name, p in model.trained.items()}
    for block in (model.frozen, lambda: model.using(other)):
        with pytest.raises(KeyboardInterrupt), block():
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt
        assert torch.is_grad_enabled()
        for name, parameter in model.trained.items():
            assert parameter.data_ptr() == before[name].data_ptr()
            assert torch.equal(parameter, before[name])
            assert parameter.requires_grad


def test_using_nests() -> None:
    model, batch, site = EditableModel(pico_module(), ["1.mlp_down"]), example(), Site(1)
    (name,) = model.trained
    original = model.hidden(batch, site).detach()
    model.trained[name].data += 0.1
    changed = model.hidden(batch, site).detach()
    zeros = {name: torch.zeros_like(model.trained[name])}
    with model.using(zeros):
        nothing = model.hidden(batch, site)
        with model.frozen():
            assert torch.equal(model.hidden(batch, site), original)
        assert torch.equal(model.hidden(batch, site), nothing)
    assert torch.equal(model.hidden(batch, site), changed)
    assert not torch.equal(nothing, original)


def test_frozen_reaches_back_through_training_in_place() -> None:
    """The originals are copies: changing a parameter in place does not change them."""
    model = EditableModel(pico_module(), ["1.mlp_down"])
    expected = EditableModel(pico_module(), ["1.mlp_down"]).hidden(example(), Site(1))
    with torch.no_grad():
        next(iter(model.trained.values())).mul_(2)
    with model.frozen():
        assert torch.equal(model.hidden(example(), Site(1)), expected)


def test_delta_lists_what_differs() -> None:
    model = EditableModel(pico_module(), ["0.mlp_down", "1.mlp_down", "2.mlp_down"])
    assert model.delta() == {}
    name = "model.layers.1.mlp.down_proj.weight"
    model.trained[name].data[0, 0] += 1
    delta = model.delta()
    assert list(delta) == [name]
    assert torch.equal(delta[name], model.trained[name])
    assert not delta[name].requires_grad
    model.trained[name].data.copy_(model.original[name])
    assert model.delta() == {}


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [2, 3, 40, -1])
def test_a_layer_that_is_not_loaded(layer: int) -> None:
    model = EditableModel(pico_module(), ["0.mlp_down"], 2)
    with pytest.raises(SrmuError, match=rf"layer {layer} is not loaded: only layers 0-1 are"):
        model.hidden(example(), Site(layer))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["3.mlp_down"], "layer 3 is not loaded: only layers 0-1 are"),
        (["1.mlp_up"], "role 'mlp_up' does not exist; choose one of mlp_down"),
        (["model.nothing.*"], r"no parameter of this model matches 'model.nothing.\*'"),
        (["0.mlp_down", "lm_tail"], "no parameter of this model matches 'lm_tail'"),
    ],
)
def test_what_cannot_be_trained(patterns: list[str], message: str) -> None:
    with pytest.raises(SrmuError, match=message):
        EditableModel(pico_module(), patterns, 2)


def test_a_stream_that_does_not_exist() -> None:
    # Where shapes are checked, the checker refuses the value first.
    with pytest.raises((SrmuError, TypeError), match=r"(?s)resid_pre.*resid_post.*mlp_out"):
        Site(1, "resid_pre")  # type: ignore[arg-type]
    assert str(Site(7, "mlp_out")) == "7.mlp_out"


def test_logits_need_the_whole_model() -> None:
    with pytest.raises(SrmuError, match="only 2 layers loaded"):
        EditableModel(pico_module(), ["0.mlp_down"], 2).logits(example())
    deep = EditableModel(pico_module(), ["0.mlp_down"], 4)
    assert deep.logits(example()).shape[-1] == deep.vocabulary_size == VOCABULARY


@pytest.mark.parametrize(
    ("layer", "window", "message"),
    [
        (4, 1, r"layer 4 does not exist: this model has 4 layers \(0-3\)"),
        (40, 3, r"layer 40 does not exist: this model has 4 layers \(0-3\)"),
        (-1, 1, "layer -1 does not exist"),
        (1, 3, "window of 3 layers ending at layer 1 is impossible: use method.window=1 to 2"),
        (0, 2, "window of 2 layers ending at layer 0 is impossible"),
        (3, 0, "window of 0 layers"),
    ],
)
def test_layers_and_windows_that_do_not_exist(layer: int, window: int, message: str) -> None:
    with pytest.raises(SrmuError, match=message):
        check_layers(SimpleNamespace(num_hidden_layers=4), layer, window)


@pytest.mark.parametrize(("layer", "window"), [(0, 1), (3, 1), (3, 4), (2, 3)])
def test_layers_and_windows_that_exist(layer: int, window: int) -> None:
    check_layers(SimpleNamespace(num_hidden_layers=4), layer, window)


def other_module(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_layer_without_an_mlp_module() -> None:
    """OPT keeps fc1 and fc2 in the layer itself: its down-projection is found, `mlp_out` is not."""
    sizes = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}
    module = other_module(transformers.OPTConfig(**sizes))
    model = EditableModel(copy.deepcopy(module), ["1.mlp_down"], 2)
    assert list(model.trained) == ["model.decoder.layers.1.fc2.weight"]
    expected, _ = whole(module, "model.decoder.layers.1.fc2", True, example())
    got = model.hidden(example(), Site(1, "mlp_post"))
    assert got.shape == (*example()["input_ids"].shape, 48)
    assert torch.equal(got.flatten(0, 1), expected.reshape(-1, 48))
    with pytest.raises(SrmuError, match=r"has no 'mlp'; it has .*fc1"):
        model.hidden(example(), Site(1, "mlp_out"))


def test_a_layer_without_the_role() -> None:
    """A Mamba layer has no MLP; a pattern of names still reaches a matrix."""
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    module = other_module(config)
    with pytest.raises(SrmuError, match=r"no weight in the role 'mlp_down'; it has .*mixer.out_pro"):
        EditableModel(module, ["1.mlp_down"])
    name = "backbone.layers.1.mixer.out_proj.weight"
    assert list(EditableModel(module, ["*.1.mixer.out_proj.*"]).trained) == [name]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64), r"ffn\.down_proj\.weight"),
        (transformers.Lfm2Config(num_hidden_layers=2, hidden_size=32, vocab_size=64), r"feed_forward\.w2\.weight"),
        (
            transformers.GraniteMoeConfig(**SIZES, intermediate_size=8),
            r"block_sparse_moe\.(experts\.down_proj|output_linear\.weight)",  # renamed after transformers 5.0
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else x.model_type,
)
def test_mlps_of_other_names(config: Any, name: str) -> None:
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    [found] = in_role(decoder_blocks(module)[1], "mlp_down")
    assert re.fullmatch(name, found)


def test_a_model_without_a_list_of_layers() -> None:
    module = pico_module()
    module.config.num_hidden_layers = 7
    with pytest.raises(SrmuError, match="no list of 7 decoder layers"):
        find_layers(module)


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_load_equals_the_module_that_was_saved(arch: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path, arch)
    model = EditableModel.load(folder, depth=2, trainable=["1.mlp_down"])
    expected, _ = whole(pico_module(arch), block_name(arch, 1), False, example())
    assert torch.equal(model.hidden(example(), Site(1)), expected)
    assert list(model.trained) == [down_name(arch, 1)]
    assert model.shallow
    assert read_config(folder).num_hidden_layers == 4


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_load_takes_the_dtype(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    folder = save_pico(tmp_path, dtype=torch.bfloat16)
    model = EditableModel.load(folder, depth=None, trainable=["1.mlp_down"], dtype=dtype)
    assert {p.dtype for p in model.module.parameters()} == {expected}
    assert not model.shallow


def test_a_checkpoint_that_lacks_a_tensor(tmp_path: Path) -> None:
    pico_module().save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SrmuError, match=f"lacks 1 tensors, the first is {name}"):
        load_module(tmp_path)


def test_a_checkpoint_with_a_tensor_of_another_shape(tmp_path: Path) -> None:
    pico_module().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(5, 32)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SrmuError, match="cannot be loaded"):
        load_module(tmp_path)


def test_a_tied_head_is_no_missing_tensor(tmp_path: Path) -> None:
    """Gemma and GPT-2 checkpoints hold no lm_head; transformers ties it to the embedding."""
    folder = save_pico(tmp_path, "gemma2")
    held = [key for file in folder.glob("*.safetensors") for key in load_file(file)]
    assert "lm_head.weight" not in held
    module = load_module(folder)
    assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
         "not a causal language model: its architecture is LlamaForSequenceClassification"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language"),
        ({"model_type": "llama"}, "its architecture is none named"),
        ({"model_type": "no-such-model", "architectures": ["NoForCausalLM"]}, "cannot be read"),
        ({}, "config.json"),
        ("{not json", "cannot be read"),
        (None, "has no config.json; name a Hugging Face model"),
    ],
)  # fmt: skip
def test_folders_that_are_no_causal_language_model(config: Any, message: str, tmp_path: Path) -> None:
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SrmuError, match=message):
        read_config(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SrmuError, match="has no config"):
        load_module(tmp_path)
    config = pico_module().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(SrmuError, match="cannot be loaded"):
        load_module(tmp_path)
    with pytest.raises(SrmuError, match=r"has no model\.safetensors"):
        load_module(tmp_path, depth=2)


def test_only_inside_only_trains_what_it_names() -> None:
    """What the outer block turned off gets gradients in the inner one, and is off again after it."""
    model = EditableModel(pico_module(), ["1.mlp_down", "2.mlp_down"])
    with model.only(["1.mlp_down"]):
        with model.only(["2.mlp_down"]):
            assert [p.requires_grad for p in model.trained.values()] == [False, True]
        assert [p.requires_grad for p in model.trained.values()] == [True, False]
    assert all(p.requires_grad for p in model.trained.values())


def test_an_interrupt_while_memory_is_released_is_not_lost() -> None:
    """Python only prints what a finaliser raises."""

    class Interrupts:
        def __init__(self) -> None:
            self.me = self  # only the collector finds it

        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)  # in this thread, at once

    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # else it may collect by itself, a moment too early
    try:
        Interrupts()
        with pytest.raises(KeyboardInterrupt):
            release_memory()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, found)
    release_memory()
