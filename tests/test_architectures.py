"""Every decoder class of transformers that can be built tiny: it works, or a line says why it does not."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import architectures
from helpers.architectures import tiny_module
from helpers.models import VOCABULARY, word_tokenizer
from srmu.engine.activation_cache import open_activations
from srmu.engine.generate import batch_texts, next_logits, write_on
from srmu.engine.loading import read_config
from srmu.engine.model import EditableModel
from srmu.engine.sites import Site
from srmu.engine.weights import stored_entries
from srmu.errors import SrmuError
from srmu.evals.harness import open_harness
from srmu.runs.config import make_config
from srmu.runs.estimate import plan_dry_run
from srmu.runs.run import open_target

ROOT = Path(__file__).parents[1]
# older than the one that the table is of: it has not all of these classes
OLD = f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text()
PAGE = ROOT / "docs" / "models.md"
LINES = [line for line in PAGE.read_text().splitlines() if line.count("|") > 9 and line.startswith("| `")][1:]
LISTED = [(kind, "|" + line.split("|", 2)[2]) for line in LINES for kind in re.findall("`(.+?)`", line.split("|")[1])]
# one or more of each outcome and each kind of layer; the others take an hour
FEW = "axk2 bert deepseek_v4 gemma3 gpt2 jamba lfm2 mamba prophetnet qwen2_5_vl qwen2_moe xlm".split()  # noqa: SIM905
FORMED = [kind for kind, cells in LISTED if " yes | yes | yes | yes |" in cells]


def build(kind: str) -> Any:
    if (module := tiny_module(kind)) is None and OLD:
        pytest.skip(f"transformers {transformers.__version__} builds no tiny {kind}")
    return module


def write_world(kind: str, place: Path) -> None:
    build(kind)
    assert architectures.write_world(kind, place)


@pytest.mark.skipif(OLD, reason="the table is of a newer transformers")
def test_the_table_has_every_class_once() -> None:
    assert sorted(kind for kind, _ in LISTED) == architectures.decoder_types()


@pytest.mark.parametrize(
    ("kind", "cells"),
    [pytest.param(*row, marks=pytest.mark.slow if row[0] in FEW else pytest.mark.full, id=row[0]) for row in LISTED],
)
def test_row(kind: str, cells: str, tmp_path: Path) -> None:
    """Nothing ends in an internal error; the outcome is the one that docs/models.md has."""
    assert architectures.describe_type(kind, tmp_path) == cells


def save_form(form: str, kind: str, folder: Path) -> None:
    """A tiny model stored in one of the forms that checkpoints have."""
    module = build(kind)
    module.save_pretrained(folder, max_shard_size="60KB" if form == "shards" else "5GB")
    word_tokenizer().save_pretrained(folder)
    if form in ("several types", "tensors of another head"):
        tensors = load_file(folder / "model.safetensors")
        if form == "several types":
            tensors = {name: t.bfloat16() if "norm" not in name and t.ndim > 1 else t for name, t in tensors.items()}
        else:  # that predicts several tokens, which no class of transformers loads
            tensors |= {
                "mtp.layers.0.mlp.down_proj.weight": torch.ones(8, 8),
                "model.layers.4.eh_proj.weight": torch.ones(8),
            }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if form == "links":  # as in the hub's cache
        blobs = folder.parent / "blobs"
        blobs.mkdir()
        for i, file in enumerate(sorted(folder.iterdir())):
            file.rename(blobs / str(i)).chmod(0o444)
            file.symlink_to(blobs / str(i))


@pytest.mark.parametrize("form", ["shards", "several types", "tensors of another head", "links"])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("llama", "qwen2_moe", "gemma3") else pytest.mark.full) for k in FORMED]
)
def test_a_checkpoint_keeps_its_form(kind: str, form: str, tmp_path: Path) -> None:
    """Files, keys, types and what is no link stay; what plain transformers loads is what the run measured."""
    write_world(kind, tmp_path)
    shutil.rmtree(tmp_path / "model")
    save_form(form, kind, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    family = "LoRA" if form == "several types" else "activations" if form == "shards" else "likelihood"
    run = architectures.try_run(tmp_path, family)
    out = run.export(tmp_path / "out")
    entries = [stored_entries(folder) for folder in (tmp_path / "model", out)]
    assert entries[0] == entries[1]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert before.keys() <= {path.name for path in out.iterdir()}
    assert not any(path.is_symlink() for path in out.iterdir())


@pytest.mark.parametrize(
    ("kind", "family", "line"),
    [
        ("openai-gpt", "activations", ""),  # its layers give lists
        ("prophetnet", "likelihood", "this architecture reads more than its tokens there"),
        ("xlnet", "likelihood", "lets a token read those after it"),
        ("cpmant", "likelihood", "this architecture reads more than its tokens there"),
        ("xlm", "activations", "keeps the parts of its layers in 4 lists"),
        ("deepseek_v4", "LoRA", ""),  # a linear map of its own kind
        ("deepseek_v4", "reward", "takes no embeddings in place of tokens"),
        ("gemma4_text", "reward", "takes no embeddings in place of tokens"),
        ("axk2", "neurons", "a mixture of experts, each with neurons of its own"),
        ("mamba", "LoRA", ""),
        ("zamba2", "LoRA", ""),  # its layers share a block
        ("falcon", "LoRA", ""),
        ("phimoe", "LoRA", ""),  # its router is a linear map that gives more than a product
    ],
)
def test_what_was_an_internal_error(kind: str, family: str, line: str, tmp_path: Path) -> None:
    write_world(kind, tmp_path)
    found = architectures.try_in_memory(tmp_path, family)
    assert line in found
    assert bool(line) == bool(found)


def test_a_stack_without_attention_writes_on() -> None:
    """`generate` has no use for a cache that holds recurrent states alone."""
    config = architectures.tiny_config("jamba")
    sizes = config.to_dict() | {"attn_layer_period": 9, "attn_layer_offset": 8}
    config = type(config)(**{name: size for name, size in sizes.items() if name != "layer_types"})
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    rows, _ = write_on(module, [[1, 5, 6]], 3, set())
    ids = [1, 5, 6]
    for _ in range(3):
        ids.append(int(module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert rows == [ids[3:]]


@pytest.mark.parametrize("kind", ["bart", "rwkv", "deepseek_v4", "llama"])
def test_contexts_of_several_lengths_are_continued_as_each_alone(kind: str) -> None:
    """Where padding before a text shifts its positions, texts of one length are continued at once."""
    module = build(kind)
    contexts = [[1, 5, 6, 7], [1, 8], [1, 9, 10, 11, 12]]
    rows, logits = write_on(module, contexts, 3, set(), keep_logits=True)
    assert rows == [write_on(module, [context], 3, set())[0][0] for context in contexts]
    assert [one.argmax(-1).tolist() for one in logits] == rows


@pytest.mark.parametrize("kind", ["whisper", "xlstm", "bailing_hybrid", "llama"])
def test_answers_are_scored_as_each_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot leave out positions is asked for all of them, and one of linear attention makes no cache."""
    monkeypatch.delitem(architectures.OTHERS, "bailing_hybrid")
    module = build(kind)
    pairs = [((1, 5, 6, 7, 8), (9,)), ((1, 5), (10, 11)), ((1, 5, 6, 7), (12, 13, 14))]
    with open_harness(module, word_tokenizer(), 4) as harness:
        scores = [score for score, _ in harness._loglikelihood_tokens([("", *pair) for pair in pairs])]
    for (before, answer), score in zip(pairs, scores, strict=True):
        with torch.no_grad():
            logs = module(torch.tensor([[*before, *answer]]), use_cache=False).logits[0].log_softmax(-1)
        expected = sum(float(logs[len(before) + i - 1, token]) for i, token in enumerate(answer))
        assert score == pytest.approx(expected, abs=1e-4)
    one = next_logits(module, [[1, 5, 6], [1, 5, 6, 7, 8]], 2)
    torch.testing.assert_close(one[0], next_logits(module, [[1, 5, 6]], 2)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bamba", "nemotron_h", "rwkv", "xlstm", "xmod", "gpt2"])
def test_layers_that_do_not_change_run_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a layer gives beside its activations, and whatever else the model reads of it."""
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path))
    batch = batch_texts([[1, 5, 6, 7], [1, 8]])
    for mode in ("memory", "disk"):
        model = EditableModel(build(kind), ["3.linear"])
        with torch.no_grad():
            expected = model.module(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            for hits in (0, 1):
                model.activations = open_activations(mode, {}, model.device)
                assert torch.equal(model.logits(batch), expected)
                if mode == "memory":
                    assert torch.equal(model.logits(batch), expected) and model.activations.hits == 1
                else:
                    assert model.activations.hits == hits


@pytest.mark.parametrize(
    "kind", ["qwen3_next", "qwen3_5_text", "jamba", "lfm2", "bamba", "mamba2", "falcon_h1", "zamba2"]
)
def test_padding_of_one_text_changes_nothing(kind: str) -> None:
    """Layers with a state leave padding out only where transformers masks it; here it always lies behind the text."""
    model = EditableModel(build(kind), ["*"])
    short, ids = batch_texts([[1, 5, 6, 7]]), torch.tensor([[1, 5, 6, 7, 0, 0, 0]])
    padded = short.replace(input_ids=ids, attention_mask=(ids > 0).long(), labels=ids)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(padded)[:, :4], model.logits(short), rtol=1e-4, atol=1e-5)
        one, other = (model.hidden(batch, Site(2))[:, :4] for batch in (padded, short))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_that_reads_ahead_is_refused(tmp_path: Path) -> None:
    """BERT without `is_decoder`: its numbers would mean nothing."""
    write_world("bert", tmp_path)
    settings = json.loads((tmp_path / "model" / "config.json").read_text()) | {"is_decoder": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    line = "BertLMHeadModel lets a token read those after it"
    assert line in architectures.try_run(tmp_path, "likelihood")
    assert line in architectures.try_in_memory(tmp_path, "likelihood")
    texts = [tmp_path / "forget.jsonl", tmp_path / "neutral.jsonl"]
    with pytest.raises(SrmuError, match=line):
        plan_dry_run(make_config(str(tmp_path / "model"), *texts, "npo", []))
    with pytest.raises(SrmuError, match=line):
        open_target(tmp_path / "model").module  # noqa: B018


@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("big_bird", {"attention_type": "block_sparse"}, "reads long texts in another way than short ones"),
        ("git", {}, "answers without .*; cannot be cut"),
        ("llama", {"model_type": "emu3_text_model"}, "is of type emu3_text_model, which AutoModelForCausalLM does not"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(kind: str, change: Any, line: str, tmp_path: Path) -> None:
    write_world(kind, tmp_path)
    if OLD and "model_type" in change:
        pytest.skip("an older transformers knows no such type, and says so itself")
    settings = json.loads((tmp_path / "model" / "config.json").read_text()) | change
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    assert re.search(line, str(architectures.try_run(tmp_path, "likelihood")))


@pytest.mark.parametrize("kind", ["axk2", "mixtral"])
def test_a_model_stored_otherwise_is_written_back_whole(kind: str, tmp_path: Path) -> None:
    """Tensors of other names, and experts whose gate and up projections lie apart."""
    write_world(kind, tmp_path)
    run = architectures.try_run(tmp_path, "likelihood")
    with open_target(run).after() as module:
        changed = module.state_dict()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "out")).state_dict()
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in changed.items())
    stacks = [name for name in before if "experts.gate_up_proj" in name]
    assert stacks and not any(torch.equal(before[name], changed[name]) for name in stacks)


def test_a_dry_run_refuses_what_cannot_be_written_back(tmp_path: Path) -> None:
    """OLMo Hybrid keeps three stored convolutions as one."""
    write_world("olmo_hybrid", tmp_path)
    texts = [tmp_path / "forget.jsonl", tmp_path / "neutral.jsonl"]
    line = r"does not store model\.layers\.0\.linear_attn\.conv1d\.weight in this form"
    assert re.search(line, architectures.try_run(tmp_path, "likelihood"))
    with pytest.raises(SrmuError, match=line):
        plan_dry_run(make_config(str(tmp_path / "model"), *texts, "npo", []))


def test_a_model_of_parts_is_refused(tmp_path: Path) -> None:
    transformers.BltConfig(vocab_size=VOCABULARY, architectures=["BltForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(SrmuError, match="has no single stack of decoder layers"):
        read_config(tmp_path)
