"""A run's folder, when it is made again and when not, and its scores."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import pico_module, save_pico, texts, word_tokenizer, write_jsonl
from helpers.testbeds import QUIZ
from srmu.engine.loading import load_module
from srmu.engine.weights import apply_delta
from srmu.errors import DivergedError, SrmuError
from srmu.evals.lm_eval import evaluate
from srmu.evals.results import plain_metrics, read_metrics
from srmu.evals.score import score_model
from srmu.runs import run as runs
from srmu.runs.config import Config, build_config, make_config
from srmu.runs.quantise import export_quantised
from srmu.runs.run import Run, unlearn_config
from srmu.runs.verify import verify_folder

QUICK = ["method.layer=2", "train.max_steps=3", "train.learning_rate=0.01"]
WIDTH = 32

BREAKS = """
from dataclasses import dataclass
from typing import ClassVar
from srmu.methods import RMU


@dataclass(frozen=True, kw_only=True)
class Breaks(RMU):
    "RMU whose loss is infinite from one step on."

    name: ClassVar[str] = "breaks"
    at: int = 99

    def loss(self, model, state, forget, retain, step):
        terms = super().loss(model, state, forget, retain, step)
        if step >= self.at:
            terms.losses["forget"] = terms.losses["forget"] * float("inf")
        return terms
