"""Mixtures of experts: every method reaches routed and shared experts, and says where tokens go after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import srmu
from helpers import architectures
from helpers.models import word_tokenizer
from srmu.engine.generate import batch_texts
from srmu.engine.loading import load_module
from srmu.engine.model import EditableModel
from srmu.engine.progress import ignore_progress
from srmu.engine.sites import catch_choices, find_routers
from srmu.errors import SrmuError
from srmu.methods import SRMU, RepSelect
from srmu.methods.repselect import damp_directions, damp_experts
from srmu.runs.effect import format_percent
from srmu.runs.run import open_target

# shared experts beside the routed ones, a gate before them, none of both, and stacks of another form
KINDS = ["deepseek_v2", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe_text", "llama4_text"]
STACKS = [*KINDS, "jetmoe"]  # whose stacks have other names
SHARED = {"deepseek_v2": "shared_experts", "qwen2_moe": "shared_expert", "qwen3_5_moe_text": "shared_expert",
          "llama4_text": "shared_expert"}  # fmt: skip
TEXTS: dict[str, Any] = {"forget": ["w1 w2 w3 w4"] * 8, "retain": ["w5 w6 w7 w8"] * 8, "max_length": 16}
TRAIN = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01}


def build(kind: str) -> Any:
    if (module := architectures.tiny_module(kind)) is None:
        pytest.skip(f"transformers {transformers.__version__} builds no tiny {kind}")
    return module


def unlearn(kind: str, method: Any, **train: Any) -> tuple[Any, Any, set[str]]:
    """The model, the result, and the names in a layer of the tensors that changed."""
    module = build(kind)
    options = {k: v for k, v in (TRAIN | train).items() if k != "learning_rate" or not isinstance(method, RepSelect)}
    given = {"method": method, "train": options, "watch": ignore_progress}
    _, result = srmu.unlearn(module, word_tokenizer(), **given, **TEXTS)
    return module, result, {name.split(".", 3)[3] for name in result.delta if ".layers." in name}


@pytest.mark.parametrize("kind", KINDS)
def test_a_misdirection_reaches_routed_and_shared_experts(kind: str) -> None:
    _, result, changed = unlearn(kind, SRMU(layer=3, window=2))
    place = "feed_forward" if kind == "llama4_text" else "mlp"
    expected = {f"{place}.experts.down_proj"}
    expected |= {f"{place}.{SHARED[kind]}.down_proj.weight"} if kind in SHARED else set()
    assert expected <= changed <= expected | {f"{place}.down_proj.weight"}  # a layer may have no experts
    assert result.record["reach"]["left"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_whole_mlps_and_routers(kind: str) -> None:
    _, _, changed = unlearn(kind, SRMU(layer=3, window=1, matrices="mlp", router=True))
    assert any(name.endswith("experts.gate_up_proj") for name in changed)
    assert any("router" in name or name.endswith("gate.weight") for name in changed)
    assert not any("attn" in name for name in changed)
    _, _, without = unlearn(kind, SRMU(layer=3, window=1, matrices="mlp"))
    ends = (".gate.weight", "expert_gate.weight")
    assert without == {name for name in changed if "router" not in name and not name.endswith(ends)}


def test_a_router_where_there_is_none() -> None:
    with pytest.raises(SrmuError, match=r"method\.router=true, but no layer that is updated has a router"):
        unlearn("llama", SRMU(layer=3, router=True))


@pytest.mark.parametrize("kind", ["jamba", "deepseek_v2"])
def test_layers_without_experts_beside_others(kind: str) -> None:
    _, _, changed = unlearn(kind, SRMU(layer=1, window=2, router=True))
    assert any("router" in name or name.endswith("gate.weight") for name in changed)


def test_a_router_that_names_no_token_ends_no_run() -> None:
    unlearn("jetmoe", SRMU(layer=3))


@pytest.mark.parametrize("kind", STACKS)
def test_adapters_reach_experts(kind: str) -> None:
    """The model with adapters, and with what they learned merged, are the same; then it is an ordinary one."""
    model = EditableModel(build(kind), ["*.linear"])
    parts = [type(part) for part in model.module.modules()]
    batch = batch_texts([[1, 5, 6, 7], [1, 8, 9]])
    with model.adapted(2, 4, 0):
        assert sum("expert" in name or "put_linear" in name for name in model.trained) >= 2
        for parameter in model.trained.values():
            parameter.data = 0.1 * torch.randn_like(parameter)
        with torch.no_grad():
            beside = model.logits(batch)
        model.merge()
    assert [type(part) for part in model.module.modules()] == parts
    assert not any(nn.utils.parametrize.is_parametrized(part) for part in model.module.modules())
    changed = model.delta()
    assert {name for name, p in model.trained.items() if p.ndim == 3} <= changed.keys()
    with torch.no_grad():
        merged = model.logits(batch)
    torch.testing.assert_close(merged, beside, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_repselect_reaches_experts(kind: str) -> None:
    _, _, changed = unlearn(kind, RepSelect(components=2, lora_rank=2))
    assert any(name.endswith("experts.gate_up_proj") for name in changed)


def test_damping_takes_each_expert_alone() -> None:
    stack = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    found = damp_experts(stack, stack, 2)
    assert all(torch.equal(found[i], damp_directions(one, one, 2)) for i, one in enumerate(stack))


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v2"])
def test_a_run_says_how_many_tokens_go_to_other_experts(kind: str) -> None:
    """Counted again here; what an expert gets changes by no more than that."""
    before = build(kind)
    module, result, _ = unlearn(kind, SRMU(layer=3, window=2), learning_rate=0.3)
    effect = result.record["effect"]
    numbers = effect["topics"]["topic"]
    share = format_percent(numbers["forget_rerouted"])
    assert f"{share} of forget tokens go to other experts" in effect["sentences"][0]
    ids = torch.tensor([word_tokenizer()(TEXTS["forget"][0])["input_ids"]])
    chosen, loads = [], []
    for one in (before, module):
        edited = EditableModel(one, ["*"])
        routers = [router for layer in edited.layers[2:] for router in find_routers(layer)]
        with catch_choices(routers) as caught, torch.no_grad():
            one(ids, use_cache=False)
        chosen.append(torch.stack(caught))
        loads.append(torch.stack([torch.bincount(c.flatten(), minlength=4) / c.numel() for c in caught]))
    moved = (chosen[0] != chosen[1]).any(-1).float().mean()
    assert moved > 0
    assert numbers["forget_rerouted"] == pytest.approx(float(moved), abs=1e-6)
    assert (loads[0] - loads[1]).abs().sum(-1).max() <= 2 * float(moved) * len(routers) + 1e-6


def test_a_dense_model_has_no_routers() -> None:
    assert not any(find_routers(layer) for layer in EditableModel(build("llama"), ["*"]).layers)
    _, result, _ = unlearn("llama", SRMU(layer=3))
    assert "forget_rerouted" not in result.record["effect"]["topics"]["topic"]


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "deepseek_v2"])
@pytest.mark.parametrize("family", ["likelihood", "activations", "LoRA", "gradients"])
def test_an_export_of_experts_is_the_run(kind: str, family: str, tmp_path: Path) -> None:
    """Keys and logits, through transformers' own conversion of stored experts."""
    build(kind)
    architectures.write_world(kind, tmp_path)
    run = architectures.try_run(tmp_path, family)
    out = run.export(tmp_path / "out")
    ids = torch.tensor([[1, 20, 21, 22]])
    with torch.no_grad(), open_target(run).after() as module:
        torch.testing.assert_close(load_module(out)(ids).logits, module(ids).logits, rtol=1e-4, atol=1e-4)
    keys = [srmu.engine.weights.stored_entries(place).keys() for place in (tmp_path / "model", out)]
    assert keys[0] == keys[1]
