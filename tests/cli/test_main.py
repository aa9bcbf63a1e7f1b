"""Every verb through the real command line: what it prints, and what it says of bad input."""

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import srmu
from helpers.models import SIZES, Answer, Call, texts, word_tokenizer
from srmu.cli import main
from srmu.engine.weights import list_shards
from srmu.evals import lm_eval
from srmu.evals.results import plain_metrics, read_metrics
from srmu.methods import METHODS
from srmu.runs.run import Run

QUICK = ("method.layer=2", "train.max_steps=2", "train.learning_rate=1e-2")
GOOD = '{"text": "w1 w2 w3"}\n'


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in the workplace."""
    monkeypatch.chdir(workplace)


def outside(*arguments: str) -> Answer:
    """`python -m srmu ...` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "srmu", *arguments], capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def sources(**changed: str) -> list[str]:
    """The options that name model and texts."""
    names = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl"} | changed
    return [part for key, value in names.items() for part in (f"--{key}", value)]


def listing() -> dict[str, int]:
    """Every file and folder below the working folder with its time of change."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in Path().rglob("*")
        if path.parts[0] != "cache"  # the key of the digests
    }


def refused(call: Call, arguments: list[Any], *says: str) -> None:
    """The call ends with one line that says all this, and writes nothing."""
    before = listing()
    answer = call(*arguments)
    assert_one_line(answer, *says)
    assert listing() == before


def assert_one_line(answer: Answer, *says: str) -> None:
    """One line on standard error, beside the log lines of a run that went on for a while."""
    assert (answer.code, answer.out) == (2, ""), answer
    lines = [line for line in answer.err.splitlines() if not line.endswith(" s left")]
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("srmu: ")
    assert "Traceback" not in lines[0]
    for part in says:
        assert part in lines[0]


# --- texts


def parquet(**columns: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def spoilt(data: bytes) -> bytes:
    """A Parquet file whose ends are right."""
    return data[:4] + b"x" * (len(data) - 12) + data[-8:]


TEXTS: dict[str, tuple[str, bytes | None, list[str]]] = {
    "missing file": ("a.jsonl", None, ["a.jsonl: no such file"]),
    "glob without matches": ("none-*.jsonl", None, ["none-*.jsonl: no such file"]),
    "folder": ("model", None, ["model is a folder", "*.jsonl"]),
    "unknown user": ("~nobody-of-that-name/a.jsonl", None, ["no such user"]),
    "inside a file": ("forget.jsonl/a.jsonl", None, ["no such file"]),
    "empty file": ("a.jsonl", b"", ["a.jsonl: holds no text"]),
    "blank file": ("a.jsonl", b"\n  \n", ["a.jsonl: holds no text"]),
    "empty txt": ("a.txt", b"\n", ["a.txt: holds no text"]),
    "empty csv": ("a.csv", b"text\n", ["a.csv: holds no text"]),
    "empty json": ("a.json", b"[]", ["a.json: holds no text"]),
    "malformed": ("a.jsonl", (GOOD + '{"text": ').encode(), ["a.jsonl:2: not JSON"]),
    "line 100": ("a.jsonl", (GOOD * 99 + "{'text': 1}").encode(), ["a.jsonl:100: not JSON"]),
    "two in a line": ("a.jsonl", (GOOD.strip() * 2).encode(), ["a.jsonl:1: not JSON"]),
    "number": ("a.jsonl", (GOOD + '{"text": 5}').encode(), ["a.jsonl:2: 'text' is int"]),
    "null": ("a.jsonl", (GOOD + '{"text": null}').encode(), ["a.jsonl:2: 'text' is NoneType"]),
    "list": ("a.jsonl", b'["w1"]', ["a.jsonl:1: 'text' is list, expected a string"]),
    "no column": ("a.jsonl", b'{"body": "w1"}', ["a.jsonl:1: no column 'text'; found body"]),
    "empty text": ("a.jsonl", (GOOD + '{"text": " "}').encode(), ["a.jsonl:2: the text is empty"]),
    "surrogate": ("a.jsonl", b'{"text": "w1 \\ud800"}', ["a.jsonl:1", "surrogate"]),
    "long number": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ["a.jsonl:1: not JSON"]),
    "deep": ("a.jsonl", b"[" * 200_000, ["a.jsonl:1: not JSON", "nested"]),
    "too short": ("a.jsonl", b'"w1"\n"w2"', ["topic topic: all 2 forget texts", "under 2 tokens"]),
    "equal": ("retain.jsonl", None, ["topic topic: forget and retain hold the same texts"]),
    "json row": ("a.json", b'["w1 w2",\n{"text": 5}]', ["a.json: row 2: 'text' is int"]),
    "json line": ("a.json", b'["w1 w2",\n\n{"text" 5}]', ["a.json:3: not JSON"]),
    "json object": ("a.json", b'{"body": "w1 w2"}', ["a.json: row 1: no column 'text'; found body"]),
    "csv column": ("a.csv", b"id,body\n1,w1\n", ["a.csv:2: no column 'text'; found id, body"]),
    "csv comma": ("a.csv", b"text\nw1 w2\nw1, w2\n", ["a.csv:3: not CSV: more fields"]),
    "csv short": ("a.csv", b"id,text\n1,w1\n2\n", ["a.csv:3: 'text' is NoneType"]),
    "csv twice": ("a.csv", b"text,text\nw1 w2,w3 w4\n", ["a.csv:1: not CSV: two columns are called 'text'"]),
    "csv quote": ("a.csv", b'text\n"w1 w2\n', ["a.csv:2: not CSV"]),
    "no parquet": ("a.parquet", b"PAR1 no", ["a.parquet: not Parquet"]),
    "spoilt parquet": ("a.parquet", spoilt(parquet(text=["w1"])), ["a.parquet: not Parquet"]),
    "parquet column": ("a.parquet", parquet(body=["w1"]), ["row 1: no column 'text'; found body"]),
    "parquet null": ("a.parquet", parquet(text=["w1 w2", None]), ["row 2: 'text' is NoneType"]),
    "parquet bytes": ("a.parquet", parquet(text=[b"w1"]), ["row 1: 'text' is bytes"]),
    "gzip": ("a.jsonl", gzip.compress(GOOD.encode()), ["a.jsonl:1: not UTF-8", "compressed (gzip)"]),
    "latin-1": ("a.jsonl", (GOOD + '"w1 é"').encode("latin-1"), ["a.jsonl:2: not UTF-8 text"]),
    "latin-1 csv": ("a.csv", "text\nw1\nw2 é\n".encode("latin-1"), ["a.csv:3: not UTF-8 text"]),
    "suffix": ("a.docx", b"w1 w2", ["a.docx: .docx suffix; srmu reads .jsonl"]),
    "no suffix": ("a", b"w1 w2", ["a: no suffix; srmu reads .jsonl"]),
}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("case", TEXTS)
def test_bad_texts(case: str, call: Call) -> None:
    name, content, says = TEXTS[case]
    if content is not None:
        Path(name).write_bytes(content)
    refused(call, ["unlearn", *sources(forget=name), *QUICK, "--out", "out"], *says)


def test_a_set_equal_in_another_order_and_file(call: Call) -> None:
    rows = texts(7, 2, range(20, 60))
    Path("a.txt").write_text("\n".join(reversed(rows)))
    refused(call, ["unlearn", *sources(forget="a.txt"), *QUICK], "hold the same texts")
    Path("a.txt").write_text("\n".join(rows[:3]))
    refused(call, ["unlearn", *sources(forget="a.txt"), *QUICK], "retain holds all of the forget texts")


def test_texts_that_are_accepted(call: Call) -> None:
    """Byte-order mark, CRLF, blank lines, and one text that is too short among others."""
    rows = "\r\n".join(['{"text": "w1 w2 w3"}', "", '"w4 w5"', '"w6"', ""])
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    answer = call("unlearn", *sources(forget="a.jsonl"), *QUICK, "--json")
    forget = json.loads(answer.out)["record"]["data"]["topic"]["forget"]
    assert (forget["documents"], forget["too_short"], forget["tokens"]) == (2, 1, 7)


@pytest.mark.parametrize("method", ["srmu", "rmu", "adaptive_rmu"])
def test_answers_of_one_token_can_be_forgotten(call: Call, method: str) -> None:
    """What counts may be a single token, which is no first token of a text."""
    rows = [json.dumps({"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}"}) for i in range(8)]
    Path("a.jsonl").write_text("\n".join(rows))
    answer = call("unlearn", *sources(forget="a.jsonl"), "--method", method, *QUICK)
    assert answer.code == 0, answer.err


def test_an_empty_cell_of_a_table_is_called_empty(call: Call) -> None:
    table = {"question": ["w1 w2", "w2 w3"], "answer": ["w3", None], "note": [None, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), "a.parquet")
    refused(call, ["unlearn", *sources(forget="a.parquet"), *QUICK], "a.parquet: row 2: the answer is empty")


def test_a_model_that_is_something_else(call: Call) -> None:
    Path("served").mkdir()
    Path("served/m.gguf").write_bytes(b"GGUF")
    refused(call, ["unlearn", *sources(model="served"), *QUICK], "name the GGUF file in it: ")
    Path("done").mkdir()
    Path("done/record.json").write_text("{}")
    refused(call, ["unlearn", *sources(model="done"), *QUICK], "done is a run, not a model: srmu export ")
    refused(call, ["unlearn", *sources(model="a/m.gguf"), *QUICK], "model a/m.gguf: no such file; name a folder")


# --- options

OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "method": (["--method", "srum"], ["unknown method 'srum'", "did you mean srmu?"]),
    "another method": (["method.name=nop"], ["unknown method 'nop'; did you mean npo?"]),
    "method file": (["--method", "mine.py:Mine"], ["mine.py:Mine", "no such file"]),
    "method option": (["method.kapa=3"], ["method.kapa is not an option", "did you mean method.kappa?"]),
    "train option": (["train.learning_rat=1"], ["did you mean train.learning_rate?"]),
    "topic option": (["topics.topic.max_lenght=9"], ["did you mean topics.topic.max_length?"]),
    "source option": (["topics.topic.forget={pth: a}"], ["did you mean path?"]),
    "purpose": (["purpose.reasn=law"], ["purpose.reasn is not an option", "did you mean purpose.reason?"]),
    "top level": (["sede=3"], ["sede is not an option", "did you mean seed?"]),
    "without its group": (["kappa=16"], ["kappa is not an option; did you mean method.kappa?"]),
    "short": (["train.lr=1"], ["train.lr is not an option; did you mean train.learning_rate?"]),
    "as an option": (["--max-steps", "20"], ["No such option: --max-steps", "have no dashes: train.max_steps=20"]),
    "short elsewhere": (["steps=20"], ["steps is not an option; did you mean train.max_steps?"]),
    "with spaces": (["method.kappa", "=", "16"], ["expected key=value without spaces"]),
    "flag": (["--methd", "srmu"], ["--methd", "--method"]),
    "layer word": (["method.layer=seven"], ["method.layer=seven", "valid integer"]),
    "layer fraction": (["method.layer=1.5"], ["method.layer=1.5", "valid integer"]),
    "rate word": (["train.learning_rate=fast"], ["train.learning_rate=fast", "valid number"]),
    "bool": (["train.shuffle=maybe"], ["train.shuffle=maybe", "valid boolean"]),
    "choice": (["method.importance=quotient"], ["method.importance=quotient", "'ratio'"]),
    "dtype": (["dtype=float61"], ["dtype=float61", "'float32'"]),
    "seed": (["seed=x"], ["seed=x", "valid integer"]),
    "eval": (["eval=quiz"], ["eval=quiz", "valid list"]),
    "train": (["train=5"], ["train=5"]),
    "topics": (["topics=5"], ["topics=5"]),
    "layer high": (["method.layer=9"], ["layer 9 does not exist", "4 layers (0-3)"]),
    "layer low": (["method.layer=-1"], ["layer -1 does not exist", "4 layers (0-3)"]),
    "window": (["method.layer=1"], ["window of 3 layers ending at layer 1", "window=1 to 2"]),
    "mlp_post": (["method.stream=mlp_post"], ["ending at layer 1", "window=1 to 2"]),
    "no window": (["method.window=0"], ["method.window=0: expected a number at least 1"]),
    "strength": (["method.coeff=2", "method.kappa=2"], ["method.coeff and method.kappa"]),
    "topic strength": (["topics.topic.coeff=2", "topics.topic.kappa=2"], ["one of them"]),
    "no effect": (["method.lam=2"], ["method.lam has no effect", "importance=difference"]),
    "no anchors": (["method.anchor_share=0.2"], ["has no effect", "anchors=random"]),
    "scale": (["--method", "adaptive_rmu", "method.scale=2"], ["no effect without method.coeff"]),
    "rate": (["train.learning_rate=0"], ["train.learning_rate must be above 0"]),
    "batch": (["train.batch_size=0"], ["train.batch_size must be above 0"]),
    "bf16": (["train.weights=bf16"], ["train.weights=bf16 needs a bf16 model"]),
    "length": (["topics.topic.max_length=0"], ["topics.topic.max_length=0", "equal to 2"]),
    "negative length": (["topics.topic.retain_max_length=-1"], ["retain_max_length=-1"]),
    "length of a word": (["topics.topic.max_length=2"], ["forget texts are too short"]),
    "override": (["foo"], ["'foo': expected key=value"]),
    "key": (["=foo"], ["'=foo': expected key=value"]),
    "value": (["seed=[1"], ["'seed=[1'", "not YAML"]),
    "deeper": (["model.name=x"], ["'model.name=x'", "model holds a value"]),
    "device": (["device=cuda:99"], ["device cuda:99 is not there"]),
    "no device": (["device=gpu"], ["device gpu is not there"]),
    "revision": (["revision=main"], ["revision does not apply to the local folder"]),
    "model": (["model=nowhere"], ["model nowhere: no such folder, and not a hub id"]),
    "hub model": (["model=owner/name"], ["model owner/name: no such folder, and the hub says"]),
    "data set": (["topics.topic.forget={dataset: a/b}"], ["data set a/b cannot be loaded"]),
    "both": (["topics.topic.forget={dataset: a, path: b}"], ["one of path", "or dataset"]),
    "split": (["topics.topic.forget={path: a, split: b}"], ["do not apply to the file"]),
    "out full": (["--out", "model"], ["output folder model is not empty"]),
    "out file": (["--out", "forget.jsonl"], ["output folder forget.jsonl is a file"]),
    "out in a file": (["--out", "forget.jsonl/out"], ["forget.jsonl/out cannot be made"]),
    "runs in a file": (["runs_dir=forget.jsonl"], ["cannot be made", "forget.jsonl is not"]),
}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(case: str, call: Call) -> None:
    options, says = OPTIONS[case]
    refused(call, ["unlearn", *sources(), *QUICK, *options], *says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there(call: Call) -> None:
    refused(call, ["unlearn", *sources(), *QUICK, "device=cuda"], "device cuda is not there")


VERBS: dict[str, tuple[list[str], list[str]]] = {
    "verb": (["unlern"], ["'unlern' is not a verb of srmu; did you mean unlearn?"]),
    "old verb": (["organism", "out"], ["'organism' is not a verb", "choose one of demo, ", "testbed"]),
    "far from any verb": (["qqq"], ["'qqq' is not a verb", "choose one of demo, ", "testbed"]),
    "shell glob": (
        ["unlearn", "--model", "model", "--forget", "a.jsonl", "b.jsonl", "--retain", "r.jsonl"],
        ["b.jsonl: expected key=value", "quote it: --forget 'texts/*.jsonl'"],
    ),
    "overrides": (["verify", "model", "device=cpu"], ["device=cpu: overrides go with --rerun"]),
    "seeds": (["demo", "--seeds", "0,x"], ["--seeds 0,x: 'x' is not a seed"]),
    "nothing": (["unlearn"], ["name a config file, or --model M --forget F [--retain R]"]),
    "no retain": (
        ["unlearn", "--model", "model", "--forget", "forget.jsonl"],
        ["method srmu needs retain texts", "name them: retain, or topics.topic.retain in a config"],
    ),
    "both forms": (["unlearn", "c.yaml", "--model", "m"], ["srmu unlearn c.yaml method.name=rmu"]),
    "as an option": (["unlearn", "--steps", "20"], ["options of a config have no dashes: train.max_steps=20"]),
    "missing config": (["unlearn", "c.yaml"], ["c.yaml: no such file"]),
    "folder config": (["unlearn", "model"], ["model is a folder", "--model model --forget F"]),
    "eval nothing": (["eval"], ["Missing argument"]),
    "attack without a trial": (["attack", "x", "--trials", "0"], ["--trials", "greater than or equal to 1"]),
    "no sweep": (["sweep"], ["srmu sweep configs/sweep-grid.yaml"]),
    "no tasks": (["eval", "model"], ["no task is named: give tasks, such as a,b"]),
    "no model": (["eval", "nowhere", "--tasks", "a"], ["nowhere: no such folder"]),
    "no model in it": (["eval", ".", "--tasks", "a"], ["has no config.json"]),
    "limit": (["eval", "model", "--tasks", "a", "--limit", "x"], ["--limit", "integer"]),
    "no limit": (["eval", "model", "--tasks", "a", "--limit", "0"], ["limit 0: expected 1"]),
    "export model": (["export", "model", "out"], ["model is not a finished run"]),
    "export nothing": (["export", "nowhere", "out"], ["nowhere is not a finished run"]),
    "export to nowhere": (["export", "nowhere"], ["Missing argument"]),
}


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["unlearn", "own/hihg.yaml"], "own/high.yaml"),
        (["unlearn", "onw/high.yaml"], "own"),
        (["sweep", "own/hihg.yaml"], "own/high.yaml"),
        (["export", "runs/srmu-1", "out"], "runs/srmu-12"),
        (["compare", "runs/srmu-1"], "runs/srmu-12"),
        (["attack", "runs/srmu-1"], "runs/srmu-12"),
        (["verify", "runs/srmu-1"], "runs/srmu-12"),
        (["report", "runs/srmu-1"], "runs/srmu-12"),
        (["eval", "./runs/srmu-1", "--tasks", "a"], "runs/srmu-12"),
        (["unlearn", *sources(forget="forgte.jsonl")], "forget.jsonl"),
        (["unlearn", *sources(model="./modle")], "model"),
        (["ask", "runs/srmu-1", "w1"], "runs/srmu-12"),
    ],
)
def test_a_mistyped_path_is_told_what_lies_beside_it(arguments: list[str], meant: str, call: Call) -> None:
    Path("own").mkdir()
    Path("own/high.yaml").write_text("model: m\n")
    Path("runs/srmu-12").mkdir(parents=True)
    refused(call, arguments, "did you mean ", f"{meant}?")


def test_a_path_that_cannot_be_looked_up_gets_no_suggestion(call: Call) -> None:
    Path("link").symlink_to("link")
    for path in ("x" * 300, "link/high.yaml", "forget.jsonl/high.yaml"):
        assert_one_line(call("unlearn", path))


@pytest.mark.parametrize("case", VERBS)
def test_bad_verbs(case: str, call: Call) -> None:
    arguments, says = VERBS[case]
    refused(call, arguments, *says)


@pytest.fixture
def builtin(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for lm-eval's 14,000 tasks, which take seconds to list."""
    from lm_eval.tasks import TaskManager

    (workplace / "builtin").mkdir()
    manager = TaskManager(include_defaults=False, include_path=workplace / "builtin")
    monkeypatch.setattr(lm_eval, "_builtin_tasks", lambda: manager)


