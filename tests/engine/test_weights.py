"""Checkpoints on disk: what an export keeps, what is refused, and that others can load it."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.models import (
    ARCHITECTURES,
    EXPERTS,
    down_name,
    pico_module,
    save_pico,
    stored_names,
    texts,
    word_tokenizer,
    write_jsonl,
)
from srmu.engine import weights
from srmu.engine.files import sha256
from srmu.engine.loading import load_module
from srmu.engine.model import EditableModel
from srmu.errors import SrmuError
from srmu.runs import run as runs
from srmu.runs.config import make_config
from srmu.runs.run import Run, unlearn_config

TEMPLATE = "{{ messages[0]['content'] }}"
IDS = torch.tensor([[1, 7, 9, 30, 12]])
BFLOAT16 = ("llama", "gpt2", "mixtral")  # those also tested in bf16
MODELS = [*ARCHITECTURES, *(f"{name}-bf16" for name in BFLOAT16), "gpt2-bare", "llama-single"]


def strip_prefix(folder: Path) -> None:
    """GPT-2 as OpenAI stored it: names without `transformer.`, in one file."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {k: v for file in files for k, v in load_file(file).items()}
    for file in [*files, folder / weights.INDEX]:
        file.unlink()
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})


def unlearned(folder: Path, *overrides: str, method: str = "srmu", **options: Any) -> Run:
    write_jsonl(folder.parent / "forget.jsonl", texts(6, 1, range(30)))
    write_jsonl(folder.parent / "retain.jsonl", texts(6, 2, range(20, 60)))
    sources = [str(folder.parent / f"{name}.jsonl") for name in ("forget", "retain")]
    quick = [f"runs_dir={folder.parent / 'runs'}", "train.max_steps=2", "train.learning_rate=0.01", *overrides]
    layer = [] if method == "npo" else ["method.layer=2"]
    return unlearn_config(make_config(str(folder), *sources, method, [*layer, *quick]), **options)


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


LOAD = """
import json, sys
sys.modules["srmu"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

root, names = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
logits = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}/out", dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/{name}/out")
    # For every Qwen2, transformers takes its own kind of tokenizer in place of a word list.
    assert name == "qwen2" or tokenizer("w3 w5")["input_ids"] == [1, 7, 9]
    assert tokenizer.chat_template == {"default": "TEMPLATE", "tools": "tools"}
    with torch.no_grad():
        logits[name] = model(torch.tensor([IDS])).logits.contiguous()
save_file(logits, f"{root}/logits.safetensors")
""".replace("TEMPLATE", TEMPLATE).replace("[IDS]", str(IDS.tolist()))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Each model unlearned and exported to NAME/out; logits from a process without srmu."""
    root = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRMU_CACHE", str(root / "cache"))
        patch.setattr(runs, "load_tokenizer", lambda folder: word_tokenizer())
        for name in MODELS:
            architecture, _, kind = name.partition("-")
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            folder = save_pico(root / name / "model", architecture, dtype)
            if kind == "bare":
                strip_prefix(folder)
            if kind == "single":
                shutil.rmtree(folder)
                pico_module(architecture).save_pretrained(folder)
                word_tokenizer().save_pretrained(folder)
            (folder / "chat_template.jinja").write_text(TEMPLATE)
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
            # Weights that the model does not load would keep what was unlearned.
            save_file({"old": torch.ones(2)}, folder / "consolidated.safetensors")
            (folder / "pytorch_model.bin").write_bytes(b"old")
            before = hashes(folder)
            unlearned(folder, out=folder.parent / "out")
            assert hashes(folder) == before, "the source was changed"
        subprocess.run([sys.executable, "-c", LOAD, str(root), *MODELS], check=True)
    yield root


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in folder.glob("model*.safetensors") for k, v in load_file(p).items()}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", MODELS)
def test_an_export_keeps_all_but_the_declared_tensors(name: str, exports: Path) -> None:
    base, out = exports / name / "model", exports / name / "out"
    run = Run.open(next((exports / name / "runs").iterdir()))
    files, copied = hashes(base), hashes(out)
    where = weights.list_shards(base)
    touched = {where[tensor].name for tensor in run.delta}
    left_out = {"consolidated.safetensors", "pytorch_model.bin"}
    assert set(copied) == {*files, "README.md", weights.EXPORTED} - left_out
    assert {f for f in copied if f in files and copied[f] != files[f]} == touched
    assert "chat_template.jinja" in copied
    assert "additional_chat_templates/tools.jinja" in copied
    for file in touched:  # same header, so same layout
        assert weights.read_header(out / file) == weights.read_header(base / file)
    old, new = tensors_of(base), tensors_of(out)
    architecture = name.partition("-")[0]
    stored = [key for layer in range(3) for key in stored_names(architecture, layer)]
    if name == "gpt2-bare":
        stored = [key.removeprefix("transformer.") for key in stored]
    assert set(run.delta) == set(stored)
    for tensor in old:
        expected = run.delta.get(tensor, old[tensor])
        assert torch.equal(new[tensor], expected)
        assert expected.dtype == old[tensor].dtype == new[tensor].dtype
        assert torch.equal(new[tensor], old[tensor]) == (tensor not in run.delta)


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_loads_an_export(name: str, exports: Path) -> None:
    base = exports / name / "model"
    changes = Run.open(next((exports / name / "runs").iterdir())).changes
    module = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    with torch.no_grad():
        before = module(IDS).logits
        weights.apply_delta(module, *changes)
        after = module(IDS).logits
    assert torch.equal(load_file(exports / "logits.safetensors")[name], after)
    assert not torch.equal(before, after)


def test_shards_are_kept(exports: Path) -> None:
    count = len(list((exports / "llama" / "out").glob("model-*.safetensors")))
    assert count == len(list((exports / "llama" / "model").glob("model-*.safetensors"))) > 1
    assert (exports / "gpt2-bare" / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", EXPERTS)
def test_experts_are_written_one_by_one(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The module stacks them and the checkpoint does not: the parameter comes back bit for bit."""
    folder, out = save_pico(tmp_path / "model", arch, dtype), tmp_path / "out"
    model = EditableModel.load(folder, depth=3, trainable=["1.mlp_down", "2.mlp_down", "*.experts.gate_up_proj"])
    names = weights.checkpoint_names(folder, model.original)
    assert {down_name(arch, i): stored_names(arch, i) for i in (1, 2)}.items() <= names.items()
    assert len(weights.list_shards(folder)) > len(dict(load_module(folder).named_parameters()))
    for parameter in model.trained.values():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        parameter.data += noise.to(dtype)
    changed = model.delta()
    assert set(changed) == set(names)
    weights.save_delta(tmp_path / "delta.safetensors", folder, names, changed, {})
    delta, places = weights.load_delta(tmp_path / "delta.safetensors", folder)
    assert places == names and set(delta) == {key for keys in names.values() for key in keys}
    weights.export_checkpoint(folder, delta, out)
    old, new = tensors_of(folder), tensors_of(out)
    assert {key for key in old if not torch.equal(old[key], new[key])} == set(delta)
    exported = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    applied = load_module(folder)
    weights.apply_delta(applied, delta, places)
    for module in (exported, applied):
        for name, original in load_module(folder).named_parameters():
            got = module.get_parameter(name)
            assert got.dtype == original.dtype == dtype
            assert torch.equal(got, changed.get(name, original)), name


