"""Loading no deeper than needed: the layers that are there are those of the whole model."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from helpers.models import ARCHITECTURES, GROUPED, SIZES, VOCABULARY, pico_module, save_pico, texts, word_tokenizer
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine import loading
from srmu.engine.activation_cache import Activations
from srmu.engine.loading import (
    check_layers,
    cut_config,
    find_layers,
    load_module,
    needs_conversion,
    read_config,
    refuse_sharing,
)
from srmu.engine.model import EditableModel, Site
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import TrainOptions
from srmu.engine.weights import list_shards
from srmu.errors import SrmuError
from srmu.methods import RMU
from srmu.methods.base import Session
from srmu.runs.config import Config, make_config
from srmu.runs.plan import plan_run
from srmu.runs.run import unlearn_config

LAYER, DEPTH = 2, 3
FUSED = {"mixtral", "qwen3_moe"}  # transformers stacks what the checkpoint stores by expert
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def batches(padding: Any = "mask") -> list[Batch]:
    tokenizer = word_tokenizer()
    return list(batch_rows(tokenise_texts(texts(5, 1), tokenizer, 64), tokenizer, 3, padding))


def plain(module: Any, batch: Any, layer: int = LAYER) -> Tensor:
    """What a hook on that layer sees in a full forward."""
    owner, attribute = find_layers(module)
    seen = []
    handle = getattr(owner, attribute)[layer].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        # With its cache on, GPT-J multiplies other strides, and gets other last bits.
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        module(**inputs, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def whole(folder: Path, dtype: str = "auto") -> Any:
    """The model as transformers gives it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def layers(module: Any) -> Any:
    owner, attribute = find_layers(module)
    return getattr(owner, attribute)


# --- what is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_converts(arch: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path, arch, torch.bfloat16)
    config = read_config(folder)
    assert needs_conversion(folder, config, "auto") == (arch in FUSED)
    assert needs_conversion(folder, config, "bfloat16") == (arch in FUSED)
    assert needs_conversion(folder, config, "float32")


def test_a_checkpoint_of_several_types_converts(tmp_path: Path) -> None:
    """One matrix in float32 among bf16: `auto` gives all of them the type that the config names."""
    module = pico_module(dtype=torch.bfloat16)
    module.model.layers[0].mlp.up_proj.float()
    module.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert needs_conversion(tmp_path, config, "bfloat16")
    assert needs_conversion(tmp_path, config, "float32")


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(("stored", "asked"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "float32")])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_shallow_load_has_the_layers_of_the_whole_model(arch: str, stored: str, asked: str, tmp_path: Path) -> None:
    """Built shallow, and mapped where loading does not convert."""
    folder = save_pico(tmp_path, arch, DTYPES[stored])
    module = load_module(folder, asked, DEPTH)
    converted = asked != "auto" or arch in FUSED
    assert len(layers(module)) == DEPTH
    assert mapped(module, folder) == (not converted)
    model = EditableModel(module, [f"{LAYER}.mlp_down"], DEPTH)
    expected = whole(folder, asked)
    assert len(model.layers) == DEPTH
    for batch in batches():
        assert torch.equal(model.hidden(batch, Site(LAYER)), plain(expected, batch))
    assert read_config(folder).num_hidden_layers == 4


def mapped(module: Any, folder: Path) -> bool:
    """Whether all parameters of the layers lie in the checkpoint's files, and none was copied."""
    pattern = rf"([0-9a-f]+)-([0-9a-f]+) .* {re.escape(str(folder))}/.*\.safetensors"
    found = re.findall(pattern, Path("/proc/self/maps").read_text())
    ranges = [(int(low, 16), int(high, 16)) for low, high in found]
    places = [parameter.data_ptr() for parameter in layers(module).parameters()]
    return all(any(low <= place < high for low, high in ranges) for place in places)


def test_training_leaves_the_mapped_file_alone(tmp_path: Path) -> None:
    folder = save_pico(tmp_path)
    before = {path: path.read_bytes() for path in set(list_shards(folder).values())}
    model = EditableModel.load(folder, depth=DEPTH, trainable=["*"])
    for parameter in model.trained.values():
        parameter.data.add_(1)
    assert set(model.delta()) == set(model.trained)
    assert all(path.read_bytes() == data for path, data in before.items())


