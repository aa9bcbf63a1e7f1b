"""Quantised checkpoints, written here: FP8 and MXFP4 become bfloat16 once, the others are refused with a way out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import architectures
from helpers.models import pico_module, save_pico, texts, word_tokenizer, write_jsonl
from srmu.engine import quantised
from srmu.engine.loading import load_module, read_config
from srmu.engine.quantised import refuse_quantised
from srmu.engine.weights import locate_model
from srmu.errors import SrmuError
from srmu.runs.config import make_config
from srmu.runs.estimate import plan_dry_run
from srmu.runs.run import unlearn_config

FOURS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # what four bits can be, with a sign


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": quantisation}))


def write_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny model with matrices in FP8, scaled by blocks of 16; the matrices as bfloat16."""
    pico_module("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        weight = tensors[name].float()
        blocks = weight.reshape(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        eighths = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = eighths.reshape(weight.shape), scale
        expected[name] = (eighths.float() * scale[:, None, :, None]).reshape(weight.shape).bfloat16()
    kind = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    rewrite(folder, tensors, kind)
    return expected


def write_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny gpt-oss with experts of four bits in blocks of 32; the experts as bfloat16."""
    config = architectures.tiny_config("gpt_oss")
    config.intermediate_size = 64
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        inputs -= inputs % 32
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=torch.Generator().manual_seed(0))
        scales = torch.randint(120, 124, codes.shape[:-1], dtype=torch.uint8)
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = scales
        values = FOURS[codes % 8] * (1 - 2 * (codes // 8)) * torch.exp2(scales.float() - 127)[..., None]
        expected[name] = values.reshape(experts, outputs, inputs).transpose(1, 2).bfloat16()
    rewrite(folder, tensors, {"quant_method": "mxfp4"})
    return expected


@pytest.mark.parametrize(("kind", "write"), [("fp8", write_fp8), ("mxfp4", write_mxfp4)])
def test_scaled_numbers_become_bfloat16(kind: str, write: Any, tmp_path: Path, capsys: Any) -> None:
    expected = write(tmp_path / "model")
    settings = {"eos_token_id": [2, 5], "bos_token_id": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "model" / "LICENSE").write_text("as it was")
    folder = locate_model(str(tmp_path / "model"))
    assert f"dequantising {tmp_path / 'model'} ({kind}), once" in capsys.readouterr().err
    found = dict(load_module(folder).named_parameters())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    assert (folder / "LICENSE").read_text() == "as it was"
    assert locate_model(str(tmp_path / "model")) == folder
    assert not capsys.readouterr().err


def test_a_run_on_fp8_names_where_its_model_came_from(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    files = [write_jsonl(tmp_path / f"{name}.jsonl", texts(8, i)) for i, name in enumerate(("forget", "retain"))]
    given = [f"runs_dir={tmp_path / 'runs'}", "train.max_steps=2", "train.batch_size=2"]
    run = unlearn_config(make_config(str(tmp_path / "model"), *files, "srmu", given))
    source = run.record["base"]["quantised"]
    assert (source["folder"], source["quantisation"]) == ("model", "fp8")
    out = run.export(tmp_path / "out")
    assert (out / "preprocessor_config.json").is_file()
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_a_damaged_fp8_folder(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(SrmuError, match=r"model cannot be dequantised: .*; name the model that it was quantised from"):
        locate_model(str(tmp_path / "model"))
    assert not [*(tmp_path / "cache" / "dequantised").glob("*/model")]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq with 4 bits\); name the model that it was quantised"),
        ({"quant_method": "awq", "bits": 4}, r"quantised \(awq with 4 bits\); name the model"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"\(bitsandbytes\); .*save what model\.dequantize\(\)",
        ),
        ({"quant_method": "compressed-tensors"}, r"compressed-tensors\); .*run_compressed=False"),
        ({"group_size": 64, "bits": 4}, r"quantised \(mlx with 4 bits\); .*mlx_lm\.convert --dequantize"),
        ({"quant_method": "hqq"}, r"quantised \(hqq\); name the model"),
        ({"format": "own"}, r"quantised \(in an unknown way\); name the model"),
    ],
)
def test_other_quantisations_are_refused_with_a_way_out(settings: Any, line: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(SrmuError, match=line) as caught:
        refuse_quantised(locate_model(str(folder)), read_config(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("scale", r"holds model\.layers\.1\.mlp\.up_proj\.weight in FP8 without .*_scale_inv"),
        ("tensor", "lacks 1 tensors, the first is model.embed_tokens.weight"),
    ],
)
def test_what_would_be_filled_with_other_numbers(change: str, line: str, tmp_path: Path) -> None:
    write_fp8(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight_scale_inv" if change == "scale" else "model.embed_tokens.weight"
    save_file(
        {k: v for k, v in tensors.items() if k != gone}, tmp_path / "model" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(SrmuError, match=line):
        locate_model(str(tmp_path / "model"))
    assert not [*(tmp_path / "cache" / "dequantised").glob("*/model")]


def test_a_model_that_another_process_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_fp8(tmp_path / "model")
    keep = quantised.keep_folder

    def keep_twice(*given: Any, **options: Any) -> None:
        keep(*given, **options)
        keep(*given, **options)

    monkeypatch.setattr(quantised, "keep_folder", keep_twice)
    found = dict(load_module(locate_model(str(tmp_path / "model"))).named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_plan_needs_the_config_alone(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        if file.name != "config.json":
            file.unlink()
    _, found, _ = plan_dry_run(make_config(str(tmp_path / "model"), "none", "none", "srmu", []))
    assert found["layers"] == 4


def test_a_model_in_memory_with_quantised_weights() -> None:
    config = transformers.LlamaConfig()
    config.quantization_config = transformers.AwqConfig(bits=4)
    with pytest.raises(SrmuError, match=r"quantised \(awq with 4 bits\)"):
        refuse_quantised("model", config)


def test_a_quantised_model_of_images_and_text_is_refused(tmp_path: Path) -> None:
    architectures.tiny_module("gemma3").save_pretrained(tmp_path)
    rewrite(tmp_path, load_file(tmp_path / "model.safetensors"), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(SrmuError, match="gptq"):
        refuse_quantised(tmp_path, read_config(tmp_path))
