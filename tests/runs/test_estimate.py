"""The plan of a run against what the run then loads and computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from helpers.models import ARCHITECTURES, save_pico, texts, word_tokenizer, write_jsonl
from srmu.engine.activation_cache import Activations
from srmu.engine.loading import build_skeleton
from srmu.engine.model import EditableModel, Site
from srmu.errors import SrmuError
from srmu.runs import counting, run
from srmu.runs import estimate as plan
from srmu.runs.config import build_config, make_config


def planned(folder: Path, *options: str, name: str = "llama", dtype: Any = torch.float32) -> Any:
    save_pico(folder / "model", name, dtype)
    word_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "f.jsonl", texts(8, 1))
    write_jsonl(folder / "r.jsonl", texts(8, 2))
    given = ["method.layer=1", "method.window=1", *options]
    ready = run.plan_run(make_config(str(folder / "model"), folder / "f.jsonl", folder / "r.jsonl", "rmu", given))
    topics = run.load_topics(ready.config, word_tokenizer())
    return ready, plan.estimate_run(ready, topics), topics


SPEED = 1e9  # FLOPs a second


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No speed is measured but where a test is about that."""
    if "speed" not in request.node.name:
        monkeypatch.setattr(counting, "measure_speed", lambda *_: SPEED)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_read_is_what_the_cut_model_holds(name: str, tmp_path: Path) -> None:
    ready, estimate, _ = planned(tmp_path, name=name)
    method = ready.config.method
    model = EditableModel.load(tmp_path / "model", depth=method.depth, trainable=method.trainable)
    held = {n: p for n, p in model.module.named_parameters() if "lm_head" not in n}
    held = {n: p for n, p in held.items() if "embed_out" not in n}
    if name not in ("mixtral", "qwen3_moe"):  # which store the experts apart
        assert estimate["tensors_read"] == len(held)
    assert estimate["bytes_read"] == sum(p.numel() * 4 for p in held.values())
    assert estimate["trained_parameters"] == sum(p.numel() for p in model.trained.values())


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flops_are_those_of_the_real_step(name: str, tmp_path: Path) -> None:
    """Counted without memory behind the tensors, as many as where there is."""
    ready, estimate, topics = planned(tmp_path, "method.window=1", "method.layer=2", name=name)
    method = ready.config.method
    model = EditableModel.load(tmp_path / "model", depth=method.depth, trainable=method.trainable)
    model.activations = Activations(counting.EVERYTHING)
    (forget, *_), (retain, *_) = topics[0].forget, topics[0].retain
    prepared = method.setup(model, topics[0])

    def step() -> None:
        terms = method.loss(model, prepared, forget, retain, 1)
        torch.stack(list(terms.loss_values.values())).sum().backward()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    real = counter.get_total_flops()
    if name in ("mixtral", "qwen3_moe"):  # torch does not count the products of experts
        assert estimate["flops_per_step"] > real
    else:  # the plan takes the mean length of a batch
        assert estimate["flops_per_step"] == pytest.approx(real, rel=0.25)


def test_flops_of_a_linear_layer_and_of_experts() -> None:
    layer, x = torch.nn.Linear(6, 5, bias=False), torch.ones(4, 6)
    # forward, and the gradient of the weight
    assert counting.count_flops(lambda: layer(x).sum().backward()) == 2 * (2 * 4 * 6 * 5)
    assert counting.grouped_flops((8, 6), (3, 6, 5)) == 2 * 8 * 6 * 5


def test_activations_are_those_that_autograd_saves() -> None:
    """One layer of a bare model by hand: twice as many texts leave twice as much."""
    model = EditableModel(build_skeleton(llama(), torch.float32), ["1.mlp_down"], 2)
    sizes = []
    for rows in (2, 4):
        batches = [counting.blank_batch((rows, 8), model.device) for _ in range(2)]
        sizes.append(counting.count_step(model, batches, Site(1))[1])
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)
    # the input of the trained matrix and the activations of the loss, at the least
    assert sizes[0] > 2 * 2 * 8 * (48 + 32) * 4