@pytest.mark.parametrize("arch", EXPERTS)
def test_a_delta_of_one_expert_changes_that_one_only(arch: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", arch)
    module, name = load_module(folder), down_name(arch, 2)
    before = module.get_parameter(name).detach().clone()
    places = {name: stored_names(arch, 2)}
    weights.apply_delta(module, {stored_names(arch, 2)[1]: torch.ones_like(before[1])}, places)
    after = module.get_parameter(name)
    assert after[1].eq(1).all()
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2:], before[2:])
    with pytest.raises(SrmuError, match="does not fit"):
        weights.apply_delta(module, {stored_names(arch, 2)[1]: torch.ones(3, 3)}, places)


@pytest.mark.parametrize("arch", EXPERTS)
def test_experts_whose_stored_form_is_another_are_refused(arch: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", arch)
    parameters = dict(load_module(folder).named_parameters())
    for name in ("model.layers.1.mlp.experts.gate_up_proj", down_name(arch, 1)):
        swapped = parameters[name].detach().flip(0)  # each under another expert's number
        with pytest.raises(SrmuError, match=f"does not store {name} in this form, once: cannot write"):
            weights.checkpoint_names(folder, {name: swapped})


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_delta_has_the_checkpoints_dtype(arch: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", arch, torch.bfloat16)
    run = unlearned(folder, "dtype=float32")
    assert {t.dtype for t in run.delta.values()} == {torch.bfloat16}
    run.export(tmp_path / "out")


def test_the_file_that_transformers_loads_is_the_one_that_is_patched(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")  # shards with an index
    pico_module(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)  # beside one whole file
    assert set(weights.list_shards(folder).values()) == {folder / "model.safetensors"}
    run = unlearned(folder, out=tmp_path / "out")
    loaded = dict(load_module(tmp_path / "out").named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in run.delta.items())


def store_head_too(folder: Path) -> None:
    """A checkpoint that ties its ends, and holds the head all the same."""
    config = ARCHITECTURES["llama"][0](**ARCHITECTURES["llama"][1], tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    word_tokenizer().save_pretrained(folder)


def test_a_tied_head_that_is_stored_too_is_written_too(tmp_path: Path) -> None:
    store_head_too(tmp_path / "model")
    run = unlearned(tmp_path / "model", method="npo", out=tmp_path / "out")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {*run.delta}  # transformers 5.0 leaves them untied
    with runs.open_target(run, "cpu").after() as module, torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, module(IDS).logits)


def test_an_export_that_loads_as_another_model_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = unlearned(save_pico(tmp_path / "model"))
    monkeypatch.setattr(weights, "patch_file", lambda path, tensors: None)
    with pytest.raises(SrmuError, match=r"nothing was written: the export of .* another model than the run measured"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_compared_with_one_model_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unlearned(save_pico(tmp_path / "model"))
    sample, load, seen = runs.sample_logits, runs.load_pretrained, list[Any]()

    def sample_noted(module: Any, folder: Any) -> Any:
        seen.append(weakref.ref(module))
        return sample(module, folder)

    def load_alone(folder: Path) -> Any:
        gc.collect()
        assert [ref() for ref in seen] == [None]
        return load(folder)

    monkeypatch.setattr(runs, "sample_logits", sample_noted)
    monkeypatch.setattr(runs, "load_pretrained", load_alone)
    run.export(tmp_path / "out")
    assert len(seen) == 2


def test_an_export_holds_the_code_and_the_licence(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    for name in ("modeling_my.py", "LICENSE", "tokenizer.model.v3"):
        (folder / name).write_text(name)
    pico_module().save_pretrained(folder)  # one file: the index beside it names shards that are not loaded
    unlearned(folder, out=tmp_path / "out")
    assert {"modeling_my.py", "LICENSE", "tokenizer.model.v3"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / weights.INDEX).exists()


# --- what is refused


def test_an_adapter_beside_the_model_is_not_merged_unsaid(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    for use in (load_module, runs.open_target, unlearned):
        with pytest.raises(SrmuError, match="holds an adapter beside the model: merge it"):
            use(folder)


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / weights.INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (folder / weights.INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def drop_tensor(folder: Path) -> None:
    path = next(p for p in sorted(folder.glob("*.safetensors")) if len(load_file(p)) > 1)
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


def cut(folder: Path, keep: Callable[[bytes], bytes]) -> None:
    path = first_shard(folder)
    path.write_bytes(keep(path.read_bytes()))


def misstate_shape(folder: Path) -> None:
    """The header calls a tensor shorter than its bytes are."""
    path = first_shard(folder)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    said = data[8:start].replace(b'"shape":[64,32]', b'"shape":[62,32]', 1)
    assert said != data[8:start]
    path.write_bytes(data[:8] + said + data[start:])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parent": (
        lambda f: edit_index(f, lambda m: m | {min(m): "../model-00001.safetensors"}),
        "points out of the folder",
    ),
    "absolute": (lambda f: edit_index(f, lambda m: m | {min(m): "/etc/model.safetensors"}), "points out of the folder"),
    "subfolder": (lambda f: edit_index(f, lambda m: m | {min(m): "sub/model.safetensors"}), "points out of the folder"),
    "pickle": (lambda f: edit_index(f, lambda m: m | {min(m): "pytorch_model.bin"}), "points out of the folder"),
    "dots": (lambda f: edit_index(f, lambda m: m | {min(m): ".."}), "points out of the folder"),
    "list index": (lambda f: (f / weights.INDEX).write_text("[]"), "not a safetensors index"),
    "list map": (lambda f: edit_index(f, lambda m: []), "not a safetensors index"),
    "not json": (lambda f: (f / weights.INDEX).write_text("{"), "not a safetensors index"),
    "missing shard": (lambda f: first_shard(f).unlink(), "lacks model-00001-of-"),
    "missing tensor": (drop_tensor, "lacks the tensor"),
    "truncated": (lambda f: cut(f, lambda data: data[:-9]), "is damaged: .+; fetch it again"),
    "extended": (lambda f: cut(f, lambda data: data + b"x"), "is damaged"),
    "wrong shape": (misstate_shape, "is damaged"),
    "emptied": (lambda f: cut(f, lambda data: b""), "is damaged"),
    "huge header": (lambda f: cut(f, lambda data: b"\xff" * 8 + data[8:]), "is damaged"),
    "cut header": (lambda f: cut(f, lambda data: data[:40]), "is damaged: .+; fetch it again"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "has no model.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case: str, tmp_path: Path) -> None:
    change, says = BROKEN[case]
    folder = save_pico(tmp_path / "model")
    change(folder)
    with pytest.raises(SrmuError, match=says) as caught:
        weights.list_shards(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(SrmuError, match=says):
        unlearned(folder)
    assert not (tmp_path / "runs").exists()


def test_a_shard_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """Wherever the download stopped."""
    folder = save_pico(tmp_path / "model")
    path = first_shard(folder)
    entries, start = weights.read_header(path)
    data = path.read_bytes()
    assert len(entries) > 1
    for entry in entries.values():
        for end in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
            path.write_bytes(data[: start + end])
            with pytest.raises(SrmuError) as caught:
                weights.list_shards(folder)
            assert f"{path} is damaged: " in str(caught.value) and str(caught.value).endswith("; fetch it again")
    path.write_bytes(data)
    weights.list_shards(folder)


def test_a_tensor_that_neither_index_nor_files_hold_is_refused(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    edit_index(folder, lambda m: {k: v for k, v in m.items() if "layers.3.mlp.up" not in k})
    for path in folder.glob("*.safetensors"):
        kept = {k: v for k, v in load_file(path).items() if "layers.3.mlp.up" not in k}
        save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(SrmuError, match="lacks 1 tensors, the first is"):
        unlearned(folder)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_save_delta_refuses_what_is_not_finite(value: float, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    original = dict(load_module(folder).named_parameters())[name].detach()
    changed = original.clone()
    changed[0, 0] = value
    with pytest.raises(SrmuError, match=rf"{name} holds NaN or infinity"):
        weights.save_delta(tmp_path / "d.safetensors", folder, {name: [name]}, {name: changed}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_delta_does_not_fit_another_model(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    half = save_pico(tmp_path / "half", dtype=torch.float16)
    run = unlearned(folder)
    gpt2 = save_pico(tmp_path / "gpt2", "gpt2")
    for other, says in ((half, "another type or shape"), (gpt2, "has no tensor")):
        before = hashes(tmp_path)
        with pytest.raises(SrmuError, match=says):
            weights.export_checkpoint(other, run.delta, tmp_path / "out")
        assert hashes(tmp_path) == before
        assert not (tmp_path / "out").exists()


def test_a_parameter_stored_in_another_form_is_refused(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    original = dict(load_module(folder).named_parameters())[name].detach()
    assert weights.checkpoint_names(folder, {name: original}) == {name: [name]}
    with pytest.raises(SrmuError, match="in this form, once"):
        weights.checkpoint_names(folder, {name: original + 1})
    with pytest.raises(SrmuError, match="does not store absent"):
        weights.checkpoint_names(folder, {"absent.weight": original})


def test_a_delta_of_another_version_is_named(tmp_path: Path) -> None:
    base = save_pico(tmp_path / "base")
    save_file({"a": torch.zeros(2)}, tmp_path / "delta.safetensors", {"srmu": json.dumps({"base": {}})})
    with pytest.raises(SrmuError, match=r"delta\.safetensors was written by another version of srmu; unlearn again"):
        weights.load_delta(tmp_path / "delta.safetensors", base)


def test_a_damaged_delta_is_named(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(SrmuError, match=r"delta\.safetensors is damaged"):
        weights.load_delta(path, save_pico(tmp_path / "model"))


def test_fingerprints_tell_models_and_deltas_apart(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    name = next(iter(weights.list_shards(folder)))
    prints = [
        weights.fingerprint_model(folder),
        weights.changed_fingerprint(weights.fingerprint_model(folder), {name: torch.zeros(3)}),
        weights.changed_fingerprint(weights.fingerprint_model(folder), {name: torch.ones(3)}),
        weights.fingerprint_model(save_pico(tmp_path / "gpt2", "gpt2")),
    ]
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    prints.append(weights.fingerprint_model(folder))
    assert len(set(prints)) == 5
    assert prints[-1] == weights.fingerprint_model(shutil.copytree(folder, tmp_path / "copy"))


def test_locate(tmp_path: Path) -> None:
    assert weights.locate_model(str(tmp_path)) == tmp_path
    assert weights.locate_model(str(tmp_path)) == tmp_path
    with pytest.raises(SrmuError, match="revision does not apply"):
        weights.locate_model(str(tmp_path), "main")
    for name in ("absent", "./a/b", "a/b/c", "/a/b"):
        with pytest.raises(SrmuError, match="not a hub id"):
            weights.locate_model(name)


def test_locate_asks_the_hub_for_safe_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    def snapshot_download(model: str, **options: Any) -> str:
        calls.append((model, options["revision"]))
        assert not any("bin" in p or "pt" in p for p in options["allow_patterns"])  # pickles; code is never run
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert weights.locate_model("owner/name", "abc") == tmp_path
    assert calls == [("owner/name", "abc")]