"""


def config(folder: Path, *overrides: str, method: str = "srmu", runs_dir: str = "runs") -> Config:
    sources = [folder / "forget.jsonl", folder / "retain.jsonl"]
    quick = [*QUICK, f"runs_dir={folder / runs_dir}", *overrides]
    return make_config(str(folder / "model"), *sources, method, quick)


def two_topics(folder: Path, **values: Any) -> Config:
    sources = {role: str(folder / f"{role}.jsonl") for role in ("forget", "retain")}
    other = {"forget": sources["retain"], "retain": sources["forget"], "kappa": 2, "max_length": 6}
    tree = {
        "model": str(folder / "model"),
        "method": {"name": "srmu", "alpha": 5},
        "topics": {"bio": sources, "cyber": other},
        "runs_dir": str(folder / "runs"),
    }
    return build_config(tree | values, QUICK)


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the folder


def test_what_a_run_writes(workplace: Path) -> None:
    run = unlearn_config(config(workplace))
    assert {p.name for p in run.folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "delta.safetensors", "state.safetensors", "record.json"
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{8}-srmu", run.folder.name)

    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert set(lines[0]) == {
        "step", "topic", "loss", "forget", "retain", "target_ratio", "forget_cos", "retain_cos",
        "grad_norm", "seconds",
    }  # fmt: skip
    assert lines[0]["retain"] == 0
    assert lines[0]["target_ratio"] == pytest.approx(8)

    state = load_file(run.folder / "state.safetensors")
    names = {"topic.direction", "topic.importance", "topic.target"}
    assert set(state) == names
    assert {(t.dtype, tuple(t.shape)) for t in state.values()} == {(torch.float32, (WIDTH,))}
    numbers = run.record["topics"]["topic"]
    rebuilt = numbers["coeff"] * state["topic.direction"] * state["topic.importance"]
    torch.testing.assert_close(state["topic.target"], rebuilt)

    assert set(run.delta) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    assert run.record["changed"] == sorted(run.delta)
    assert set(run.record) >= {
        "id", "method", "paper", "model", "started", "seconds", "steps", "stop_reason", "diverged",
        "memory", "topics", "data", "changed", "environment",
    }  # fmt: skip
    assert (run.record["steps"], run.record["stop_reason"]) == (3, "max_steps")
    assert run.record["diverged"] is False
    assert 0 < run.record["memory"]["before"] <= run.record["memory"]["peak"]
    assert run.record["id"] == run.folder.name[:8] == run.config.id
    assert run.config.method.kappa == 8  # what the model and the defaults filled in
    assert run.record["data"]["topic"]["forget"]["documents"] == 10
    everything = "".join(p.read_text(errors="ignore") for p in run.folder.iterdir())
    assert texts(1, 1, range(30))[0] not in everything  # no forget text leaks


def test_two_topics_alternate(workplace: Path) -> None:
    run = unlearn_config(two_topics(workplace))
    assert [line["topic"] for line in metrics(run)] == ["bio", "cyber", "bio"]
    state = load_file(run.folder / "state.safetensors")
    assert {name.split(".")[0] for name in state} == {"bio", "cyber"}
    assert not torch.equal(state["bio.direction"], state["cyber.direction"])
    assert run.record["topics"]["cyber"]["kappa"] == pytest.approx(2)
    assert run.record["topics"]["bio"]["kappa"] == pytest.approx(8)
    assert set(run.record["data"]) == {"bio", "cyber"}
    notes = "\n".join(runs.run_notes(run))
    assert "bio: coeff " in notes and "cyber: importance map mean" in notes


@pytest.mark.slow
def test_a_flat_map_is_said_to_be_flat(workplace: Path) -> None:
    run = unlearn_config(config(workplace, "method.clip_quantile=0.001"))
    assert any(
        "topic: the map is nearly flat (sd under 0.1): it hardly tells features apart" in n for n in runs.run_notes(run)
    )
    chosen = unlearn_config(config(workplace, "method.importance=uniform"))  # flat on purpose
    assert not any("flat" in note for note in runs.run_notes(chosen))


# --- again


def test_the_same_config_is_not_run_twice(workplace: Path) -> None:
    first = unlearn_config(config(workplace))
    times = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    again = unlearn_config(config(workplace), out=str(workplace / "out"))
    assert again.folder == first.folder
    assert {p: p.stat().st_mtime_ns for p in first.folder.iterdir()} == times
    assert (workplace / "out" / "config.json").exists()
    assert unlearn_config(first.config).folder == first.folder  # its own config.yaml means the same run


def test_the_same_config_takes_over_what_does_not_decide_it(workplace: Path) -> None:
    first = unlearn_config(config(workplace, "purpose.reason=why"))
    given = ["eval=[quiz]", f"tasks_dir={workplace / 'a #[1]'}", "purpose.ticket=T-1"]
    for overrides in (given, []):  # what is left open stays
        run = unlearn_config(config(workplace, *overrides))
        assert run.folder == first.folder and run.config.eval == ["quiz"]
        assert run.config.tasks_dir == str(workplace / "a #[1]")
        assert (run.record["purpose"]["reason"], run.record["purpose"]["ticket"]) == ("why", "T-1")
        assert build_config(run.record["reproduction"]["config"]) == run.config
        verify_folder(run.folder)


def test_other_texts_under_the_same_config_are_refused(workplace: Path) -> None:
    run = unlearn_config(config(workplace))
    write_jsonl(workplace / "retain.jsonl", texts(7, 3, range(20, 60)))
    with pytest.raises(SrmuError, match=rf"{run.folder.name} holds a run .* on other texts"):
        unlearn_config(config(workplace))


def test_texts_that_another_cache_folder_tells_of(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its key it cannot be told whether they are the same, and is not said to be."""
    run = unlearn_config(config(workplace))
    monkeypatch.setenv("SRMU_CACHE", str(workplace / "other"))
    says = rf"{run.folder.name} holds a run .* with another cache folder: set SRMU_CACHE to it"
    with pytest.raises(SrmuError, match=says):
        unlearn_config(config(workplace))
    monkeypatch.setenv("SRMU_CACHE", str(workplace / "cache"))
    assert unlearn_config(config(workplace)).folder == run.folder


@pytest.mark.slow
def test_a_killed_run_is_made_again(workplace: Path) -> None:
    run = unlearn_config(config(workplace))
    delta = run.delta
    (run.folder / "record.json").unlink()
    with pytest.raises(SrmuError, match="not a finished run"):
        Run.open(run.folder)
    assert same(unlearn_config(config(workplace)).delta, delta)
    assert len(metrics(run)) == 3


