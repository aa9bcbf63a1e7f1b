"""Unlearning a model that is in memory: the tensors of a run, and the model otherwise as it was."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import srmu
from helpers.models import ARCHITECTURES, pico_module, texts, word_tokenizer, write_jsonl
from srmu.runs import in_memory

NAMES = Path(__file__).parents[1] / "helpers" / "names.txt"
FORGET, RETAIN = texts(10, 1, range(30)), texts(7, 2, range(20, 60))
TRAIN = {"max_steps": 3, "learning_rate": 1e-3}
# One of each kind: of one layer, of the whole model, with an adapter, and written at once.
KINDS: dict[str, srmu.Method] = {
    "layer": srmu.SRMU(layer=2),
    "anchors": srmu.AdaptiveRMU(layer=2, anchors="random"),
    "whole": srmu.NPO(retain="nll"),
    "adapter": srmu.GradDiff(lora_rank=2),
    "edit": srmu.SSD(),
}


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def copy_tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unlearn(model: Any, tokenizer: Any = None, **options: Any) -> Any:
    given = {"forget": FORGET, "retain": RETAIN, "method": KINDS["layer"], "train": TRAIN} | options
    return srmu.unlearn(model, tokenizer or word_tokenizer(), **given)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_of_a_run(kind: str, workplace: Path) -> None:
    """Same texts, method and seed: the delta of the folder's run, bit for bit."""
    files = [str(workplace / f"{role}.jsonl") for role in ("forget", "retain")]
    settings = [f"train.{key}={value}" for key, value in TRAIN.items()]
    settings += [f"runs_dir={workplace / 'runs'}", "seed=3"]
    run = srmu.unlearn(srmu.make_config(str(workplace / "model"), *files, KINDS[kind], settings))
    model, tokenizer = load(workplace / "model")
    before = copy_tensors(model)
    same, result = unlearn(model, tokenizer, method=KINDS[kind], seed=3)
    assert same is model
    assert result.delta.keys() == run.delta.keys() and run.delta
    after = model.state_dict()
    for name, tensor in run.delta.items():
        assert torch.equal(after[name], tensor) and torch.equal(result.delta[name], tensor)
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - run.delta.keys())
    kept = ("method", "paper", "data", "overlap", "topics", "steps", "stop_reason", "changed")
    assert {k: result.record[k] for k in kept} == {k: run.record[k] for k in kept}
    assert result.record["change"]["tensors"] == run.record["change"]["tensors"]


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_any_architecture(name: str) -> None:
    model = pico_module(name)
    before, layers = copy_tensors(model), len(model.base_model.state_dict())
    _, result = unlearn(model)
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == set(result.delta) and len(changed) == 3
    assert len(model.base_model.state_dict()) == layers  # the layers above are there again
    model(torch.tensor([[1, 5, 6]]))


