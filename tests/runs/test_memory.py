"""What each process holds, by hand; dry runs of published dimensions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srmu.engine.loading import build_skeleton, read_config
from srmu.runs.config import load_config
from srmu.runs.counting import KEPT_ACTIVATIONS, KEPT_PIECES, StepVariant, TensorSizes, held_bytes, plan_launches
from srmu.runs.estimate import count_parameters, plan_dry_run

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {
    "llama-3.2-1b": 1.24e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.1-405b": 405.9e9,
    "qwen3-30b-a3b": 30.5e9,
    "zephyr-7b-beta": 7.24e9,
}
SIZE = TensorSizes((100, 100), (50, 50), 10)


def test_all_of_them_are_checked() -> None:
    assert {path.name for path in (CONFIGS / "models").iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_as_published(name: str) -> None:
    assert count_parameters(CONFIGS / "models" / name) == pytest.approx(PUBLISHED[name], rel=4e-3)


def way(**changed: Any) -> StepVariant:
    return StepVariant(
        **({"size": SIZE, "trained": SIZE, "itemsize": 2, "mixed": True, "gpu": False, "flops": 64} | changed)
    )


def test_bytes_by_hand() -> None:
    whole = held_bytes(way(), 1, 1.0)
    assert whole == {
        "weights": 620, "originals": 620, "last_good": 620, "masters": 1240, "moments": 2480,
        "step": 620 + 1240 + 400, "cache": 0,  # the last for one piece as AdamW works on it
    }  # fmt: skip
    assert held_bytes(way(gpu=True), 1, 1.0)["step"] == 2480
    part = held_bytes(way(sharded=True), 4, 0.25)
    assert part["weights"] == 2 * (300 // 4 + 10) == part["originals"]
    assert part["moments"] == 8 * 85
    kept = KEPT_PIECES * 2 * 100
    # a piece whole, twice, and its gradient, also in float32, twice; the part's gradients
    assert part["step"] == 2 * 3 * 100 + 2 * 4 * 100 + 2 * 85 + 4 * (85 + 25) + kept
    adapted = held_bytes(way(lora=8, adapters=7, activations=9000), 1, 0.5)
    assert adapted["weights"] == adapted["originals"] == 620
    assert (adapted["masters"], adapted["moments"]) == (0, 8 * 7)
    assert adapted["step"] == round(KEPT_ACTIVATIONS * 4500 + 4 * 7)
    assert held_bytes(way(lora=8, adapters=7, activations=9000, gpu=True), 1, 0.5)["step"] == 4500


def test_launches() -> None:
    ways = [way(gpu=True), way(gpu=True, sharded=True)]
    rows = plan_launches(ways, 4, spreads=True)
    assert [(r["processes"], r["sharded"]) for r in rows] == [
        (1, False), (2, False), (2, True), (4, False), (4, True), (8, False), (8, True),
    ]  # fmt: skip
    assert [r["flops_per_rank_per_step"] for r in rows] == [64, 32, 32, 16, 16, 16, 16]
    assert {r["device_gb"] for r in rows} == {24}
    assert len(plan_launches(ways, 4, spreads=False)) == 1
    left = [*ways, replace(ways[0], offloaded=(100, 100))]
    offloaded = [r for r in plan_launches(left, 4, spreads=True) if r["offloaded"]]
    assert [(r["processes"], r["parts"]["weights"]) for r in offloaded] == [(1, 620 - 2 * 100)]
    large = [replace(each, size=TensorSizes((10**12,) * 2, (), 0)) for each in ways]
    rows = plan_launches(large, 4, spreads=True)
    assert rows[-1]["processes"] == 64 and rows[0]["device_gb"] is None


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-30b-a3b"])
def test_a_dry_run_of_dimensions_alone(name: str) -> None:
    folder = CONFIGS / "models" / name
    config, plan, lines = plan_dry_run(load_config(CONFIGS / "scale.yaml", [f"model={folder}", "train.max_steps=7"]))
    assert config.model == plan["model"] == str(folder) and plan["steps"] == 7
    whole = sum(p.numel() for p in build_skeleton(read_config(folder)).parameters())
    assert plan["dimensions"]["parameters"] == whole
    assert plan["checkpoint_bytes"] == 2 * whole
    by = {(r["processes"], r["sharded"], r["caching"]): r for r in plan["ranks"]}
    assert by[8, True, False]["memory_per_rank"] < by[1, False, False]["memory_per_rank"] / 2
    flops = [by[1, False, kept]["flops_per_rank_per_step"] for kept in (True, False)]
    assert flops[0] == pytest.approx(plan["flops_per_step"], rel=1e-6) and flops[0] < flops[1]
    assert any("no weights are here" in line for line in lines)
    assert sum(line.endswith(("fits here", "not here")) for line in lines) == len(plan["ranks"])
    json.dumps(plan)
    assert {path.name for path in folder.iterdir()} == {"config.json"}