# --- cutting a configuration ---------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cut_configuration_builds_the_first_layers(arch: str) -> None:
    config = pico_module(arch).config
    short = cut_config(config, DEPTH)
    assert short is not None
    assert (short.num_hidden_layers, config.num_hidden_layers) == (DEPTH, 4)
    build = transformers.AutoModelForCausalLM.from_config
    cut, full = build(short), build(config)
    shapes = {name: tensor.shape for name, tensor in layers(cut).state_dict().items()}
    assert shapes == {n: t.shape for n, t in layers(full)[:DEPTH].state_dict().items()}
    cut.load_state_dict({n: full.state_dict()[n] for n in cut.state_dict()})
    for batch in batches():
        assert torch.equal(plain(cut.eval(), batch), plain(full.eval(), batch))


@pytest.mark.parametrize(
    ("kinds", "window"),
    [
        (["full_attention", "full_attention", "sliding_attention", "sliding_attention"], 3),
        (["sliding_attention", "full_attention", "sliding_attention", "full_attention"], 2),
    ],
)
def test_a_pattern_of_layers_is_kept(kinds: list[str], window: int, tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**GROUPED, layer_types=kinds, use_sliding_window=True, sliding_window=window)
    short = cut_config(config, DEPTH)
    assert short is not None
    assert short.layer_types == kinds[:DEPTH]
    assert config.layer_types == kinds
    folder = other(config, tmp_path)
    expected = whole(folder, "bfloat16")
    module = load_module(folder, "bfloat16", DEPTH)
    assert len(layers(module)) == DEPTH
    for batch in batches():
        assert torch.equal(plain(module, batch), plain(expected, batch))


@pytest.mark.parametrize("what", ["a flag", "a number", "a shape", "a part", "an error"])
def test_layers_that_know_how_many_there_are(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An architecture whose layers would change with the depth is loaded whole."""
    folder = save_pico(tmp_path, dtype=torch.bfloat16)
    build = LlamaDecoderLayer.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        build(self, config, layer_idx)
        count = config.num_hidden_layers
        if what == "a flag":
            self.is_last = layer_idx == count - 1
        elif what == "a number":
            self.scale = count**-0.5
        elif what == "a shape":
            self.register_buffer("mark", torch.zeros(count), persistent=False)
        elif what == "a part":
            self.extra = torch.nn.Identity() if layer_idx == count - 1 else torch.nn.ReLU()
        elif count < 4:
            raise NotImplementedError("too shallow")

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", init)
    assert cut_config(read_config(folder), DEPTH) is None
    assert len(layers(load_module(folder, "float32", DEPTH))) == 4


# --- Gemma 3n and 4: the last layers read keys and values of earlier ones ------------------------

SHARING: dict[str, Any] = {
    **GROUPED,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
GEMMA: dict[str, Any] = {
    "gemma3n": (
        transformers.Gemma3nTextConfig,
        {
            **SHARING, "laurel_rank": 4, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    # of a later transformers than the lowest
    "gemma4": (getattr(transformers, "Gemma4TextConfig", None), {**SHARING, "global_head_dim": 8}),
}  # fmt: skip


def other(config: Any, folder: Path) -> Path:
    """A folder with a random model of that configuration, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    module.save_pretrained(folder, max_shard_size="40KB")
    return folder


def gemma(name: str, folder: Path) -> Path:
    cls, sizes = GEMMA[name]
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    try:
        refuse_sharing(config := cls(**sizes))
    except SrmuError as error:
        pytest.skip(str(error))
    return other(config, folder)


def test_an_old_transformers_that_would_share_keys_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Gemma3nTextConfig(**SHARING)
    monkeypatch.setattr(loading, "version", lambda name: "5.5.4")
    with pytest.raises(SrmuError, match=r"share keys and values, which .* 5\.5\.4 .*install transformers 5\.6"):
        refuse_sharing(config)


def by_token(value: Tensor) -> Tensor:
    """Activations as (B, T, D): Gemma 3n runs several streams side by side."""
    if value.ndim == 4:
        value = value.permute(1, 2, 0, 3).flatten(2)
    return value


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", GEMMA)
def test_models_that_share_keys_are_not_cut_wrongly(name: str, tmp_path: Path) -> None:
    folder = gemma(name, tmp_path)
    config = read_config(folder)
    assert not needs_conversion(folder, config, "auto")
    for dtype in ("auto", "bfloat16"):
        expected = whole(folder, dtype)
        for layer in range(4):
            role = f"{layer}.mlp_down"
            model = EditableModel.load(folder, depth=layer + 1, trainable=[role], dtype=dtype)
            model.activations = Activations(1 << 30)
            for batch in batches() * 2:
                wanted = by_token(plain(expected, batch, layer))
                assert torch.equal(model.hidden(batch, Site(layer)), wanted)
            assert model.activations.hits == (2 if layer else 0)


@pytest.mark.parametrize("name", GEMMA)
def test_a_token_of_a_sharing_model_is_its_own(name: str, tmp_path: Path) -> None:
    """A text's activations do not depend on what else is in its batch."""
    model = EditableModel.load(gemma(name, tmp_path), depth=DEPTH, trainable=["2.mlp_down"])
    batch = batches()[0]
    together = model.hidden(batch, Site(LAYER))
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        one = batch.cut(slice(row, row + 1), slice(None, length))
        alone = model.hidden(one, Site(LAYER))
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GEMMA)
def test_the_sharing_layers_are_refused(name: str, tmp_path: Path) -> None:
    config = read_config(gemma(name, tmp_path))
    for layer in range(4):
        check_layers(config, layer)
    for layer in (4, 5):
        with pytest.raises(SrmuError, match=rf"layer {layer} takes its keys.*last 2.*below 4"):
            check_layers(config, layer)
        with pytest.raises(SrmuError, match=r"choose method\.layer below 4"):
            RMU(layer=layer, kappa=1.0).resolved(config)
    with pytest.raises(SrmuError, match="layer 6 does not exist"):
        check_layers(config, 6)


