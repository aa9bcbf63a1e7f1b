"""What disks and other people do to files: refused, or nothing half-written."""

import json
import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import processes
from helpers.models import pico_module, texts, word_tokenizer, write_jsonl
from srmu.engine import weights
from srmu.engine.loading import load_module
from srmu.errors import SrmuError
from srmu.runs.config import make_config
from srmu.runs.run import Run, unlearn_config

SHARDS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in four shards, and a run on it."""
    folder = tmp_path_factory.mktemp("made")
    pico_module().save_pretrained(folder / "model", max_shard_size="40KB")
    word_tokenizer().save_pretrained(folder / "model")
    assert len([*(folder / "model").glob("*.safetensors")]) == SHARDS
    for number, role in enumerate(("forget", "retain")):
        write_jsonl(folder / f"{role}.jsonl", texts(12, seed=number))
    run = start(folder)
    shutil.move(run.folder, folder / "run")
    return folder


def start(folder: Path, *overrides: str) -> Run:
    options = ["method.layer=2", "train.max_steps=3", "train.learning_rate=0.01", "cache=none"]
    names = [folder / "forget.jsonl", folder / "retain.jsonl"]
    runs = f"runs_dir={folder / 'runs'}"
    return unlearn_config(make_config(str(folder / "model"), *names, "srmu", [*options, runs, *overrides]))


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of the model, to spoil."""
    shutil.copytree(made / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("at", range(1, SHARDS + 1))
def test_a_disk_that_is_full_at_any_shard(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    before = {p.name: p.read_bytes() for p in (made / "model").iterdir()}
    shards = iter(range(100))
    copy = shutil.copyfile

    def fill(source: Path, target: Path) -> None:
        if target.suffix == ".safetensors" and next(shards) == at - 1:
            target.write_bytes(source.read_bytes()[:100])
            raise OSError(28, "No space left on device", str(target))
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(OSError, match="No space left"):
        Run.open(made / "run").export(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}
    assert {p.name: p.read_bytes() for p in (made / "model").iterdir()} == before


LIMITED = """
import resource, signal, sys
from pathlib import Path
from srmu.runs.run import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
Run.open(sys.argv[1]).export(sys.argv[2])
"""


@pytest.mark.slow
def test_a_real_limit_of_the_file_size(made: Path, tmp_path: Path) -> None:
    largest = max(p.stat().st_size for p in (made / "model").iterdir())
    words = ["-c", LIMITED, str(made / "run"), str(tmp_path / "out")]
    said = tmp_path / "said"
    assert processes.start(*words, str(largest - 1), err=said).wait() != 0
    assert "File too large" in said.read_text()
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "said"}
    assert processes.start(*words, str(largest + 100_000)).wait() == 0


def test_free_space_is_asked_for_first(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(SrmuError, match=r"\d MB more than are free there; free some"):
        Run.open(made / "run").export(tmp_path / "out")
    with pytest.raises(SrmuError, match="are free there; free some"):
        start(made, f"runs_dir={tmp_path / 'runs'}", "seed=5")
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


EXPORT = "import sys; from srmu.runs.run import Run; Run.open(sys.argv[1]).export(sys.argv[2])"


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.02])
def test_an_export_killed_while_it_writes_leaves_no_model(made: Path, tmp_path: Path, seconds: float) -> None:
    process = processes.start("-c", EXPORT, str(made / "run"), str(tmp_path / "out"))
    while process.poll() is None and not [*tmp_path.glob(".out.*")]:
        pass
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "out").exists():  # it was faster than the signal: then it is whole
        load_module(tmp_path / "out")
    else:
        Run.open(made / "run").export(tmp_path / "out")
    run = Run.open(made / "run")
    out = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert all(torch.equal(out[name], tensor) for name, tensor in run.delta.items())


def test_a_base_that_changed_since_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    run = start(tmp_path / "copy", "seed=1")
    untouched = next(name for name, path in weights.list_shards(run.base).items() if name not in run.record["changed"])
    path = weights.list_shards(run.base)[untouched]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SrmuError, match=f"{path.name} is not the file that"):
        Run.open(run.folder).export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def drop(folder: Path) -> None:
    """A tensor that neither the files nor the index have."""
    index = folder / weights.INDEX
    listed = json.loads(index.read_text())
    name = next(n for n in listed["weight_map"] if n.endswith("layers.1.mlp.up_proj.weight"))
    path = folder / listed["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    index.write_text(json.dumps(listed))


def pointed(where: str) -> Callable[[Path], None]:
    """An index that names a file elsewhere."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        shutil.copyfile(next(folder.glob("*.safetensors")), outside)
        index = json.loads((folder / weights.INDEX).read_text())
        target = where.format(outside=outside)
        index["weight_map"] = dict.fromkeys(index["weight_map"], target)
        (folder / weights.INDEX).write_text(json.dumps(index))

    return spoil


class Bomb:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/srmu-bomb",))


def only_pickles(folder: Path) -> None:
    import pickle

    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text("import os\nos.system('touch /tmp/srmu-bomb')\n")


def poisoned(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        path = weights.list_shards(folder)[name]
        tensors = load_file(path)
        tensors[name][0, 0] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def lying(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return spoil


def cut(folder: Path) -> None:
    os.truncate(next(folder.glob("*.safetensors")), 5000)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing tensor": (drop, "lacks 1 tensors, the first is model.layers.1.mlp.up_proj"),
    "an index up": (pointed("../outside.safetensors"), "points out of the folder"),
    "an absolute index": (pointed("{outside}"), "points out of the folder"),
    "an index into the unpickler": (pointed("pytorch_model.bin"), "points out of the folder"),
    "an index to nothing": (pointed("nowhere.safetensors"), "lacks nowhere.safetensors"),
    "an index with a separator": (pointed("a/b.safetensors"), "points out of the folder"),
    "pickles only": (only_pickles, "only pytorch_model.bin: convert it with save_pretrained"),
    "remote code": (remote_code, "config.json cannot be read"),
    "NaN": (poisoned(float("nan")), "NaN or infinity"),
    "infinity": (poisoned(float("inf")), "NaN or infinity"),
    "a shard cut short": (cut, "is damaged"),
    "more layers than there are": (lying(num_hidden_layers=6), "lacks|does not"),
    "another width": (lying(hidden_size=64), "cannot be loaded"),
    "no architecture": (lying(architectures=None), "not a causal language model"),
}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("case", FAULTS)
def test_a_checkpoint_that_is_not_right_is_refused(made: Path, model: Path, case: str) -> None:
    spoil, says = FAULTS[case]
    spoil(model)
    bomb = Path("/tmp/srmu-bomb")
    bomb.unlink(missing_ok=True)
    with pytest.raises(SrmuError, match=says):
        start(made, f"model={model}", f"runs_dir={model.parent / 'runs'}")
    assert not bomb.exists()
    assert not [*(model.parent / "runs").rglob("*")]


def test_fewer_layers_than_there_are_changes_nothing_else(made: Path, model: Path) -> None:
    """A config that lies about its layers makes another model; the lie is the base's, and stays."""
    lying(num_hidden_layers=3)(model)
    run = start(made, f"model={model}", f"runs_dir={model.parent / 'runs'}")
    assert set(run.delta) <= set(weights.list_shards(model))


def test_a_tokenizer_that_adds_bos_twice(made: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "forget.jsonl", [f"<s> {text}" for text in texts(12, seed=0)])
    with pytest.raises(SrmuError, match=r"begin with <s>, and the tokenizer adds it again"):
        start(made, f"topics.topic.forget={tmp_path / 'forget.jsonl'}")
