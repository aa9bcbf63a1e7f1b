"""A run's change as an adapter: what peft loads beside the base is the run's model, to the stated error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.gguf_files import write_gguf
from helpers.models import Call, pico_module, save_pico, texts, word_tokenizer, write_jsonl
from srmu.errors import SrmuError
from srmu.runs.adapter import export_adapter, factor_change
from srmu.runs.config import make_config
from srmu.runs.run import Run, open_target, unlearn_config


def make_run(place: Path, arch: str = "llama", *given: str) -> Run:
    model = save_pico(place / "model", arch)
    for seed, role in enumerate(("forget", "retain")):
        write_jsonl(place / f"{role}.jsonl", texts(8, seed=seed))
    files = (str(place / "forget.jsonl"), str(place / "retain.jsonl"))
    options = given or ("method.layer=2",)
    more = ["train.max_steps=3", "train.learning_rate=0.02", f"runs_dir={place / 'runs'}"]
    name = next((o.partition("=")[2] for o in options if o.startswith("method.name")), "srmu")
    rest = [o for o in options if not o.startswith("method.name")]
    return unlearn_config(make_config(str(model), *files, name, [*rest, *more]))


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.tensor([[1, 5, 6, 7, 9]])).logits


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_base_and_adapter_are_the_run(arch: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, arch)
    found = export_adapter(run, tmp_path / "out", 1e-5)
    base = AutoModelForCausalLM.from_pretrained(run.base).eval()
    before = logits(base)
    both = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    with open_target(run, "cpu").after() as module:
        torch.testing.assert_close(logits(both), logits(module), rtol=1e-3, atol=1e-4)
    with both.disable_adapter():
        torch.testing.assert_close(logits(both), before)
    assert found["logits"] < 1e-2
    assert len(found["modules"]) == len(run.delta)


def test_what_is_left_out_is_measured_beyond_rounding(tmp_path: Path) -> None:
    """Of a bfloat16 model a small change is nearly lost in the rounding of logits; it is measured in float32."""
    module = pico_module(dtype=torch.bfloat16)
    module.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    files = [write_jsonl(tmp_path / f"{role}.jsonl", texts(8, seed)) for seed, role in enumerate(("f", "r"))]
    options = ["method.layer=2", "train.max_steps=2", "train.learning_rate=0.001", f"runs_dir={tmp_path / 'runs'}"]
    run = unlearn_config(make_config(str(tmp_path / "model"), *files, "srmu", options))
    assert export_adapter(run, tmp_path / "out", 0.01)["logits"] < 0.03


def test_the_adapter_of_a_gguf_file_names_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made of the file lies on this machine alone."""
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf", "llama")
    files = [write_jsonl(tmp_path / f"{role}.jsonl", texts(8, seed)) for seed, role in enumerate(("f", "r"))]
    options = ["method.layer=2", "train.max_steps=2", f"runs_dir={tmp_path / 'runs'}"]
    run = unlearn_config(make_config(str(tmp_path / "m.gguf"), *files, "srmu", options))
    export_adapter(run, tmp_path / "out", 0.5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "m.gguf"


def test_the_rank_is_the_lowest_that_keeps_the_error() -> None:
    """By hand, of a change whose singular values are known."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator))[0] for n in (9, 7))
    change = left @ torch.diag(torch.tensor([8.0, 4.0, 1.0, 0.5])) @ right.T
    norm = (64 + 16 + 1 + 0.25) ** 0.5
    for error, rank, rest in ((0.6, 1, 17.25**0.5), (0.2, 2, 1.25**0.5), (0.1, 3, 0.5), (0.01, 4, 0.0)):
        found = factor_change(change, error)
        assert found.rank == rank and found.error == pytest.approx(rest / norm, abs=1e-6)
        left_out = float((found.up @ found.down - change).norm()) / norm
        assert left_out == pytest.approx(found.error, abs=1e-5)


def test_a_larger_error_gives_a_smaller_adapter(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    small, large = (export_adapter(run, tmp_path / f"out{error}", error) for error in (0.5, 0.01))
    assert small["numbers"] < large["numbers"] and small["logits"] > large["logits"]
    assert all(part["error"] <= 0.5 for part in small["modules"].values())


def test_what_no_adapter_holds(tmp_path: Path) -> None:
    whole = make_run(tmp_path, "llama", "method.name=npo")
    with pytest.raises(SrmuError, match=r"holds changes of linear maps, and .* is not one: leave out --adapter"):
        export_adapter(whole, tmp_path / "out", 0.1)
    with pytest.raises(SrmuError, match="outside 0-1"):
        export_adapter(whole, tmp_path / "out", 1.5)
    record = json.loads((whole.folder / "record.json").read_text())
    (whole.folder / "record.json").write_text(json.dumps(record | {"diverged": True}))
    with pytest.raises(SrmuError, match="diverged"):
        export_adapter(Run.open(whole.folder), tmp_path / "out", 0.1)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path)
    done = call("export", run.folder, "out", "--adapter")
    assert done.code == 0, done.err
    assert "of the change" in done.out and "wrote out, which goes with the model" in done.out
    assert {path.name for path in Path("out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert "--error goes with --adapter" in call("export", run.folder, "again", "--error", "0.1").err
    assert "goes without --link" in call("export", run.folder, "again", "--adapter", "--copy").err
    taken = call("inspect", "out")  # an adapter is a model, too
    assert taken.code == 0, taken.err