@pytest.mark.parametrize("name", GEMMA)
def test_unlearning_a_sharing_model_equals_two_whole_ones(name: str, tmp_path: Path) -> None:
    folder = gemma(name, tmp_path)
    method = RMU(layer=3, window=2, coeff=3.0, alpha=7.0).resolved(read_config(folder))
    topic = Topic("t", batches()[:1], batches()[1:], seed=5)
    options = TrainOptions(learning_rate=4e-3, max_steps=3)
    results, direction, room = [], torch.empty(0), Activations(1 << 30)
    for kept in (Activations(), room, room):
        model = EditableModel.load(folder, depth=method.depth, trainable=method.trainable)
        assert model.fixed == 2
        model.activations = kept
        state = method.apply(model, [topic], Session(options, lambda *_: None)).states["t"]
        direction = state.tensors["direction"]
        results.append({n: p.detach() for n, p in model.trained.items()})

    live, first = whole(folder), whole(folder)
    named = {n: live.get_parameter(n) for n in results[0]}
    optimiser = torch.optim.AdamW(named.values(), lr=4e-3, weight_decay=0.0)

    def hidden(module: Any, batch: Any) -> Tensor:
        seen = []
        handle = layers(module)[3].register_forward_hook(lambda *a: seen.append(a[2]))
        module(batch["input_ids"], batch["attention_mask"])
        handle.remove()
        return by_token(seen[0][0] if isinstance(seen[0], tuple) else seen[0])

    def mse(value: Tensor, target: Tensor, batch: Any) -> Tensor:
        mask = batch["labels"] != -100
        return ((value - target).square().mean(dim=-1) * mask).sum() / mask.sum()

    for _ in range(3):
        forget, retain = topic.forget[0], topic.retain[0]
        with torch.no_grad():
            anchor = hidden(first, retain)
        loss = mse(hidden(live, forget), 3.0 * direction, forget)
        loss = loss + 7.0 * mse(hidden(live, retain), anchor, retain)
        live.zero_grad()
        loss.backward()
        optimiser.step()
    for name_, parameter in named.items():
        assert not torch.equal(parameter, first.get_parameter(name_))
        for result in results:
            assert torch.equal(result[name_], parameter), name_


