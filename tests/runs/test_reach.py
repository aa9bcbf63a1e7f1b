"""What a run reached: said before it, at its end, and in its record."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from helpers.models import GROUPED, Call, pico_module, word_tokenizer
from srmu.methods import METHODS
from srmu.runs.model_card import write_model_card
from srmu.runs.reach import describe_reach, explain_reach
from srmu.runs.run import Run

SIZES = {k: v for k, v in GROUPED.items() if k != "head_dim"}
EXPERTS = 4


def shared_experts(place: Path, **sizes: int) -> Path:
    """A mixture of experts, of which a token reads one of four and the shared one."""
    given = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1} | sizes
    config = transformers.Qwen2MoeConfig(**SIZES, **given, num_experts=EXPERTS, num_experts_per_tok=1)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    word_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def mixture(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return shared_experts(workplace / "experts")


def shares(module: torch.nn.Module, ends: tuple[str, ...]) -> float:
    """The share of numbers on a token's path whose names end so, by counting them one by one."""
    sizes = {n: p.numel() / (EXPERTS if ".experts." in n else 1) for n, p in module.named_parameters()}
    return sum(size for name, size in sizes.items() if name.endswith(ends)) / sum(sizes.values())


TEXTS = ("--model", "experts", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "train.max_steps=2")
LORA = ("--method", "npo", "method.lora_rank=2", "train.learning_rate=0.1")
RMU = ("--method", "rmu", "method.layer=2", "train.learning_rate=0.01")
PART = ("--method", "npo", "method.parameters=['*.shared_expert.down_proj.weight']", "train.learning_rate=0.1")
ROUTED = {f"model.layers.{i}.mlp.experts.down_proj" for i in range(4)}


@pytest.mark.parametrize(("given", "left"), [(LORA, set()), (RMU, set()), (PART, ROUTED)])
def test_what_stays_of_a_role_is_said(given: tuple[str, ...], left: set[str], mixture: Path, call: Call) -> None:
    """Before the run, at its end, in its record and on the model card."""
    before = json.loads(call("inspect", "experts", *given[:2], *given[2:3], "--json").out)
    answer = call("unlearn", *TEXTS, *given)
    assert answer.code == 0, answer.err
    kind = "mlp.experts.down_proj"
    line = (
        f"NOT changed, though of the same kind and in these layers: {len(left)} ({kind})"
        if left
        else "every matrix of this kind"
    )
    assert line in answer.out
    (folder,) = Path("runs").iterdir()
    record = Run.open(folder).record
    assert set(record["reach"]["left"]) == left
    assert before["reach"] == record["reach"]
    assert explain_reach(record["reach"]) in answer.out
    assert explain_reach(record["reach"]) in write_model_card(record)
    module = transformers.AutoModelForCausalLM.from_pretrained("experts")
    assert record["reach"]["share_of_path"] == pytest.approx(shares(module, tuple(record["changed"])))
    assert record["reach"]["matrices"] == len(record["changed"])


def test_a_dense_model_is_covered() -> None:
    module = pico_module()
    downs = [name for name, _ in module.named_parameters() if "down_proj" in name][:3]
    reach = describe_reach(module, downs)
    share = sum(module.get_parameter(name).numel() for name in downs) / module.num_parameters()
    assert reach == {"matrices": 3, "left": [], "share_of_path": pytest.approx(share)}
    assert "every matrix of this kind in these layers" in explain_reach(reach)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"retrain"}))
def test_every_method_says_what_it_would_reach(name: str, mixture: Path, call: Call) -> None:
    answer = call("inspect", "experts", "--method", name, "--json")
    assert answer.code == 0, answer.err
    reach = json.loads(answer.out)["reach"]
    assert reach["matrices"] > 0
    assert 0 < reach["share_of_path"] <= 1


def test_adapters_go_beside_experts(tmp_path: Path, mixture: Path, call: Call) -> None:
    """Where some layers have experts and others none, peft would look for adapters that are not there."""
    config = transformers.Glm4MoeConfig(
        **GROUPED, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
        n_group=1, topk_group=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("experts")
    answer = call("unlearn", *TEXTS, *LORA)
    assert answer.code == 0, answer.err
    (folder,) = Path("runs").iterdir()
    assert sum("experts.gate_up_proj" in name for name in Run.open(folder).record["changed"]) == 3
