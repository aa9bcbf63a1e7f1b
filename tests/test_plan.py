"""The plan of a run against what the run then loads and computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ARCHITECTURES, save_pico, texts, word_tokenizer, write_jsonl
from srmu import plan, run
from srmu.config import make_config
from srmu.model import EditableModel


def planned(folder: Path, *options: str, name: str = "llama", dtype: Any = torch.float32) -> Any:
    save_pico(folder / "model", name, dtype)
    word_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "f.jsonl", texts(8, 1))
    write_jsonl(folder / "r.jsonl", texts(8, 2))
    given = ["method.layer=1", "method.window=1", *options]
    config, summary = run.plan(
        make_config(str(folder / "model"), folder / "f.jsonl", folder / "r.jsonl", "rmu", given)
    )
    topics = run.load_topics(config, word_tokenizer())
    return config, summary | plan.estimate(config, folder / "model", topics), topics


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_read_is_what_the_cut_model_holds(name: str, tmp_path: Path) -> None:
    config, estimate, _ = planned(tmp_path, name=name)
    method = config.method
    model = EditableModel.load(tmp_path / "model", depth=method.depth, trainable=method.trainable)
    held = {n: p for n, p in model.module.named_parameters() if "lm_head" not in n}
    held = {n: p for n, p in held.items() if "embed_out" not in n}
    assert estimate["tensors_read"] == len(held)
    assert estimate["bytes_read"] == sum(p.numel() * 4 for p in held.values())
    assert estimate["trained_parameters"] == sum(p.numel() for p in model.trained.values())


def test_patterns_select_as_roles_do() -> None:
    shapes = {f"model.layers.{i}.mlp.{n}_proj.weight": (2, 2) for i in range(12) for n in "ud"}
    shapes = {name.replace("d_proj", "down_proj"): shape for name, shape in shapes.items()}
    expected = [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 11)]
    assert plan.chosen(shapes, ("1.mlp_down", "11.mlp_down")) == expected
    assert plan.chosen(shapes, ("*.1.mlp.down_proj.weight", "*.11.*down*")) == expected


def test_flops_of_a_step(tmp_path: Path) -> None:
    config, estimate, topics = planned(tmp_path, "train.shuffle=false", "method.window=2")
    method = config.method
    model = EditableModel.load(tmp_path / "model", depth=method.depth, trainable=method.trainable)
    steps = len(topics[0].forget)
    prepared = method.setup(model, topics[0])
    with FlopCounterMode(display=False) as counter:
        for step, (forget, retain) in zip(range(steps), topics[0].pairs(), strict=False):
            terms = method.loss(model, prepared, forget, retain, step)
            sum(terms.losses.values()).backward()  # type: ignore[union-attr]
    # Attention scores are left out of the estimate; on texts this short they weigh little.
    assert estimate["flops_per_step"] == pytest.approx(counter.get_total_flops() / steps, rel=0.2)


@pytest.mark.parametrize(
    ("dtype", "options", "per_trained"),
    [
        (torch.float32, [], 3 * 4 + 0 + 8),
        (torch.bfloat16, [], 3 * 2 + 4 + 8),
        (torch.bfloat16, ["train.weights=bf16"], 3 * 2 + 0 + 4),
    ],
)
def test_memory_by_precision(
    dtype: Any, options: list[str], per_trained: int, tmp_path: Path
) -> None:
    _, estimate, _ = planned(tmp_path, *options, dtype=dtype)
    trained = estimate["trained_parameters"]
    weights = estimate["memory_bytes_without_activations"] - trained * per_trained
    assert weights == estimate["bytes_read"]


def test_time_grows_with_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "speed", lambda dtype, device: 1e6)
    _, few, _ = planned(tmp_path / "a", "train.max_steps=10")
    _, many, _ = planned(tmp_path / "b", "train.max_steps=30")
    assert many["seconds_at_least"] == pytest.approx(3 * few["seconds_at_least"], abs=0.2)
    assert few["seconds_at_least"] == pytest.approx(10 * few["flops_per_step"] / 1e6, abs=0.1)