@pytest.mark.slow
def test_the_same_seed_gives_the_same_delta(workplace: Path) -> None:
    first = unlearn_config(config(workplace))
    torch.manual_seed(7)  # no global state
    second = unlearn_config(config(workplace, runs_dir="other"))
    assert first.folder != second.folder
    assert first.folder.name == second.folder.name
    assert same(first.delta, second.delta)
    assert not same(first.delta, unlearn_config(config(workplace, "seed=1")).delta)


# --- a run that fails


def breaks(folder: Path, at: int, steps: int = 6) -> Config:
    (folder / "breaks.py").write_text(BREAKS)
    method = f"{folder / 'breaks.py'}:Breaks"
    return config(folder, f"method.at={at}", f"train.max_steps={steps}", method=method)


@pytest.mark.slow
def test_a_run_that_diverges_keeps_the_last_good_state(workplace: Path) -> None:
    # After step 2 the weights have a step that no finite loss confirmed: those of step 1 are kept.
    good = unlearn_config(breaks(workplace, 99, steps=2)).delta
    wrong = breaks(workplace, 3)
    message = "the loss is not finite at step 3, topic topic, batch 3"
    with pytest.raises(DivergedError, match=message):
        unlearn_config(wrong, out=workplace / "out")
    run = Run.open(runs.plan_run(wrong).folder)
    assert run.record["stop_reason"].startswith(message)
    assert run.record["diverged"] is True
    assert run.record["steps"] == len(metrics(run)) == 3
    assert same(run.delta, good)
    with pytest.raises(SrmuError, match=r"diverged: the loss is not finite.*last_good exports"):
        run.export(workplace / "out")
    with pytest.raises(DivergedError, match="holds this run, which diverged"):
        unlearn_config(wrong)
    assert not (workplace / "out").exists()
    run.export(workplace / "out", last_good=True)
    with pytest.raises(SrmuError, match="last_good exports"):
        export_quantised(run, workplace / "rounded", "fp8")
    export_quantised(run, workplace / "rounded", "fp8", last_good=True)
    module = load_module(workplace / "out")
    for name, tensor in good.items():
        assert torch.equal(dict(module.named_parameters())[name], tensor)


def test_a_run_that_diverges_at_once_changes_nothing(workplace: Path) -> None:
    wrong = breaks(workplace, 0)
    with pytest.raises(DivergedError, match="step 0, topic topic, batch 0"):
        unlearn_config(wrong)
    run = Run.open(runs.plan_run(wrong).folder)
    assert (run.delta, run.record["changed"], run.record["steps"]) == ({}, [], 0)


def test_a_run_that_changes_nothing_leaves_nothing(workplace: Path) -> None:
    with pytest.raises(SrmuError, match=r"the model did not change in 3 steps \(max_steps\); raise"):
        unlearn_config(config(workplace, "train.learning_rate=1e-30"))
    assert not (workplace / "runs").exists()