def test_an_unknown_task(call: Call, builtin: None) -> None:
    refused(call, ["eval", "model", "--tasks", "quizz"], "task 'quizz' does not exist")


# --- config files

CONFIGS: dict[str, tuple[str, list[str]]] = {
    "not YAML": ("model: model\ntopics: {bio: [\n", ["c.yaml:3: not YAML"]),
    "tab": ("model: model\n\tseed: 1\n", ["c.yaml:2: not YAML"]),
    "python": ("model: !!python/object:os.system {}\n", ["c.yaml:1: not YAML"]),
    "list": ("- model\n", ["c.yaml: expected keys and values"]),
    "empty": ("", ["c.yaml: expected keys and values"]),
    "date": ("2024-01-01: model\n", ["keys must be text"]),
    "no model": ("method: srmu\ntopics: {}\n", ["model is missing from the config"]),
    "no topics": ("model: model\nmethod: srmu\ntopics: {}\n", ["topics: name at least one"]),
    "no retain": (
        "model: model\nmethod: srmu\ntopics: {bio: {forget: forget.jsonl}}\n",
        ["method srmu needs retain texts", "retain, or topics.bio.retain in a config"],
    ),
    "method list": ("model: model\nmethod: [srmu]\ntopics: {}\n", ["method: expected a mapping"]),
    "topic key": (
        "model: model\nmethod: srmu\ntopics: {1: {forget: a, retain: b, max_lenght: 3}}\n",
        ["topics.1.max_lenght is not an option; did you mean topics.1.max_length?"],
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configs(case: str, call: Call) -> None:
    text, says = CONFIGS[case]
    Path("c.yaml").write_text(text)
    refused(call, ["unlearn", "c.yaml"], *says)


def test_a_config_that_is_not_text(call: Call) -> None:
    Path("c.yaml").write_bytes(gzip.compress(b"model: model"))
    refused(call, ["unlearn", "c.yaml"], "c.yaml: cannot be read")


# --- models


class Payload:
    """A pickle that would write a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def without(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def only_pickle(folder: Path) -> None:
    without(folder, "*.safetensors*")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def masked(folder: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, intermediate_size=48)
    without(folder, "*.safetensors*")
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def points_out(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))


def truncated(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])


MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no safetensors": (lambda f: without(f, "*.safetensors*"), ["other has no model.safetensors"]),
    "only a pickle": (only_pickle, ["only pytorch_model.bin", "save_pretrained"]),
    "not causal": (masked, ["not a causal language model", "BertForMaskedLM"]),
    "no pad, no eos": (
        lambda f: word_tokenizer(pad_token=None, eos_token=None).save_pretrained(f),
        ["neither a pad nor an eos token", "pad_token"],
    ),
    "no tokenizer": (lambda f: without(f, "*token*"), ["tokenizer", "other"]),
    "no config": (lambda f: without(f, "config.json"), ["other has no config.json"]),
    "bad config": (lambda f: (f / "config.json").write_text("{"), ["config.json cannot be read"]),
    "points out": (points_out, ["points out of the folder: '../model-00001"]),
    "truncated": (truncated, ["safetensors is damaged"]),
    "empty folder": (lambda f: without(f, "*"), ["other has no config.json"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_models(case: str, call: Call) -> None:
    change, says = MODELS[case]
    change(Path(shutil.copytree("model", "other")))
    refused(call, ["unlearn", *sources(model="other"), *QUICK, "--out", "out"], *says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "m\udce9"], ["'m\\udce9' is not UTF-8"]),
        (["--forget", "f\udce9.jsonl"], ["'f\\udce9.jsonl' is not UTF-8"]),
        (["runs_dir=r\udce9"], ["'r\\udce9' is not UTF-8"]),
        (["--out", "o\udce9"], ["/o\\udce9: the name is not UTF-8; rename it"]),
        ([], ["the name is not UTF-8"]),
    ],
)
def test_names_that_are_not_utf8(
    options: list[str], says: list[str], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux takes any bytes for a name, and safetensors does not."""
    if not options:  # the working folder
        shutil.copytree("model", "w\udce9/model")
        for role in ("forget", "retain"):
            shutil.copy(f"{role}.jsonl", "w\udce9")
        monkeypatch.chdir("w\udce9")
    refused(call, ["unlearn", *sources(), *QUICK, *options], *says)


# --- a loss that is not finite


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (["train.learning_rate=1e30"], "step 1, topic topic, batch 1"),
        (["method.kappa=1e38"], "step 0, topic topic, batch 0"),
        (["method.coeff=1e38"], "step 0, topic topic, batch 0"),
    ],
)
def test_a_loss_that_is_not_finite(options: list[str], place: str, call: Call) -> None:
    arguments = ["unlearn", *sources(), *QUICK, *options, "--out", "out"]
    answer = call(*arguments)
    assert_one_line(answer, f"not finite at {place}", "lower train.learning_rate")
    folder = next(Path("runs").iterdir())
    record = json.loads((folder / "record.json").read_text())
    assert record["stop_reason"].startswith(f"the loss is not finite at {place}")
    assert not Path("out").exists()
    refused(call, ["export", folder, "out"], "diverged: ", place)
    refused(call, arguments, "holds this run, which diverged")