def llama() -> Any:
    cls, sizes = ARCHITECTURES["llama"]
    return cls(**sizes)


@pytest.mark.parametrize(
    ("dtype", "options", "copies", "masters", "moments"),
    [(torch.float32, [], 4, 0, 8), (torch.bfloat16, [], 2, 4, 8), (torch.bfloat16, ["train.weights=bf16"], 2, 0, 4)],
)
def test_memory_by_precision(
    dtype: Any, options: list[str], copies: int, masters: int, moments: int, tmp_path: Path
) -> None:
    _, estimate, _ = planned(tmp_path, *options, dtype=dtype)
    trained, parts = estimate["trained_parameters"], estimate["memory"]
    assert parts["originals"] == parts["last_good"] == copies * trained
    assert (parts["masters"], parts["moments"]) == (masters * trained, moments * trained)
    assert parts["weights"] == estimate["bytes_read"]
    assert estimate["memory_mapped_from_the_file"]
    assert estimate["memory_private"] == sum(parts.values()) - parts["weights"]


def test_a_conversion_is_not_mapped(tmp_path: Path) -> None:
    _, estimate, _ = planned(tmp_path, "dtype=float32", dtype=torch.bfloat16)
    assert not estimate["memory_mapped_from_the_file"]
    # The head of the cut model is made, too, though a run does not read it.
    assert estimate["memory"]["weights"] == 2 * estimate["bytes_read"] + 4 * 64 * 32
    assert estimate["memory"]["masters"] == 0


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("srmu", {"prefix": 4, "2.resid_post": 2, "sums": 4}),
        ("rmu", {"prefix": 3, "2.resid_post": 1, "sums": 2}),  # no map: retain texts are not measured
    ],
)
def test_the_cache_is_as_large_as_planned(
    method: str, expected: dict[str, int], tmp_path: Path, monkeypatch: Any
) -> None:
    """Prefix and target of the batches that are used, but for the small sums."""
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))
    options = ["method.window=1", "method.layer=2", "train.max_steps=1", "train.batch_size=2"]
    options += ["method.map_batches=2", f"runs_dir={tmp_path / 'runs'}", f"method.name={method}"]
    ready, estimate, _ = planned(tmp_path, *options)
    run.unlearn_config(ready.config)
    (folder,) = (tmp_path / "cache" / "activations").iterdir()
    entries = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    names = [name.split("-")[0] for name in entries]
    assert {n: names.count(n) for n in names} == expected
    sums = expected["sums"] * 5 * 32 * 8
    held = sum(tensor.nbytes for entry in entries.values() for tensor in entry.values())
    assert held - sums == estimate["cache_bytes"]
    _, none, _ = planned(tmp_path / "b", *options, "cache=none")
    assert none["cache_bytes"] == 0 and none["flops"] > 0


def test_time_follows_from_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "measure_speed", lambda *_: SPEED)
    _, few, _ = planned(tmp_path / "a", "train.max_steps=10")
    _, many, _ = planned(tmp_path / "b", "train.max_steps=30")
    assert few["seconds_per_step"] == pytest.approx(few["flops_per_step"] / SPEED, abs=1e-4)
    extra = 20 * few["flops_per_step"] / SPEED
    assert many["seconds"] - few["seconds"] == pytest.approx(extra, abs=0.02)


def test_advice_where_it_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda device: 1000)
    ready, estimate, _ = planned(tmp_path)
    assert estimate["advice"].startswith("train.batch_size=2")
    _, one, _ = planned(tmp_path / "b", "train.batch_size=1", "method.layer=2", "method.window=2")
    assert one["advice"].startswith("method.window=1")
    *_, lines = plan.plan_dry_run(ready.config)
    assert lines[-1].startswith("this does not fit into memory; try train.batch_size=2")