def test_an_interrupted_run_leaves_nothing_of_its_own(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    wanted = config(workplace)
    folder = runs.plan_run(wanted).folder
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr("srmu.engine.weights.save_delta", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unlearn_config(wanted)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


# --- the tokenizer


@pytest.mark.slow
def test_a_tokenizer_of_another_model_is_refused(workplace: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(workplace / "model")
    assert unlearn_config(config(workplace)).folder.exists()  # it does not occur
    write_jsonl(workplace / "forget.jsonl", ["w1 w99 w2"])
    with pytest.raises(SrmuError, match="gives token 64, but the model knows 64 tokens"):
        unlearn_config(config(workplace, "seed=1"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_folder_without_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", name)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(SrmuError, match=r"tokenizer"):  # transformers may make an empty one
        runs.load_tokenizer(folder)


# --- scores


@pytest.fixture
def quiz(workplace: Path) -> Path:
    """The tasks folder beside the model, with a task of 20 questions."""
    folder = workplace / "tasks"
    folder.mkdir()
    (folder / "quiz.yaml").write_text(QUIZ)
    rows = [
        {"question": text, "options": ["w1", "w2", "w3", "w4"], "answer": i % 4} for i, text in enumerate(texts(20, 5))
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scores_of_a_run(workplace: Path, quiz: Path) -> None:
    # A change large enough to show, and the run's own task.
    overrides = ("eval=[quiz]", "train.max_steps=20", "train.learning_rate=0.1")
    run = unlearn_config(config(workplace, *overrides))
    scores = score_model(run)
    assert set(scores) == {"before", "after"}
    module = load_module(run.base).eval()
    tokenizer = runs.load_tokenizer(run.base)
    direct = plain_metrics(evaluate(module, tokenizer, ["quiz"], tasks_dir=quiz))
    repeated = {when: {k: one for k, one in of_it.items() if "repetition" in k} for when, of_it in scores.items()}
    assert scores["before"] == direct | repeated["before"]
    apply_delta(module, *run.changes)
    again = evaluate(module, tokenizer, ["quiz"], tasks_dir=quiz)
    assert scores["after"] == plain_metrics(again) | repeated["after"]
    assert scores["after"] != scores["before"]
    told = Run.open(run.folder).record["results"]
    assert told == scores
    assert told["after"]["quiz/acc"]["version"] == 1.0
    assert direct["quiz/acc"]["n"] == 20
    kept = read_metrics(run.folder)
    assert {when: plain_metrics(of_it) for when, of_it in kept.items()} == scores
    assert kept["after"]["quiz/acc"]["answers"] == again["quiz/acc"]["answers"]
    # A model, the run by its path, and what was exported score the same.
    assert score_model(workplace / "model", ["quiz"]) == {"after": direct}
    assert score_model(str(run.folder)) == scores
    Run.open(str(run.folder)).export(str(workplace / "out"))
    assert score_model(workplace / "out", ["quiz"], tasks_dir=str(quiz))["after"] == plain_metrics(again)
    prompt = told["after"]["quiz/acc"]["prompt"]
    path = quiz / "quiz.yaml"
    path.write_text(path.read_text().replace("{{question}}", "{{question}}?"))
    asked = evaluate(module, tokenizer, ["quiz"], tasks_dir=quiz)["quiz/acc"]
    assert asked["prompt"] != prompt


def test_scores_need_no_cache_folder(
    workplace: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unlearn_config(config(workplace, "eval=[quiz]"))
    scores = score_model(run)
    (workplace / "file").touch()
    monkeypatch.setenv("SRMU_CACHE", str(workplace / "file" / "cache"))
    capsys.readouterr()
    assert score_model(run.folder) == scores
    assert capsys.readouterr().err.count("results are not kept in") == 1


@pytest.mark.parametrize("spoilt", ["disk", "lock"])
def test_scores_outlive_a_folder_that_cannot_be_written(
    spoilt: str, workplace: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    run = unlearn_config(config(workplace, "eval=[quiz]"))
    monkeypatch.setattr("srmu.evals.results.write_json", refuse)
    if spoilt == "lock":
        (run.folder / ".results.lock").mkdir()
    assert score_model(run)["after"]["quiz/acc"]["n"] > 0
    assert f"results were not saved in {run.folder}: No space left" in capsys.readouterr().err


def test_a_record_that_was_edited_is_found_before_the_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = unlearn_config(config(workplace))
    path = run.folder / "record.json"
    path.write_text(path.read_text().replace('"steps": 3', '"steps": 4'))
    monkeypatch.setattr("srmu.evals.score.evaluate", lambda *a, **b: pytest.fail("it was measured first"))
    with pytest.raises(SrmuError, match="was edited after it was written"):
        score_model(run.folder, ["quiz"])


def test_a_base_that_changed_is_refused(workplace: Path) -> None:
    """Its bytes would go into the export beside tensors made for other ones."""
    run = unlearn_config(config(workplace))
    Run.open(run.folder).export(workplace / "before")
    pico_module(seed=1).save_pretrained(workplace / "model", max_shard_size="40KB")
    uses: list[Callable[[], Any]] = [
        lambda: Run.open(run.folder).export(workplace / "out"),
        lambda: score_model(run.folder),
        lambda: unlearn_config(config(workplace)),
    ]
    for use in uses:
        with pytest.raises(SrmuError, match=r"is not the file that .* was made from"):
            use()
    assert not (workplace / "out").exists()