@pytest.mark.parametrize("name", GEMMA)
def test_logits_of_a_sharing_model_repeat_themselves(name: str, tmp_path: Path) -> None:
    """The last layers need keys that a layer which is not run would not make."""
    folder, batch = gemma(name, tmp_path), batches()[0]
    model = EditableModel.load(folder, depth=None, trainable=["3.mlp_down"])
    model.activations = Activations(1 << 30)
    with torch.no_grad():
        expected = whole(folder)(batch["input_ids"], batch["attention_mask"]).logits
        for _ in range(2):
            assert torch.equal(model.logits(batch), expected)


# --- other layouts -------------------------------------------------------------------------------

BARE = {k: v for k, v in GROUPED.items() if k != "head_dim"}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
MIXED = {**BARE, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {
    **MIXED, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
LAYOUTS: dict[str, Any] = {
    "bloom": (transformers.BloomConfig, {**OLD, "hidden_size": 32}),
    "codegen": (transformers.CodeGenConfig, {**OLD, "rotary_dim": 4}),
    "cohere2": (transformers.Cohere2Config, {**GROUPED, "sliding_window": 4}),
    "deepseek_v3": (transformers.DeepseekV3Config, LATENT),
    "exaone4": (transformers.Exaone4Config, {**BARE, "sliding_window": 4}),
    "gemma": (transformers.GemmaConfig, GROUPED),
    "glm4": (transformers.Glm4Config, GROUPED),
    "gpt_bigcode": (transformers.GPTBigCodeConfig, OLD),
    "gpt_neo": (
        transformers.GPTNeoConfig,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 4, "num_heads": 4,
            "attention_types": [[["global", "local"], 2]], "window_size": 4,
        },
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "gptj": (transformers.GPTJConfig, {**OLD, "rotary_dim": 4}),
    "granite": (transformers.GraniteConfig, {**BARE, "embedding_multiplier": 3.0}),
    "nemotron": (transformers.NemotronConfig, BARE),
    "olmo3": (transformers.Olmo3Config, {**BARE, "sliding_window": 4}),
    "opt": (transformers.OPTConfig, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "persimmon": (transformers.PersimmonConfig, {**SIZES, "intermediate_size": 48}),
    "phimoe": (transformers.PhimoeConfig, {**BARE, "num_local_experts": 3}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {**MIXED, "shared_expert_intermediate_size": 24, "num_experts": 4},
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        {
            **MIXED, "head_dim": 8, "shared_expert_intermediate_size": 24, "num_experts": 4,
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": (transformers.Lfm2Config, {**BARE, "full_attn_idxs": [1, 3]}),
    "smollm3": (transformers.SmolLM3Config, BARE),
    "stablelm": (transformers.StableLmConfig, BARE),
    "starcoder2": (transformers.Starcoder2Config, BARE),
}  # fmt: skip


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_equal_a_plain_hook(name: str, tmp_path: Path) -> None:
    """Stored dtype and converted; run, replayed, and with another matrix in the trained place."""
    cls, sizes = LAYOUTS[name]
    folder = other(cls(**sizes), tmp_path)
    for dtype in ("auto", "bfloat16"):
        expected, role = whole(folder, dtype), f"{LAYER}.mlp_down"
        model = EditableModel.load(folder, depth=DEPTH, trainable=[role], dtype=dtype)
        model.activations = Activations(1 << 30)
        ran: list[int] = []
        for number, layer in enumerate(model.layers):
            next(layer.children()).register_forward_pre_hook(lambda *_, n=number, ran=ran: ran.append(n))
        for batch in (batches()[0], batches("count")[0]):
            ran.clear()
            wanted = plain(expected, batch)
            for _ in range(2):
                assert torch.equal(model.hidden(batch, Site(LAYER)), wanted)
            assert ran == [0, 1, 2, 2]
        for trained, parameter in model.trained.items():  # of routed and of shared experts
            parameter.data.mul_(1.5)
            expected.get_parameter(trained).data.mul_(1.5)
        changed = plain(expected, batch)
        assert not torch.equal(changed, wanted)
        assert torch.equal(model.hidden(batch, Site(LAYER)), changed)
        with model.frozen():
            assert torch.equal(model.hidden(batch, Site(LAYER)), wanted)


def test_layers_without_a_down_projection_are_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, state_size=4)
    folder = other(config, tmp_path)
    with pytest.raises(SrmuError, match=r"has no weight in the role 'mlp_down'; it has .*mixer.in_proj.weight"):
        EditableModel.load(folder, depth=DEPTH, trainable=[f"{LAYER}.mlp_down"])


# --- what cannot be loaded -----------------------------------------------------------------------


def config(folder: Path) -> Config:
    sources = [folder / "forget.jsonl", folder / "retain.jsonl"]
    given = ["method.layer=2", f"runs_dir={folder / 'runs'}"]
    return make_config(str(folder / "model"), *sources, "rmu", given)


def refused(folder: Path, *says: str) -> None:
    """Unlearning ends with one line that says all this, and leaves nothing."""
    with pytest.raises(SrmuError) as stop:
        unlearn_config(config(folder))
    assert "\n" not in str(stop.value)
    for part in says:
        assert part in str(stop.value)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq with 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_quantised_models(settings: dict[str, Any], kind: str, workplace: Path) -> None:
    path = workplace / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    says = f"is quantised ({kind}); name the model that it was quantised from"
    refused(workplace, str(workplace / "model"), says)
    with pytest.raises(SrmuError, match=re.escape(says)):
        plan_run(config(workplace))


def last_shard(folder: Path) -> tuple[Path, str]:
    """The file of a layer that no run of layer 2 needs, and its last tensor."""
    where = list_shards(folder)
    path = where["model.layers.3.mlp.down_proj.weight"]
    return path, max(name for name, file in where.items() if file == path)


def test_a_missing_shard(workplace: Path) -> None:
    path, _ = last_shard(workplace / "model")
    path.unlink()
    refused(workplace, f"lacks {path.name}, which its index names")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_shard(size: int, workplace: Path) -> None:
    path = list_shards(workplace / "model")["model.layers.1.mlp.down_proj.weight"]
    data = path.read_bytes()
    path.write_bytes(data[:size])
    refused(workplace, str(path), "is damaged")


def test_a_shard_without_a_tensor_that_the_index_names(workplace: Path) -> None:
    path, _ = last_shard(workplace / "model")
    wanted = next(file for file in set(list_shards(workplace / "model").values()) if file != path)
    path.write_bytes(wanted.read_bytes())
    refused(workplace, str(path), "lacks the tensor ", "which the index names")


def test_a_whole_model_is_not_kept_by_a_cut_one(tmp_path: Path) -> None:
    """The layers above are let go: nothing refers to them any more."""
    folder = save_pico(tmp_path)
    model = EditableModel.load(folder, depth=2, trainable=["1.mlp_down"])
    names = {name for name, _ in model.module.named_parameters()}
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in names)
    copied = copy.deepcopy(model.module)
    assert sum(p.numel() for p in copied.parameters()) < sum(p.numel() for p in whole(folder).parameters())


@pytest.mark.parametrize(("stored", "named"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_dtype_of_the_config_holds_at_every_depth(stored: str, named: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path, dtype=DTYPES[stored])
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": named}))
    for depth in (None, 2, 4):
        assert load_module(folder, "auto", depth).dtype == DTYPES[named]
    assert needs_conversion(folder, read_config(folder), "auto")
    assert not needs_conversion(folder, read_config(folder), stored)


class Pair(torch.nn.Module):
    """A layer that hands the next one indices besides its output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return self.layer(hidden, *args, **kwargs), torch.zeros(1, dtype=torch.long)


def test_nothing_stands_in_for_a_layer_that_gives_indices() -> None:
    model = EditableModel(pico_module(), ["2.mlp_down"], 3)
    model.layers[1] = Pair(model.layers[1])
    ids = torch.randint(4, 60, (2, 5))
    with pytest.raises(Exception):  # noqa: B017 - Llama does not know what to do with them
        model.hidden(Batch(input_ids=ids, attention_mask=torch.ones_like(ids)), Site(2))
    assert not model.activations.recent


def test_the_head_is_not_copied_for_each_text(tmp_path: Path) -> None:
    """torch multiplies states that are cut out of longer texts with a copy of a frozen head each."""

    def count_batched(module: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
            module.requires_grad_(False)(torch.randint(0, 9, (3, 5)), logits_to_keep=1)
        return sum(event.name == "aten::bmm" for event in seen.events() or ())

    folder = save_pico(tmp_path)
    plain_module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert count_batched(load_module(folder)) == count_batched(plain_module) - 1