@pytest.mark.parametrize("site", [Site(1), None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_speed_is_that_of_a_real_layer(name: str, site: Site | None) -> None:
    cls, sizes = ARCHITECTURES[name]
    shapes = [(2, 4), (2, 5)]
    speed = counting.measure_speed(cls(**sizes), torch.float32, "cpu", site, shapes)
    assert 1e4 < speed < 1e13


def test_the_speed_where_no_layer_can_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "cut_config", lambda *_: None)
    assert counting.measure_speed(llama(), torch.float32, "cpu", None, [(2, 4)]) > 1e4


@pytest.mark.parametrize("cls", [transformers.BloomConfig, transformers.OPTConfig])
def test_models_that_want_a_plain_mask(cls: Any, tmp_path: Path) -> None:
    config = cls(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    model = EditableModel(build_skeleton(config, torch.float32), ["1.mlp_down"], 2)
    try:
        whole = counting.takes_whole_masks(model, Site(1))
    except SrmuError as error:
        assert "cannot be counted without its weights" in str(error)
        return
    batches = [counting.blank_batch((2, n), model.device, whole) for n in (4, 5)]
    assert counting.count_step(model, batches, Site(1))[0] > 0


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("kept", ["none", "disk"])
@pytest.mark.parametrize(
    "options",
    [[], ["method.anchors=random"], ["method.target_mode=additive"], ["train.max_steps=1"], ["method.map_batches=1"]],
    ids=lambda o: "-".join(o) or "plain",
)
def test_flops_in_all_are_those_of_the_real_run(options: list[str], kept: str, tmp_path: Path) -> None:
    given = ["method.name=srmu", "method.layer=2", "train.max_steps=5", "train.batch_size=2"]
    given += [f"runs_dir={tmp_path / 'runs'}", f"cache={kept}", *options]
    ready, estimate, _ = planned(tmp_path, *given)
    with FlopCounterMode(display=False) as counter:
        run.unlearn_config(ready.config)
    # The few activations that are kept in any case save a little on texts as few as these.
    assert estimate["flops"] == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_a_precision_that_the_run_refuses(tmp_path: Path) -> None:
    with pytest.raises(SrmuError, match=r"train.weights=bf16 needs a bf16 model"):
        planned(tmp_path, "train.weights=bf16")


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_each_process_holds(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    ready, estimate, topics = planned(tmp_path, name=name)
    rows = plan.estimate_launches(ready, topics)
    assert all(row["fits"] for row in rows)
    first, *_, last = rows
    assert first["flops_per_rank_per_step"] <= last["flops_per_rank_per_step"] * 4
    assert last["sharded"] and last["parts"]["originals"] < first["parts"]["originals"]
    assert first["parts"]["originals"] == 4 * estimate["trained_parameters"]
    monkeypatch.setattr(plan, "free_bytes", lambda device: 1)
    assert not any(row["fits"] for row in plan.estimate_launches(ready, topics))


def test_one_gpu_of_any_kind_holds_one_process(tmp_path: Path, monkeypatch: Any) -> None:
    ready, _, topics = planned(tmp_path)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    ready = replace(ready, config=ready.config.model_copy(update={"device": "mps"}))
    assert {row["processes"] for row in plan.estimate_launches(ready, topics) if row["fits"]} == {1}


@pytest.mark.slow
def test_adapters_cannot_be_cut(tmp_path: Path) -> None:
    ready, _, topics = planned(tmp_path)
    tree = ready.config.to_dict() | {"method": {"name": "npo", "lora_rank": 2}}
    rows = plan.estimate_launches(run.plan_run(build_config(tree)), topics)
    assert {row["lora"] for row in rows} == {0, 2}
    assert not any(row["sharded"] and row["lora"] for row in rows)
    whole, adapted = rows[0]["parts"], rows[1]["parts"]
    assert adapted["moments"] < whole["moments"] / 2 and adapted["weights"] == whole["weights"]
