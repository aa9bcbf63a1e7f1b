"""The arithmetic of sizes, against modules of the published configs and the meter's counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from srmu.engine.loading import build_skeleton, read_config
from srmu.engine.model import EditableModel, Site
from srmu.reproduce import needs
from srmu.runs import estimate, meter, scale
from srmu.runs.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {
    "llama-3.2-1b": 1.24e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.1-405b": 405.9e9,
    "qwen3-30b-a3b": 30.5e9,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "PROBE_SECONDS", 0.01)


def test_all_of_them_are_checked() -> None:
    assert {path.name for path in (CONFIGS / "models").iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_those_of_the_module_and_as_published(name: str) -> None:
    config = read_config(CONFIGS / "models" / name)
    found = scale.size_of(config)
    model = EditableModel(build_skeleton(config), ["*.mlp_down"])
    assert found == estimate.count_pieces(model, model.module.named_parameters())
    assert found.total == sum(p.numel() for p in model.module.parameters())
    assert found.total == pytest.approx(PUBLISHED[name], rel=4e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_at_a_depth(name: str) -> None:
    config = read_config(CONFIGS / "models" / name)
    model = EditableModel(build_skeleton(config), ["4.mlp_down"], 5)
    assert scale.size_of(config, 5).total == sum(p.numel() for p in model.module.parameters())


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_flops_are_those_that_the_meter_counts(name: str, depth: int | None) -> None:
    """Within 2 %: the formula leaves out the rotary tables."""
    config = read_config(CONFIGS / "models" / name)
    small: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 512}
    for key, value in (small | {"vocab_size": 500}).items():
        setattr(config, key, value)
    model = EditableModel(build_skeleton(config), ["1.mlp_down"], depth)
    site = Site(depth - 1) if depth else None
    whole = meter.takes_whole_masks(model, site)
    batch = meter.blank_batch((2, 64), model.device, whole)
    with torch.no_grad(), model.using({}):
        model.activations.room = 0
        counted = meter.run_metered(lambda: meter.site_output(model, batch, site)).flops
    assert scale.flops_per_token(config, 64, depth) * 2 * 64 == pytest.approx(counted, rel=0.02)


SIZE = scale.Size((100, 100), (50, 50), 10)


def way(**changed: Any) -> scale.Variant:
    given = {
        "lora": 0, "caching": False, "sharded": False, "trained": SIZE, "adapters": 0,
        "activations": 0, "cache": 0, "flops": 64,
    }  # fmt: skip
    return scale.Variant(**(given | changed))


def test_bytes_by_hand() -> None:
    whole = scale.held_bytes(SIZE, way(), 1, 1.0, 2, True, False)
    assert whole == {
        "weights": 620, "originals": 620, "last_good": 620, "masters": 1240, "moments": 2480,
        "step": 620 + 1240 + 400, "cache": 0,  # the last for one piece as AdamW works on it
    }  # fmt: skip
    assert scale.held_bytes(SIZE, way(), 1, 1.0, 2, True, True)["step"] == 2480
    part = scale.held_bytes(SIZE, way(sharded=True), 4, 0.25, 2, True, False)
    assert part["weights"] == 2 * (300 // 4 + 10) == part["originals"]
    assert part["moments"] == 8 * 85
    kept = scale.KEPT_PIECES * 2 * 100
    # a piece whole, twice, and its gradient, also in float32, twice; the part's gradients
    assert part["step"] == 2 * 3 * 100 + 2 * 4 * 100 + 2 * 85 + 4 * (85 + 25) + kept
    adapted = scale.held_bytes(
        SIZE, way(lora=8, adapters=7, activations=9000), 1, 0.5, 2, True, False
    )
    assert adapted["weights"] == adapted["originals"] == 620
    assert (adapted["masters"], adapted["moments"], adapted["step"]) == (0, 8 * 7, 4500 + 4 * 7)


def test_launches() -> None:
    ways = [way(), way(sharded=True)]
    given: dict[str, Any] = {"mixed": True, "gpu": True}
    rows = scale.scale_launches(SIZE, ways, 4, 2, spreads=True, **given)
    assert [(r["processes"], r["sharded"]) for r in rows] == [
        (1, False), (2, False), (2, True), (4, False), (4, True), (8, False), (8, True),
    ]  # fmt: skip
    assert [r["flops_per_rank_per_step"] for r in rows] == [64, 32, 32, 16, 16, 16, 16]
    assert {r["device_gb"] for r in rows} == {24}
    assert len(scale.scale_launches(SIZE, ways, 4, 2, spreads=False, **given)) == 1
    left = [*ways, replace(way(), offloaded=(100, 100))]
    offloaded = [
        r for r in scale.scale_launches(SIZE, left, 4, 2, spreads=True, **given) if r["offloaded"]
    ]
    assert [(r["processes"], r["parts"]["weights"]) for r in offloaded] == [(1, 620 - 2 * 100)]
    large = scale.Size((10**12,) * 2, (), 0)
    rows = scale.scale_launches(large, ways, 4, 2, spreads=True, **given)
    assert rows[-1]["processes"] == 64 and rows[0]["device_gb"] is None


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-30b-a3b"])
def test_a_dry_run_of_dimensions_alone(name: str) -> None:
    folder = CONFIGS / "models" / name
    config, found, lines = needs.dry_run(
        load_config(CONFIGS / "scale.yaml", [f"model={folder}", "train.max_steps=7"])
    )
    assert config.model == found["model"] == str(folder) and found["steps"] == 7
    assert found["dimensions"]["parameters"] == scale.size_of(read_config(folder)).total
    assert found["checkpoint_bytes"] == pytest.approx(2 * PUBLISHED[name], rel=4e-3)
    by = {(r["processes"], r["sharded"], r["caching"]): r for r in found["ranks"]}
    assert by[8, True, False]["memory_per_rank"] < by[1, False, False]["memory_per_rank"] / 2
    flops = [by[1, False, kept]["flops_per_rank_per_step"] for kept in (True, False)]
    assert flops[0] == pytest.approx(found["flops_per_step"], rel=1e-6) and flops[0] < flops[1]
    assert any("no weights are here" in line for line in lines)
    assert sum(line.endswith(("fits here", "not here")) for line in lines) == len(found["ranks"])
    json.dumps(found)
    assert {path.name for path in folder.iterdir()} == {"config.json"}