@pytest.mark.parametrize(
    ("tensor", "says"), [("mlp.down_proj", "stores NaN or infinity"), ("mlp.up_proj", "activations")]
)
def test_a_model_that_is_not_finite(tensor: str, says: str, call: Call) -> None:
    name = f"model.layers.0.{tensor}.weight"
    path = list_shards(Path("model"))[name]
    tensors = load_file(path)
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    refused(call, ["unlearn", *sources(), *QUICK, "--out", "out"], says)


# --- what works


@pytest.mark.slow
def test_the_forms_mean_the_same(call: Call, workplace: Path) -> None:
    """Options, a config file, and the library: the same run, bit for bit."""
    answer = call("unlearn", *sources(), *QUICK)
    assert answer.code == 0
    assert "next: srmu eval runs/" in answer.out
    first = Run.open(next(Path("runs").iterdir()))
    assert f"wrote runs/{first.folder.name}" in answer.out
    topics = {"topic": {"forget": "forget.jsonl", "retain": "retain.jsonl"}}
    tree = {"model": "model", "method": "srmu", "topics": topics, "runs_dir": "from-file"}
    Path("c.yaml").write_text(yaml.safe_dump(tree))
    assert call("unlearn", "c.yaml", *QUICK).code == 0
    library = srmu.make_config("model", "forget.jsonl", "retain.jsonl", "srmu", [*QUICK, "runs_dir=from-library"])
    others = [Run.open(next(Path("from-file").iterdir())), srmu.unlearn(library)]
    for other in others:
        assert other.folder.name == first.folder.name
        assert other.delta.keys() == first.delta.keys()
        assert all(torch.equal(other.delta[name], first.delta[name]) for name in first.delta)