@pytest.mark.parametrize("kind", ["layer", "whole"])
def test_a_model_of_a_class_that_only_its_user_knows(kind: str) -> None:
    """Nothing is built from its config; what was reached is counted in the whole model, not in the layers read."""

    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    class OwnForCausalLM(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    known = pico_module()
    model = OwnForCausalLM(OwnConfig(**known.config.to_dict()))
    model.load_state_dict(known.state_dict())
    _, result = unlearn(model, method=KINDS[kind])
    _, expected = unlearn(known, method=KINDS[kind])
    assert result.record["reach"] == expected.record["reach"]
    share = sum(tensor.numel() for tensor in result.delta.values()) / model.num_parameters()
    assert result.record["reach"]["share_of_path"] == pytest.approx(share)


def test_a_method_that_reads_the_tokenizer() -> None:
    """rename_scrub swaps names, whose tokens it must know, on a model that no folder holds."""
    few = {"own_texts": 12, "own_tokens": 10, "prompt": 2, "renamings": 3, "keep_rows": 2}
    method = srmu.RenameScrub(names=str(NAMES), held_out=2, **few)
    _, result = unlearn(pico_module(), method=method)
    assert result.delta and result.record["topics"]["topic"]["names"] > 0


def test_the_model_is_otherwise_as_it_was() -> None:
    model = pico_module().train()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    unlearn(model)
    assert model.training and all(part.training for part in model.modules())
    assert all(p.requires_grad == (p is not frozen) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["layer", "edit"])
def test_gradients_that_were_left_there_stay_and_count_for_nothing(kind: str) -> None:
    clean, used = pico_module(), pico_module()
    used(torch.tensor([[1, 5, 6]])).logits.sum().backward()
    left = {name: p.grad.clone() for name, p in used.named_parameters()}
    _, expected = unlearn(clean, method=KINDS[kind])
    _, result = unlearn(used, method=KINDS[kind])
    assert result.delta.keys() == expected.delta.keys()
    assert all(torch.equal(result.delta[name], tensor) for name, tensor in expected.delta.items())
    assert all(torch.equal(p.grad, left[name]) for name, p in used.named_parameters())


def test_texts_in_every_form(tmp_path: Path) -> None:
    """Texts, rows, a data set and files are the same texts, alone and side by side."""
    file = write_jsonl(tmp_path / "some.jsonl", FORGET)
    rows = [{"text": text, "id": i} for i, text in enumerate(FORGET)]
    forms = {
        "texts": FORGET,
        "tuple": tuple(FORGET),
        "rows": rows,
        "data set": datasets.Dataset.from_list(rows),
        "generator": (text for text in FORGET),
        "path": file,
        "paths": [file],
        "both": [write_jsonl(tmp_path / "half.jsonl", FORGET[:4]), *FORGET[4:7], *rows[7:]],
    }
    digests = {
        form: unlearn(pico_module(), forget=value)[1].record["data"]["topic"]["forget"]["digest"]
        for form, value in forms.items()
    }
    assert len({*digests.values()}) == 1, digests


def test_a_sentence_is_never_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that names a file that is there is a text."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "w1", FORGET)
    counts = unlearn(pico_module(), forget=["w1 w2 w3", "w1"])[1].record["data"]["topic"]["forget"]
    assert (counts["documents"], counts["too_short"]) == (1, 1)


def test_a_callback_sees_every_step(workplace: Path) -> None:
    seen: list[int] = []

    def callback(step: int, values: dict[str, Any]) -> None:
        seen.append(step)
        assert values["topic"] == "topic" and values["loss"] > 0

    _, result = unlearn(pico_module(), callback=callback)
    assert seen == [0, 1, 2] == [row["step"] for row in result.steps]
    files = [str(workplace / f"{role}.jsonl") for role in ("forget", "retain")]
    settings = ["train.max_steps=2", "train.learning_rate=1e-3", f"runs_dir={workplace / 'runs'}"]
    config = srmu.make_config(str(workplace / "model"), *files, KINDS["layer"], settings)
    srmu.unlearn(config, callback=callback)
    assert seen == [0, 1, 2, 0, 1]


def test_what_a_callback_raises_leaves_the_model_as_it_was() -> None:
    def callback(step: int, values: dict[str, Any]) -> None:
        if step == 1:
            raise KeyboardInterrupt

    model = pico_module()
    before = copy_tensors(model)
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, callback=callback)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_method_of_ones_own() -> None:
    """A class of a notebook, which no file holds."""

    class Louder(srmu.NPO):
        name = "louder"

    _, result = unlearn(pico_module(), method=Louder)
    assert result.record["method"] == "louder" and result.delta
    with pytest.raises(srmu.SrmuError, match="hand model and tokenizer"):
        namespace: dict[str, Any] = {"srmu": srmu}
        exec("class Own(srmu.NPO):\n    name = 'own'", namespace)
        srmu.make_config("model", "a.jsonl", method=namespace["Own"]())


