"""Texts, padding and random tokens that a model has no row for, and tensors that transformers names anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.models import pico_module, save_pico, texts, word_tokenizer, write_jsonl
from srmu.engine.model import EditableModel
from srmu.errors import SrmuError
from srmu.evals.analyses import measure_confidence, open_model
from srmu.methods import SRMU
from srmu.runs.config import make_config
from srmu.runs.in_memory import unlearn
from srmu.runs.run import Run, open_target, unlearn_config


def make_run(folder: Path, *overrides: str, method: str = "srmu", **options: Any) -> Run:
    sources = [folder / "forget.jsonl", folder / "retain.jsonl"]
    quick = [f"runs_dir={folder / 'runs'}", "train.max_steps=2", "train.learning_rate=0.01", *overrides]
    return unlearn_config(make_config(str(folder / "model"), *sources, method, quick), **options)


def grow_tokenizer(folder: Path, *tokens: str, **special: Any) -> None:
    """More tokens than the model's embedding has rows."""
    tokenizer = word_tokenizer(**special)
    tokenizer.add_tokens([*tokens])
    tokenizer.save_pretrained(folder / "model")


def test_padding_that_is_masked_needs_no_row(workplace: Path) -> None:
    grow_tokenizer(workplace, pad_token="<new>")
    assert word_tokenizer(pad_token="<new>").pad_token_id == 64
    grown = make_run(workplace).delta
    word_tokenizer().save_pretrained(workplace / "model")
    usual = make_run(workplace, "runs_dir=" + str(workplace / "usual")).delta
    assert all(torch.equal(grown[name], tensor) for name, tensor in usual.items())
    grow_tokenizer(workplace, pad_token="<new>")
    with pytest.raises(SrmuError, match="gives token 64, but the model knows 64 tokens"):
        make_run(workplace, "train.padding=count")  # counted in the loss


@pytest.mark.parametrize("overrides", [["method.anchors=random"], ["method.anchors=random", "cache=none"]])
def test_random_tokens_are_drawn_from_those_that_the_model_has(workplace: Path, overrides: list[str]) -> None:
    grow_tokenizer(workplace, *(f"new{i}" for i in range(2000)))
    assert make_run(workplace, *overrides).record["steps"] == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(workplace / "model")
    quick = {"max_steps": 2, "learning_rate": 0.01}
    drawn = SRMU(anchors="random")
    _, result = unlearn(pico_module(), tokenizer, forget=texts(6, 1), retain=texts(6, 2), method=drawn, train=quick)
    assert result.record["steps"] == 2


BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
SEVERAL = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2}
OTHERS = {
    "openai-gpt": transformers.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    "granitemoe": transformers.GraniteMoeConfig(**SEVERAL, num_local_experts=4, num_experts_per_tok=2),
}
SHORT = {
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=8),
    "opt": transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=8, pad_token_id=0,
    ),
    "gptj": transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=8, rotary_dim=4),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_a_text_longer_than_the_table_of_positions_is_named(name: str, workplace: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(SHORT[name]).save_pretrained(workplace / "short")
    word_tokenizer().save_pretrained(workplace / "short")
    model = ["model=" + str(workplace / "short"), "method.layer=2"]
    with pytest.raises(SrmuError, match=r"topic topic: a text has \d+ tokens, and the model 8 positions: set topics"):
        make_run(workplace, *model)
    lists = {"forget": texts(6, 1), "retain": texts(6, 2)}
    measure_confidence(*open_model(workplace / "short"), lists)  # reads what the table has room for
    assert make_run(workplace, *model, "topics.topic.max_length=8").record["steps"] == 2


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt_neox"])
def test_rotary_positions_have_no_end(name: str) -> None:
    assert EditableModel(pico_module(name), ["*"]).position_count is None


@pytest.mark.parametrize("method", ["rmu", "npo"])
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_forms(name: str, method: str, workplace: Path) -> None:
    """Layers that return a list; experts that are stored as they are, under another name."""
    transformers.AutoModelForCausalLM.from_config(OTHERS[name]).save_pretrained(workplace / "other")
    word_tokenizer().save_pretrained(workplace / "other")
    layer = ["method.layer=2"] if method == "rmu" else []
    run = make_run(workplace, f"model={workplace / 'other'}", *layer, method=method, out=workplace / "out")
    assert run.delta and (workplace / "out").is_dir()


def test_a_tokenizer_that_needs_a_library_says_which(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srmu.runs.plan.find_spec", lambda name: None)
    (workplace / "model" / "tokenizer.json").unlink()
    (workplace / "model" / "tokenizer.model").write_bytes(b"\n\x0e\n")
    (workplace / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(
        SrmuError, match=r"a tokenizer\.model alone, needs a library: pip install sentencepiece protobuf"
    ):
        make_run(workplace)


def test_a_head_under_another_name_is_written_back(tmp_path: Path) -> None:
    """GPT-NeoX stores embed_out, which transformers calls lm_head."""
    save_pico(tmp_path / "model", "gpt_neox")
    write_jsonl(tmp_path / "forget.jsonl", texts(6, 1, range(30)))
    write_jsonl(tmp_path / "retain.jsonl", texts(6, 2, range(20, 60)))
    run = make_run(tmp_path, method="npo", out=tmp_path / "out")  # compared with the run before it is written
    assert "embed_out.weight" in run.delta
    with open_target(run, "cpu").after() as module:
        assert torch.equal(module.get_output_embeddings().weight, run.delta["embed_out.weight"])