def test_again(call: Call) -> None:
    call("unlearn", *sources(), *QUICK)
    before = listing()
    answer = call("unlearn", *sources(), *QUICK)
    assert answer.code == 0
    assert "this run was there already: runs/" in answer.out
    assert f"srmu ask {next(Path('runs').iterdir())} PROMPT" in answer.out
    assert listing() == before
    assert call("unlearn", next(Path("runs").iterdir()) / "config.yaml").code == 0
    assert listing() == before


@pytest.mark.slow
def test_unlearn_and_export_as_json(call: Call) -> None:
    answer = call("unlearn", *sources(), *QUICK, "--out", "out", "--json")
    assert answer.code == 0
    written = json.loads(answer.out)
    assert set(written) == {"run", "out", "record"}
    assert written["record"]["steps"] == 2
    assert Path(written["run"], "record.json").is_file()
    exported = call("export", written["run"], "again", "--json")
    assert json.loads(exported.out) == {"out": "again", "changed": written["record"]["changed"]}
    files = sorted(p.name for p in Path("again").iterdir())
    assert files == sorted(p.name for p in Path("out").iterdir())
    assert all(Path("again", f).read_bytes() == Path("out", f).read_bytes() for f in files)
    refused(call, ["export", written["run"], "out"], "output folder out is not empty")


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("as_json", [True, False])
def test_dry_run_writes_nothing(as_json: bool, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing()
    answer = call("unlearn", *sources(), *QUICK, "--dry-run", *["--json"][:as_json])
    assert (answer.code, answer.err) == (0, "")
    assert listing() == before
    if as_json:
        plan = json.loads(answer.out)
        assert (plan["layers"], plan["layers_loaded"], plan["steps"]) == (4, 3, 2)
        assert plan["trainable"] == ["0.mlp_down", "1.mlp_down", "2.mlp_down"]
        assert plan["config"]["method"]["kappa"] == 8
    else:
        assert "3 of 4 layers" in answer.out
        assert "every option, as it would run: the same with --json" in answer.out and "kappa:" not in answer.out
    planned = json.loads(call("unlearn", *sources(), *QUICK, "--dry-run", "--json").out)
    done = json.loads(call("unlearn", *sources(), *QUICK, "--json").out)
    assert planned["run"] == done["run"]


def test_eval(call: Call, workplace: Path, builtin: None) -> None:
    task = {
        "task": "quiz", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    Path("tasks").mkdir()
    Path("tasks/quiz.yaml").write_text(yaml.safe_dump(task))
    rows = [{"question": t, "options": ["w1", "w2"], "answer": 0} for t in texts(8, 5)]
    Path("tasks/quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("unlearn", *sources(), *QUICK)
    run = next(Path("runs").iterdir())
    results = json.loads(call("eval", "model", "--tasks", "quiz", "--json").out)
    assert results["quiz/acc"]["n"] == 8
    both = json.loads(call("eval", run, "--tasks", "quiz", "--json").out)
    assert both["before"]["quiz/acc"] == results["quiz/acc"]
    assert plain_metrics(read_metrics(run)["after"]) == both["after"]
    shown = call("eval", run, "--tasks", "quiz").out
    value = both["after"]["quiz/acc"]["value"]
    assert "quiz/acc" in shown and f"{value:.3f} ±" in shown and "original" in shown
    assert "repetition/forget" in shown and "repeats itself" not in shown
    assert f"next: srmu attack {run} --tasks TASK --val split" in shown


def test_a_broken_model_is_told_by_the_records_flag(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the words of a sentence."""
    monkeypatch.setattr("srmu.runs.effect.judge_numbers", lambda *given: "nothing good")
    answer = call("unlearn", *sources(), "method.layer=2", "train.max_steps=4", "train.learning_rate=3")
    assert "next: the same with the setting that the sentence above names" in answer.out, answer
    assert "srmu eval" in call("unlearn", *sources(), *QUICK).out


@pytest.mark.slow
def test_the_cache_is_listed_and_cleared(call: Call, workplace: Path) -> None:
    kept = workplace / "cache" / "activations"
    answer = call("info", "cache", "ls")
    assert answer.code == 0 and "activations 0.000 of at most 20 GB" in answer.out
    first = call("unlearn", *sources(), *QUICK)
    assert "activations are kept for later runs; see srmu info cache" in first.out
    assert "kept" not in call("unlearn", *sources(), *QUICK, "seed=1", "cache=none").out
    assert len(list(kept.iterdir())) == 1
    rows = json.loads(call("info", "cache", "ls", "--json").out)
    assert rows["activations_bytes"] == sum(p.stat().st_size for p in kept.rglob("*.*"))
    assert [row["model"] for row in rows["activations"]] == [str(workplace / "model")]
    table = call("info", "cache", "ls").out
    assert rows["activations"][0]["activations"] in table and "srmu info cache clear" in table
    (workplace / "cache" / "evals").mkdir()
    (workplace / "cache" / "evals" / "x.json").write_text("{}")
    assert json.loads(call("info", "cache", "clear", "--json").out)["freed_bytes"] > 0
    assert not kept.exists() and (workplace / "cache" / "evals" / "x.json").exists()
    hashes = sum(path.stat().st_size for path in (workplace / "cache" / "hashes").iterdir())
    freed = json.loads(call("info", "cache", "clear", "--all", "--json").out)["freed_bytes"]
    assert freed == 2 + hashes > 2
    assert (workplace / "cache" / "key").exists()  # without it, digests would change
    assert_one_line(call("info", "cache", "list"), "ls", "clear")


def test_an_export_shares_files_when_asked(call: Call, workplace: Path) -> None:
    run = json.loads(call("unlearn", *sources(), *QUICK, "--json").out)["run"]
    before = {p: p.read_bytes() for p in Path("model").iterdir()}
    assert call("export", run, "linked", "--link").code == 0
    assert call("export", run, "copied", "--copy").code == 0
    changed = {list_shards(Path("model"))[name].name for name in Run.open(run).delta}
    for path in Path("model").glob("*.safetensors"):
        shared = path.name not in changed
        assert (workplace / "linked" / path.name).samefile(path) == shared
        assert not (workplace / "copied" / path.name).samefile(path)
        same = (Path("linked") / path.name).read_bytes() == (Path("copied") / path.name).read_bytes()
        assert same
    assert not Path("linked/config.json").samefile("model/config.json")  # people edit it
    assert before == {p: p.read_bytes() for p in Path("model").iterdir()}


def test_methods(call: Call) -> None:
    table = json.loads(call("info", "methods", "--json").out)
    assert list(table) == list(METHODS)
    assert table["srmu"]["paper"] == "arXiv 2512.16297"
    assert table["srmu"]["options"]["importance"] == "ratio"
    shown = call("info", "methods", "adaptive_rmu").out
    assert all(f"    {option}: " in shown for option in table["adaptive_rmu"]["options"])
    assert len(call("info", "methods").out.splitlines()) < 50  # about a screen


def test_help(call: Call) -> None:
    nothing, asked = call(), call("--help")
    assert nothing == asked
    assert (asked.code, asked.err) == (0, "")
    assert "unlearn" in asked.out and "--debug" in asked.out


def test_debug_shows_the_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["srmu", "--debug", "unlearn", "c.yaml"])
    with pytest.raises(srmu.SrmuError, match="no such file"):
        main.main()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ZeroDivisionError("a\nb"), 1, "srmu: internal error: ZeroDivisionError: a b (--debug"),
        (KeyboardInterrupt(), 130, "srmu: interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Permission denied: '/x'"),
        (OSError(28, "No space left on device"), 2, "srmu: [Errno 28] No space left on device"),
        (OSError("of a library"), 1, "srmu: internal error: OSError: of a library"),
    ],
)
def test_exit_codes(error: BaseException, code: int, says: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("srmu.runs.run.run_plan", fail)
    answer = call("unlearn", *sources(), *QUICK)
    assert (answer.code, answer.out, answer.err.count("\n")) == (code, "", 1)
    assert says in answer.err


def test_a_fault_of_own_code_is_named_there(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from srmu.methods.ga import GA\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(GA):\n"
        '    """GA with a fault."""\n\n'
        '    name = "mine"\n\n'
        "    def loss(self, model, state, forget, retain, step):\n"
        "        return forget.labels\n"
    )
    answer = call("unlearn", *sources(), "train.max_steps=1", f"method.name={tmp_path / 'mine.py'}:Mine")
    said = f"srmu: {tmp_path / 'mine.py'}:12: AttributeError: 'Batch' object has no attribute 'labels' (--debug"
    assert (answer.code, answer.out) == (2, "") and said in answer.err


# --- in a process of its own


def test_an_interrupt_before_the_program_is_loaded_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "srmu", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
def test_a_process_answers_bad_input_in_one_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    Path("a.jsonl").write_text(GOOD * 99 + '{"text": 5}\n')
    arguments = ["unlearn", *sources(forget="a.jsonl"), *QUICK]
    refused(outside, arguments, f"{workplace}/a.jsonl:100: 'text' is int")
    refused(outside, ["unlern"], "did you mean unlearn?")


@pytest.mark.slow
def test_a_process_prints_json_alone(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    answer = outside("unlearn", *sources(), *QUICK, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["record"]["stop_reason"] == "max_steps"
    assert all(line.endswith(" s left") for line in answer.err.splitlines())  # only its own log
    assert os.environ["SRMU_CACHE"] == str(workplace / "cache")
    assert (workplace / "cache" / "key").exists()
