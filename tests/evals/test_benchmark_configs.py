"""The configs for the benchmarks: each parses, and its dry run needs no hub, weights or texts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from srmu.evals.benchmarks import BENCHMARKS
from srmu.runs import estimate
from srmu.runs.config import load_config
from srmu.runs.estimate import plan_dry_run

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [
    path.name for path in sorted(CONFIGS.glob("*.yaml")) if path.name.partition("-")[0] in {*BENCHMARKS} - {"wmdp"}
]

# A model of little more than its architecture.
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "dtype": "bfloat16",
}  # fmt: skip


def tree(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    return found


def test_every_benchmark_has_configs() -> None:
    found = {name.partition("-")[0] for name in NAMES}
    assert found == {"tofu", "muse", "rwku", "whp"}
    for benchmark in ("tofu", "muse", "rwku"):
        methods = {tree(name)["method"]["name"] for name in NAMES if name.startswith(benchmark)}
        assert {"srmu", "npo"} <= methods


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", NAMES)
def test_dry_run_needs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what several devices take is half of the work and test_scale's
    monkeypatch.setattr(estimate, "estimate_launches", lambda *args, **given: [])
    layers = 1 + tree(name)["method"].get("layer", 0)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"num_hidden_layers": layers}))
    config = load_config(CONFIGS / name, [f"model={tmp_path}"])
    planned, found, lines = plan_dry_run(config)
    given = tree(name)
    assert found["steps"] == given["train"]["max_steps"]
    assert planned.train.learning_rate == given["train"]["learning_rate"]
    assert {key: getattr(planned.method, key) for key in given["method"]} == given["method"]
    assert any("no weights are here" in line for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


@pytest.mark.parametrize(("method", "epochs"), [("graddiff", 5), ("npo", 10), ("simnpo", 10)])
def test_steps_are_the_epochs_of_tofus_code(method: str, epochs: int) -> None:
    """forget10 has 400 questions; the code rounds down over all epochs together."""
    given = tree(f"tofu-{method}.yaml")["train"]
    assert given["max_steps"] == epochs * 400 // given["batch_size"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_of_the_benchmark(name: str) -> None:
    """The model and both sets are of the hub, or files outside of the package."""
    config = load_config(CONFIGS / name)
    hubs = {"tofu": "locuslab/TOFU", "muse": "muse-bench/MUSE-", "rwku": "jinzhuoran/RWKU"}
    benchmark = name.partition("-")[0]
    (topic,) = config.topics.values()
    for source in (*topic.forget, *topic.retain):
        if source.dataset == "wikitext":
            continue
        if source.dataset:
            assert source.dataset.startswith(hubs[benchmark])
            # the kind of text that the suite of that name is asked about
            assert (source.revision or BENCHMARKS[benchmark].revision) == BENCHMARKS[benchmark].revision
        else:
            assert Path(str(source.path)).is_absolute()
            assert not Path(str(source.path)).resolve().is_relative_to(CONFIGS)
    assert not Path(config.model).is_absolute()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tofu-graddiff.yaml", ["method.name=ga"]),
        ("tofu-graddiff.yaml", ["method.retain=kl"]),
        ("tofu-npo.yaml", ["method.retain=none"]),
        ("tofu-simnpo.yaml", ["method.beta=2.5", "method.weight=0.1375"]),
        ("tofu-srmu.yaml", ["method.name=rmu"]),
        ("muse-news-npo.yaml", ["method.name=ga"]),
        ("muse-news-npo.yaml", ["method.name=graddiff"]),
        ("muse-news-npo.yaml", ["topics.news.forget.name=scal", "topics.news.forget.split=forget_2"]),
        ("muse-books-npo.yaml", ["method.name=simnpo", "method.beta=0.7", "method.retain=nll", "method.alpha=0.1"]),
        ("rwku-npo.yaml", ["method.name=ga", "train.learning_rate=6.0e-8", "train.batch_size=8"]),
        ("rwku-npo.yaml", ["topics.person.forget.where.subject=Confucius"]),
        ("rwku-srmu.yaml", ["topics.person.forget.where.subject=Confucius"]),
        ("rwku-srmu.yaml", ["topics.person.forget.where={}"]),
        ("whp-template.yaml", ["method.name=srmu", "method.kappa=8", "topics.text.retain=../whp/retain.txt"]),
    ],
)
def test_what_comments_say_to_type_is_taken(name: str, overrides: list[str]) -> None:
    config = load_config(CONFIGS / name, overrides)
    text = " ".join((CONFIGS / name).read_text().replace("\n#", " ").split())
    assert all(override in text for override in overrides)
    assert config.id != load_config(CONFIGS / name).id


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("whp")])
def test_texts_are_what_the_authors_train_on(name: str) -> None:
    """Answers after their questions, pieces of all texts, and the texts about one person."""
    (topic,) = load_config(CONFIGS / name).topics.values()
    own = [s for s in (*topic.forget, *topic.retain) if s.dataset != "wikitext"]
    for source in own:
        if name.startswith("tofu"):
            words = str(source.template).format(question="Who?", answer="Ann.")
            assert words.removesuffix("</s>") == "[INST] Who? [/INST]Ann."
        elif name.startswith("muse"):
            assert source.wrap and source.column == "text"
        else:
            assert source.where == {"subject": "Stephen King"}
    if name.startswith("tofu"):
        assert len({source.template for source in own}) == 1


def test_presets_have_the_defaults_of_their_authors_trainer() -> None:
    """transformers' Trainer clips at 1 where nothing is said; DeepSpeed, with a file of its own, does not."""
    for name in NAMES:
        train = load_config(CONFIGS / name).train
        if tree(name)["method"]["name"] in ("npo", "graddiff", "simnpo"):
            assert train.max_grad_norm == (None if name.startswith("tofu") else 1.0), name
            assert train.weight_decay == (0.01 if name.startswith("tofu") else 0), name
            assert train.adam_epsilon == 1e-8 and train.adam_epsilon_form == "torch", name
    assert load_config(CONFIGS / "rwku-npo.yaml").train.schedule == "cosine"
    muse = [load_config(CONFIGS / f"muse-{part}-npo.yaml").train for part in ("news", "books")]
    assert [(train.batch_size, train.weights, train.schedule) for train in muse] == [(4, "bf16", "constant")] * 2


def test_presets_of_wmdp_differ_in_their_methods_alone() -> None:
    """A comparison of methods whose optimisers differ says nothing about the methods."""
    paths = [*sorted(CONFIGS.glob("wmdp-zephyr*.yaml")), CONFIGS / "srmu-paper.yaml"]
    assert len(paths) == 5
    configs = [load_config(path) for path in paths]
    first = replace(configs[0].train, max_steps=150)  # Adaptive RMU's authors take 500
    assert (first.adam_epsilon, first.adam_epsilon_form, first.weights) == (1e-6, "transformers", "bf16")
    assert all(replace(config.train, max_steps=150) == first for config in configs)
    assert {config.dtype for config in configs} == {"bfloat16"}
