"""The dtype that a model is loaded in, where nobody named one."""

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import save_pico
from srmu.engine import devices, loading
from srmu.engine.loading import choose_dtype
from srmu.runs.config import make_config
from srmu.runs.plan import plan_run
from srmu.runs.run import OpenedModel, Run, unlearn_config


@pytest.fixture
def slow(monkeypatch):
    """A processor that does not compute in bfloat16."""
    monkeypatch.setattr(loading, "computes_bf16", lambda: False)


@pytest.mark.usefixtures("slow")
def test_a_slow_processor_computes_in_float32(tmp_path):
    half, full = (
        save_pico(tmp_path / name, dtype=t) for name, t in (("half", torch.bfloat16), ("full", torch.float32))
    )
    assert choose_dtype(half, "cpu") == "float32"
    assert choose_dtype(half, "cuda") == "auto"
    assert choose_dtype(half, "cpu", "bfloat16") == "bfloat16"
    assert choose_dtype(full, "cpu") == "auto"
    assert OpenedModel(half).module.dtype == torch.float32
    assert OpenedModel(full).dtype == "auto"


def test_a_fast_processor_computes_in_what_is_stored(tmp_path):
    assert choose_dtype(save_pico(tmp_path / "half", dtype=torch.bfloat16), "cpu") == "auto"


@pytest.mark.usefixtures("slow")
def test_a_model_that_would_fill_the_memory_stays_as_it_is(tmp_path, monkeypatch):
    half = save_pico(tmp_path / "half", dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in half.glob("*.safetensors"))
    memory = type("Memory", (), {"total": 3 * size})
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: memory)
    assert choose_dtype(half, "cpu") == "auto"


@pytest.mark.usefixtures("slow")
def test_a_run_saves_the_checkpoints_dtype(workplace):
    save_pico(workplace / "half", dtype=torch.bfloat16)
    forget, retain = ([str(workplace / f"{name}.jsonl")] for name in ("forget", "retain"))
    given = ["train.max_steps=2", "method.layer=2", f"runs_dir={workplace / 'runs'}"]
    config = make_config(str(workplace / "half"), forget, retain, "srmu", given)
    assert plan_run(config).dtype == torch.float32
    run = unlearn_config(config)
    assert {tensor.dtype for tensor in run.delta.values()} == {torch.bfloat16}
    assert Run.open(run.folder).config.dtype == "float32"
    # it is compared with the run in what the run computes in
    exported = run.export(workplace / "exported")
    stored = (tensor.dtype for path in exported.glob("*.safetensors") for tensor in load_file(path).values())
    assert {*stored} == {torch.bfloat16}


def test_the_processor_is_asked_once(monkeypatch):
    devices.computes_bf16.cache_clear()
    asked = []
    monkeypatch.setattr(devices.timeit, "timeit", lambda *given, **how: asked.append(1) or 1.0)
    assert devices.computes_bf16()
    assert devices.computes_bf16()
    assert len(asked) == 2 * devices.REPEATS  # each dtype in turns
    devices.computes_bf16.cache_clear()
