"""Models that read images beside text: their text part is unlearned, and everything else stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import srmu
from helpers import architectures
from helpers.image_models import IMAGE_MODELS
from helpers.models import word_tokenizer
from srmu.engine.loading import load_module, load_pretrained, read_config
from srmu.engine.progress import ignore_progress
from srmu.errors import SrmuError
from srmu.runs.adapter import export_adapter
from srmu.runs.config import make_config
from srmu.runs.estimate import plan_dry_run

IDS = torch.tensor([[1, 20, 21, 22, 23, 24], [1, 30, 31, 32, 0, 0]])
MASK = (IDS > 0).long()
ENDS = ["gemma3", "llama4", "llava", "qwen2_5_vl", "qwen3_vl_moe"]  # of each kind of name and of class


@torch.no_grad()
def ask(module: Any) -> torch.Tensor:
    return module(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK == 1]


def write_world(kind: str, place: Path) -> Path:
    if architectures.tiny_module(kind) is None:
        pytest.skip(f"transformers {transformers.__version__} builds no tiny {kind}")
    architectures.write_world(kind, place)
    (place / "model" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    return place / "model"


@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_the_text_part_answers_as_the_whole(kind: str, tmp_path: Path) -> None:
    folder = write_world(kind, tmp_path)
    whole, text = load_pretrained(folder), load_module(folder)
    assert type(whole).__name__.endswith("ForConditionalGeneration")
    assert text.num_parameters() < whole.num_parameters()
    torch.testing.assert_close(ask(text), ask(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ENDS)
def test_an_export_is_the_whole_with_other_text_weights(kind: str, tmp_path: Path) -> None:
    folder, run = write_world(kind, tmp_path), architectures.try_run(tmp_path, "activations")
    out = run.export(tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (folder, out))
    assert [*before] == [*after]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("down_proj" in name and "vision" not in name for name in changed)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert type(load_pretrained(out)) is type(load_pretrained(folder))
    with srmu.runs.run.open_target(run).after() as module:
        torch.testing.assert_close(ask(load_pretrained(out)), ask(module), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "part"), [("gemma3", "*.o_proj"), ("llama4", "*.o_proj"), ("llava", "lm_head")])
def test_an_adapter_is_one_of_the_whole(kind: str, part: str, tmp_path: Path) -> None:
    write_world(kind, tmp_path)
    given = [tmp_path / "forget.jsonl", tmp_path / "neutral.jsonl"]
    options = [f"method.parameters=['{part}.weight']", "method.alpha=1.2", f"runs_dir={tmp_path / 'runs'}"]
    run = srmu.unlearn(make_config(str(tmp_path / "model"), *given, "ssd", options), watch=ignore_progress)
    found = export_adapter(run, tmp_path / "adapter", 0.01)
    modules = dict(load_pretrained(tmp_path / "model").named_modules())
    assert found["modules"] and found["modules"].keys() <= modules.keys()
    assert found["logits"] < 0.02
    merged = load_module(srmu.engine.weights.locate_model(str(tmp_path / "adapter")))
    with srmu.runs.run.open_target(run).after() as module:
        torch.testing.assert_close(ask(merged), ask(module), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ENDS)
def test_in_memory_the_whole_model_changes(kind: str, tmp_path: Path) -> None:
    whole = load_pretrained(write_world(kind, tmp_path))
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    asked = ask(whole)
    given = {"forget": ["w1 w2 w3 w4"] * 4, "retain": ["w5 w6 w7 w8"] * 4, "max_length": 16}
    train = {"max_steps": 2, "batch_size": 2, "learning_rate": 0.01}
    got, result = srmu.unlearn(whole, word_tokenizer(), method="npo", train=train, watch=ignore_progress, **given)
    assert got is whole and not torch.equal(ask(whole), asked)
    changed = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, before[name])}
    named = dict(whole.named_parameters())
    assert all(torch.equal(named[name], tensor) for name, tensor in result.delta.items())
    assert result.record["change"]["tensors"].keys() == result.delta.keys()
    assert changed and not any("vision" in name or "visual" in name for name in changed)


def test_a_plan_counts_the_text_part_alone(tmp_path: Path) -> None:
    folder = write_world("qwen2_5_vl", tmp_path)
    texts = [tmp_path / "forget.jsonl", tmp_path / "neutral.jsonl"]
    _, found, _ = plan_dry_run(make_config(str(folder), *texts, "npo", []))
    text = load_module(folder)
    assert found["bytes_read"] == 4 * text.num_parameters()
    assert found["tensors_read"] == len(text.state_dict())


def test_other_parts_may_have_another_type(tmp_path: Path) -> None:
    folder = write_world("llava", tmp_path)
    whole = load_pretrained(folder)
    whole.model.vision_tower.to(torch.float16)
    whole.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))
    run = architectures.try_run(tmp_path, "likelihood")
    out = load_file(run.export(tmp_path / "out") / "model.safetensors")
    assert {t.dtype for name, t in out.items() if name.startswith("vision")} == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("kosmos-2", {}, "builds the text part of kosmos-2 .* only inside the whole"),
        ("whisper", {"architectures": ["WhisperForConditionalGeneration"]}, "is not a causal language model"),
        ("gemma3", {"architectures": None}, "its architecture is none named"),
        ("gemma3", {"architectures": [3]}, "its architecture is 3"),
        ("gemma3", {"architectures": ["Gemma3Model"]}, "its architecture is Gemma3Model"),
        ("gemma3", {"architectures": ["NoSuchForConditionalGeneration"]}, "its architecture is NoSuch"),
        ("gemma3", {"text_config": [1]}, "config.json cannot be read"),
        ("llama", {"quantization_config": [1]}, "config.json cannot be read"),
    ],
)
def test_what_has_no_text_part_of_its_own(kind: str, change: Any, line: str, tmp_path: Path) -> None:
    config = transformers.CONFIG_MAPPING[kind](architectures=["X"]).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SrmuError, match=line):
        read_config(tmp_path)
