"""GGUF files and adapters, written here: made ordinary models once, and the record says where they came from."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.gguf_files import ARCHES, Q8, write_gguf
from helpers.models import Call, save_pico, texts, write_jsonl
from srmu.engine import converted as reader
from srmu.engine.weights import locate_model, stored_types
from srmu.errors import SrmuError
from srmu.runs.config import make_config
from srmu.runs.run import Run, unlearn_config
from srmu.runs.verify import verify_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", [None, Q8], ids=["F32", "Q8_0"])
@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_read_is_what_was_stored(arch: str, kind: Any, tmp_path: Path) -> None:
    """To the last bit of bfloat16, in a folder that plain transformers loads."""
    expected = write_gguf(tmp_path / "m.gguf", arch, kind)
    folder = locate_model(str(tmp_path / "m.gguf"))
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = {name: tensor for name, tensor in module.state_dict().items() if name in expected}
    assert found.keys() == expected.keys() and module.dtype == torch.bfloat16
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert reader.read_source(folder)["gguf"]["quantisation"] == ("F32" if kind is None else "Q8_0")


def test_a_file_is_dequantised_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its name; what a killed process left behind is not taken for the model."""
    write_gguf(tmp_path / "a.gguf")
    first = locate_model(str(tmp_path / "a.gguf"))
    assert "dequantising" in capsys.readouterr().err
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    assert locate_model(str(tmp_path / "b.gguf")) == first
    assert "dequantising" not in capsys.readouterr().err
    first.rename(first.with_name(".model.killed"))
    assert locate_model(str(tmp_path / "b.gguf")) == first and (first / "model.safetensors").is_file()


def test_a_run_on_a_gguf_file(tmp_path: Path) -> None:
    """Its record names the file's digest and quantisation, and can be verified."""
    write_gguf(tmp_path / "m.gguf", kind=Q8)
    for seed, role in enumerate(("forget", "retain")):
        words = [text.replace("w", "x") for text in texts(8, seed=seed, words=range(40))]
        write_jsonl(tmp_path / f"{role}.jsonl", words)
    files = (tmp_path / "forget.jsonl", tmp_path / "retain.jsonl")
    given = ["method.layer=2", "train.max_steps=2", f"runs_dir={tmp_path / 'runs'}"]
    run = unlearn_config(make_config(str(tmp_path / "m.gguf"), *map(str, files), "srmu", given))
    source = run.record["base"]["gguf"]
    assert source["quantisation"] == "Q8_0" and len(source["sha256"]) == 64 and source["file"] == "m.gguf"
    assert verify_folder(run.folder)["tensors"] > 0
    assert Run.open(run.folder).export(tmp_path / "out").joinpath("model.safetensors").is_file()


def test_what_is_no_gguf_file(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, and nothing is left in the cache."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF nothing")
    code, _, error = call("inspect", broken)
    assert code == 2 and "broken.gguf is not a GGUF file" in error
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(SrmuError, match=r"revision does not apply to the local file .*m\.gguf"):
        locate_model(str(tmp_path / "m.gguf"), "main")
    odd = (tmp_path / "m.gguf").read_bytes().replace(b"llama", b"lllll")
    (tmp_path / "odd.gguf").write_bytes(odd)
    with pytest.raises(SrmuError, match=r"odd.gguf cannot be dequantised: .*name its safetensors checkpoint"):
        locate_model(str(tmp_path / "odd.gguf"))
    monkeypatch.setattr(reader, "find_spec", lambda name: None if name == "gguf" else importlib.util.find_spec(name))
    with pytest.raises(SrmuError, match="pip install gguf"):
        locate_model(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


# --- adapters


def save_adapter(folder: Path, base: Path, named: str, **settings: Any) -> Any:
    """A LoRA adapter of random weights for the down-projections of a base, which it names so; the module with both."""
    module = transformers.AutoModelForCausalLM.from_pretrained(base)
    both = peft.get_peft_model(module, peft.LoraConfig(r=4, target_modules=["down_proj"], **settings))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in both.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    both.peft_config["default"].base_model_name_or_path = named
    both.save_pretrained(str(folder))
    return both.eval()


def test_an_adapter_is_merged_with_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, into a folder of the base's names, dtype and tokenizer, whose logits are those of both."""
    base = save_pico(tmp_path / "base")
    both = save_adapter(tmp_path / "adapter", base, str(base))
    folder = locate_model(str(tmp_path / "adapter"))
    assert "merging adapter" in capsys.readouterr().err
    module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, both(ids).logits)
    assert {*stored_types(folder).items()} == {*stored_types(base).items()}
    assert transformers.AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == [1, 5, 6]
    assert locate_model(str(tmp_path / "adapter")) == folder
    assert "merging" not in capsys.readouterr().err


def test_a_run_on_an_adapter(tmp_path: Path) -> None:
    """The base is found beside the adapter; the record names both."""
    save_adapter(tmp_path / "adapter", save_pico(tmp_path / "base"), "../base")
    for seed, role in enumerate(("forget", "retain")):
        write_jsonl(tmp_path / f"{role}.jsonl", texts(8, seed=seed))
    files = (str(tmp_path / "forget.jsonl"), str(tmp_path / "retain.jsonl"))
    given = ["method.layer=2", "train.max_steps=2", f"runs_dir={tmp_path / 'runs'}"]
    run = unlearn_config(make_config(str(tmp_path / "adapter"), *files, "srmu", given))
    source = run.record["base"]["adapter"]
    assert source["base"] == "../base" and source["file"] == "adapter" and len(source["sha256"]) == 64
    assert verify_folder(run.folder)["tensors"] > 0


def test_what_is_no_adapter_to_merge(tmp_path: Path) -> None:
    """One line each, and nothing is left in the cache."""
    base = save_pico(tmp_path / "base")
    place = tmp_path / "adapter"
    save_adapter(place, base, "../nowhere")
    with pytest.raises(SrmuError, match=r"the base of adapter .*: model ../nowhere: no such folder"):
        locate_model(str(place))
    save_adapter(place, base, "")
    with pytest.raises(SrmuError, match="names no base_model_name_or_path"):
        locate_model(str(place))
    save_adapter(place, base, str(base))
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["up_proj"]}))
    with pytest.raises(SrmuError, match=r"cannot be merged with .*missing adapter keys"):
        locate_model(str(place))
    (place / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(place)}))
    with pytest.raises(SrmuError, match="leads back to the adapter itself"):
        locate_model(str(place))
    for wrong in ([1], settings | {"base_model_name_or_path": 5}):
        (place / "adapter_config.json").write_text(json.dumps(wrong))
        with pytest.raises(SrmuError, match="names no base_model_name_or_path"):
            locate_model(str(place))
    (place / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(place / "adapter_model.safetensors")
    first = next(iter(tensors))
    for changed, why in (
        ({first: tensors[first] * torch.nan}, "its weights are not finite"),
        ({first.replace("layers.0", "layers.9"): tensors[first].clone()}, "1 tensors for which the base has no place"),
    ):
        save_file(tensors | changed, place / "adapter_model.safetensors")
        with pytest.raises(SrmuError, match=why):
            locate_model(str(place))
    save_file(tensors, place / "adapter_model.safetensors")
    other = save_pico(tmp_path / "other", "gpt2")
    (place / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    with pytest.raises(SrmuError, match=r"adapter .* cannot be merged with .*other"):
        locate_model(str(place))
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    with pytest.raises(SrmuError, match=r"has no adapter_model\.safetensors; save it again"):
        locate_model(str(place))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
