"""What a command names is opened in one way: a model, or a run before and after."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models import save_pico, texts, write_jsonl
from srmu.engine.loading import load_module
from srmu.engine.weights import apply_delta
from srmu.errors import SrmuError
from srmu.runs.config import make_config
from srmu.runs.run import Run, find_run, open_target, unlearn_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a run of it."""
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "model")
    sources = [write_jsonl(folder / f"{role}.jsonl", texts(4, i)) for i, role in enumerate(("forget", "retain"))]
    options = ["method.layer=2", "train.max_steps=2", "train.learning_rate=0.01", "cache=none"]
    options.append(f"runs_dir={folder / 'runs'}")
    run = unlearn_config(make_config(str(folder / "model"), *sources, "srmu", options))
    run.folder.rename(folder / "run")
    return folder


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """A copy of the run, to spoil."""
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_model_has_no_run_and_stays_as_it_is(place: Path) -> None:
    opened = open_target(str(place / "model"), "cpu")
    assert opened.run is None and opened.base == place / "model"
    assert not opened.module.training
    before = values(opened.module)
    with opened.after() as module:
        assert module is opened.module and same(values(module), before)
    assert opened.tokenizer("w1")["input_ids"]


@pytest.mark.parametrize("kind", [str, Path, Run])
def test_a_run_is_its_model_before_and_with_its_delta_after(place: Path, kind: Any) -> None:
    opened = open_target(kind(place / "run"), "cpu")
    assert isinstance(opened.run, Run) and opened.base == place / "model"
    expected = load_module(place / "model")
    assert same(values(opened.module), values(expected))
    apply_delta(expected, *opened.run.changes)
    with opened.after() as module:
        assert same(values(module), values(expected))


def test_a_run_gives_its_model_as_it_answers(place: Path, copy: Path) -> None:
    run = Run.open(place / "run")
    model, tokenizer = run.load_model("cpu")
    with open_target(run, "cpu").after() as module:
        assert same(values(model), values(module))
    assert not model.training and all(p.requires_grad for p in model.parameters())  # an ordinary model
    assert tokenizer("w1")["input_ids"]
    record = json.loads((copy / "record.json").read_text())
    (copy / "record.json").write_text(json.dumps(record | {"diverged": True}))
    with pytest.raises(SrmuError, match="diverged"):
        Run.open(copy).load_model()


def test_an_export_is_a_model(place: Path, tmp_path: Path) -> None:
    out = Run.open(place / "run").export(tmp_path / "out")
    opened = open_target(out)
    assert opened.run is None
    with open_target(place / "run", "cpu").after() as module:
        assert same(values(opened.module), values(module))


def test_a_model_whose_folder_holds_a_config_yaml_is_a_model(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "model", tmp_path / "model")
    for name in ("config.yaml", "record.json"):
        (folder / name).write_text("{}")
    assert find_run(folder) is None
    assert open_target(folder).run is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unfinished": (
        lambda f: (f / "record.json").unlink(),
        r"run is not a finished run: it has no record\.json; srmu unlearn .*config\.yaml makes it",
    ),
    "half a record": (lambda f: cut(f / "record.json"), r"record\.json is damaged"),
    "no config": (lambda f: (f / "config.yaml").unlink(), r"config\.yaml: no such file"),
    "no delta": (
        lambda f: (f / "delta.safetensors").unlink(),
        r"run is damaged: it has no delta\.safetensors; make the run again",
    ),
    "half a delta": (lambda f: cut(f / "delta.safetensors"), r"delta\.safetensors is damaged"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], r"run has no config\.json"),
    "no folder": (shutil.rmtree, r"model .*run: no such folder, and not a hub id"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_opened_is_said_in_a_line(copy: Path, case: str) -> None:
    spoil, says = SPOILT[case]
    spoil(copy)
    with pytest.raises(SrmuError, match=says) as error, open_target(copy, "cpu").after():
        pass
    assert "\n" not in str(error.value)


def test_a_run_that_changed_nothing_has_no_delta(copy: Path) -> None:
    record = json.loads((copy / "record.json").read_text())
    (copy / "record.json").write_text(json.dumps(record | {"changed": []}))
    (copy / "delta.safetensors").unlink()
    assert Run.open(copy).delta == {}