class Wrapped(torch.nn.Module):
    """What peft and torch.compile make of a model."""

    def merge_and_unload(self) -> None: ...


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "one string": ({"forget": "w1 w2 w3"}, "forget is one str: expected [text, ...]"),
    "a row": ({"retain": {"text": "w1 w2"}}, "retain is one dict of text: expected [text, ...]; [row, ...]"),
    "splits": (
        {"forget": datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "w1"}]))},
        "forget is one DatasetDict of train: expected",
    ),
    "tokens": (
        {"forget": transformers.BatchEncoding({"input_ids": [[1, 2]]})},
        "forget is one BatchEncoding of input_ids: expected [text, ...]",
    ),
    "a number": ({"forget": 5}, "forget is one int: expected [text, ...]"),
    "a number in it": ({"forget": ["w1 w2", 5]}, "forget: row 2: "),
    "no column": ({"forget": [{"body": "w1"}]}, "forget: row 1: no column 'text'; found body"),
    "empty": ({"forget": []}, "no forget texts"),
    "empty text": ({"forget": ["w1 w2", " "]}, "forget: row 2: the text is empty"),
    "no file": ({"forget": Path("none.jsonl")}, "none.jsonl: no such file"),
    "no retain": ({"retain": ()}, "method srmu needs retain texts"),
    "equal": ({"retain": FORGET[::-1]}, "hold the same texts"),
    "method": ({"method": "srum"}, "did you mean srmu?"),
    "layer": ({"method": srmu.RMU(layer=9)}, "layer 9 does not exist"),
    "option": ({"train": {"max_step": 3}}, "train.max_step is not an option; did you mean"),
    "value": ({"train": {"max_steps": "x"}}, "train.max_steps=x: expected"),
    "length": ({"max_length": 0}, "topics.topic.max_length=0"),
    "tokenizer": ({"tokenizer": "gpt2"}, "the model's tokenizer, not str"),
    "no tokenizer": ({"tokenizer": None}, "unlearn takes a config"),
    "wrapped": ({"model": Wrapped()}, "not Wrapped; merge its adapters first"),
    "name": ({"model": "my-model"}, "a transformers model or a Config, not str"),
    "no change": ({"train": {"learning_rate": 1e-30, "max_steps": 1}}, "did not change"),
    "diverged": ({"train": TRAIN | {"learning_rate": 1e30}}, "not finite at step 1"),
}


def test_a_method_refuses_what_is_no_number() -> None:
    option: Any = "x"
    with pytest.raises(srmu.SrmuError, match=r"method\.kappa='x': expected a number at least 0"):
        srmu.RMU(kappa=option)


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    """One line that says what to do, and the model as it was."""
    changed, says = MISTAKES[case]
    model = pico_module()
    before = copy_tensors(model)
    options = {"forget": FORGET, "retain": RETAIN, "method": KINDS["layer"], "train": TRAIN}
    options |= {k: v for k, v in changed.items() if k not in ("model", "tokenizer")}
    tokenizer = changed.get("tokenizer", word_tokenizer())
    with pytest.raises(srmu.SrmuError) as error:
        srmu.unlearn(changed.get("model", model), tokenizer, **options)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_changed_here() -> None:
    config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2)
    with pytest.raises(srmu.SrmuError, match="BertForMaskedLM is not a causal language model"):
        unlearn(transformers.BertForMaskedLM(config))
    with torch.device("meta"):
        hollow = transformers.LlamaForCausalLM(pico_module().config)
    with pytest.raises(srmu.SrmuError, match="the model lies on meta"):
        unlearn(hollow)
    model = pico_module()
    model.resize_token_embeddings(8)
    with pytest.raises(srmu.SrmuError, match="the model knows 8 tokens"):
        unlearn(model)


def test_what_was_unlearned_is_evaluated_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import attack_world

    attack_world.write(tmp_path)
    model, tokenizer = load(tmp_path / "model")
    place = {"tasks_dir": tmp_path / "tasks"}
    scores = srmu.evaluate(model, ["hazard"], tokenizer=tokenizer, **place)["after"]
    folder = srmu.evaluate(str(tmp_path / "model"), ["hazard"], **place)["after"]
    assert scores == folder
    monkeypatch.chdir(tmp_path)
    assert srmu.evaluate(model, "hazard", tokenizer=tokenizer, tasks_dir="tasks")["after"] == scores
    assert srmu.evaluate("model", "hazard", out="scores")["after"] == scores
    assert (tmp_path / "scores" / "results.json").exists()
    with pytest.raises(srmu.SrmuError, match="tokenizer="):
        srmu.evaluate(model, ["hazard"])


def test_progress_shows_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def watch(label: str, total: int) -> Any:
        shown.append(label)
        return in_memory.ignore_progress(label, total)

    monkeypatch.setattr(in_memory, "choose_progress", lambda: watch)
    unlearn(pico_module())
    assert "srmu" in shown
    shown.clear()
    unlearn(pico_module(), watch=in_memory.ignore_progress)
    assert not shown
