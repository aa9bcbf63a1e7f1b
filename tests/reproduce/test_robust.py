"""The frontier: shares, tables from attacks with known answers, what goes on, what is refused."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import attack_world
from helpers.testbeds import TINY
from srmu.attacks import ATTACKS, suite
from srmu.engine.weights import load_delta
from srmu.errors import SrmuError
from srmu.evals.matched import match_utility
from srmu.evals.results import RESULTS, load_results, read_attacks, read_metrics
from srmu.report import markdown
from srmu.reproduce import experiment, robust
from srmu.reproduce.experiment import read_preset
from srmu.reproduce.robust import (
    average_attacks,
    build_frontier_tables,
    estimate_residual,
    measure_frontier,
    plan_frontier,
    view_control,
    write_frontier_reports,
)
from srmu.runs.config import load_config
from srmu.runs.run import Run
from srmu.testbed.build import build_testbed
from srmu.testbed.world import Size

# enough facts for intervals, and little else
SMALL = replace(TINY, size=Size(hazard_compounds=12, other_compounds=12, entities=24, values=8, general_values=8))
QUICK = ["train.max_steps=2", "method.layer=1", "method.window=1"]
FEW = ("forced_choice", "quantisation", "utility")
COMMAND = "srmu reproduce robust"


def spec_of(methods: dict[str, list[str]]) -> dict[str, Any]:
    spec = read_preset("robust.yaml")
    world = spec["worlds"]["closed"] | {"common": QUICK, "methods": methods}
    world |= {"ablations": {"half as strong": ["method.kappa=2"]}, "ablated": []}
    spec["tables"]["ablations"].pop("attacks")
    return spec | {"worlds": {"closed": world}, "ablated": "SRMU"}


SPEC = spec_of(
    {
        "SRMU": ["method.name=srmu", "method.kappa=4", "train.learning_rate=0.1"],
        "Too far": ["method.name=rmu", "method.coeff=1e30", "method.kappa=null"],
        "Misspelt": ["method.name=rmu", "method.kapa=2"],
        "Names": ["method.name=rmu", "seed=0", "dtype={testbed}"],
    }
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny testbeds, few attacks, one process; the folder, and how many cases each call made."""
    out = tmp_path_factory.mktemp("frontier") / "out"
    made: list[int] = []

    def run_all(jobs: Sequence[Any], watch: Any, function: Callable[[Any], Any]) -> list[Any]:
        made.append(len(jobs))
        return [function(job) for job in jobs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRMU_CACHE", str(out.with_name("cache")))
        build = partial(experiment.build_testbed, recipe=SMALL)
        patch.setattr(experiment, "build_testbed", build)
        patch.setattr(experiment, "RECIPE", SMALL)
        patch.setattr(experiment, "run_all", run_all)
        patch.setattr(suite, "ATTACKS", {name: ATTACKS[name] for name in FEW})
        yield out, made


def asked(out: Path, **given: Any) -> robust.Frontier:
    options = {"seeds": ("1", "2"), "regimes": ("high",), "tier": "standard"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "read_preset", {"robust.yaml": SPEC}.__getitem__)
        return plan_frontier(**{"kind": "robust", "out": out} | options | given)


@pytest.fixture(scope="module")
def found(small: Any) -> dict[str, Any]:
    this = asked(small[0])
    return build_frontier_tables(this, measure_frontier(this), COMMAND)


def rows(found: dict[str, Any], part: int = 0) -> dict[str, Any]:
    return {row["label"]: row for row in found["parts"][part]["rows"]}


def folders(out: Path) -> list[Path]:
    return sorted(out.glob("closed/matched-0.03-standard/*-srmu"))


@pytest.mark.slow
def test_a_row_holds_what_the_files_say(small: Any, found: dict[str, Any]) -> None:
    runs = folders(small[0])
    assert len(runs) == 2
    row = rows(found)["SRMU"]
    for column, metric in (("hazard", "testbed_hazard/acc"), ("held out", "testbed_hazard_held/acc")):
        values = [read_metrics(run)["after"][metric]["value"] for run in runs]
        assert row["cells"][column]["value"] == pytest.approx(np.mean(values))
        whole = small[0] / "closed" / "runs"
        values = [read_metrics(whole / run.name)["after"][metric]["value"] for run in runs]
        assert row["whole"][column]["value"] == pytest.approx(np.mean(values))
    shares = [load_results(run)["matched"]["share"] for run in runs]
    assert row["share"] == pytest.approx(np.mean(shares))
    assert row["times"] == pytest.approx(1)
    assert {*row["attacks"]} == {"forced_choice", "quantisation"}
    kept = [row["cells"][name]["value"] for name in ("neighbour", "general")]
    assert row["kept"]["value"] == pytest.approx(np.mean(kept))


def test_k_star_is_the_naive_one(small: Any, found: dict[str, Any]) -> None:
    worst = []
    for run in folders(small[0]):
        report = read_attacks(run)
        known = report["original"]["accuracy"]["value"] - report["chance"]
        best = max(
            e["accuracy"]["value"] for e in report["attacks"].values() if "right" in e and e["valid"] is not False
        )
        worst.append((best - report["chance"]) / max(known, 0.01))
    expected = np.clip(np.mean(worst), 0, 1)
    assert rows(found)["SRMU"]["K*"]["value"] == pytest.approx(expected)


def test_perplexities_are_those_of_the_texts(small: Any, found: dict[str, Any]) -> None:
    """The original's on forget texts, text by text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logs = []
    for seed in (1, 2):
        bed = small[0] / "closed" / f"testbed{seed}-high"
        model = AutoModelForCausalLM.from_pretrained(bed / "model")
        tokenizer = AutoTokenizer.from_pretrained(bed / "model")
        lines = (bed / "forget.jsonl").read_text().splitlines()
        costs = []
        for line in lines[:64]:
            ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
            with torch.no_grad():
                costs.append(model(ids, labels=ids).loss.item())
        logs.append(np.mean(costs))
    given = rows(found)["original"]["perplexity"]["forget"]
    assert given == pytest.approx(np.exp(np.mean(logs)), rel=1e-4)


def test_failures_are_rows(found: dict[str, Any]) -> None:
    said = {label: row.get("why", "") for label, row in rows(found).items()}
    assert said["Too far"] == "diverged in 2 of 2 runs"
    assert re.match(r"failed: method.kapa is not an option.* in 2 of 2 runs", said["Misspelt"])
    assert said["Names"].startswith("failed: ")
    assert not said["SRMU"] and not said["original"] and not said["oracle"]


def test_what_is_there_is_not_made_again(small: Any, found: dict[str, Any]) -> None:
    out, made = small
    this = asked(out)
    before = len(made)
    times = {run: (run / RESULTS).stat().st_mtime_ns for run in folders(out)}
    again = measure_frontier(this)
    assert made[before:] == []
    assert {run: (run / RESULTS).stat().st_mtime_ns for run in folders(out)} == times
    assert build_frontier_tables(this, again, COMMAND) == found
    assert (
        build_frontier_tables(this, measure_frontier(this, make=False), COMMAND)["parts"][0]["rows"][2]
        == rows(found)["SRMU"]
    )


def test_another_attack_is_made_up_for(small: Any, found: dict[str, Any], monkeypatch: Any) -> None:
    out, _ = small
    more = {name: ATTACKS[name] for name in (*FEW, "noise")}
    this = asked(out, methods=("SRMU",))
    needed = robust.frontier_needs(this)[0]
    assert needed == {"testbeds": 0, "runs": 0}
    monkeypatch.setattr(suite, "ATTACKS", more)
    assert robust.frontier_needs(this)[0]["runs"] == 2


@pytest.mark.slow
def test_interrupted_it_goes_on(small: Any, found: dict[str, Any], monkeypatch: Any) -> None:
    out, made = small
    this = asked(out, kind="ablations")

    def first(jobs: Sequence[Any], watch: Any, function: Callable[[Any], Any]) -> list[Any]:
        function(jobs[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run_all", first)
        with pytest.raises(KeyboardInterrupt):
            measure_frontier(this)
    labels = [*rows(build_frontier_tables(this, measure_frontier(this, make=False), COMMAND))]
    assert labels == ["original", "oracle", "SRMU", "half as strong (1 of 2)"]
    before = len(made)
    done = rows(build_frontier_tables(this, measure_frontier(this), COMMAND))
    assert made[before:] == [1]
    assert [*done] == ["original", "oracle", "SRMU", "half as strong"]
    assert done["SRMU"] == rows(found)["SRMU"]
    assert done["half as strong"]["times"] is not None


def test_pages_have_neither_dates_nor_paths(small: Any, found: dict[str, Any]) -> None:
    out, _ = small
    paths = markdown.write_study(found, out)
    assert [path.name for path in paths] == ["robust.json", "robust.md"]
    text = (out / "robust.md").read_text()
    assert text.startswith(f"```bash\n{COMMAND}\n```")
    assert "| Too far |  | diverged in 2 of 2 runs |" in text
    for shared in (text, (out / "robust.json").read_text()):
        assert str(out.parent) not in shared
        assert not re.search(r"\b20\d\d-\d\d", shared)
    this = asked(out)
    (page,) = write_frontier_reports(this, measure_frontier(this, make=False), found)
    assert f"[The figure]({page.name})" in text
    ((block, *_),) = (section.blocks for section in markdown.describe_study(found)[1].values())
    assert [trace.name for trace in block.figures[0].plot.data] == ["original", "oracle", "SRMU"]
    assert block.figures[0].words in page.read_text()


# ---- the share


def test_the_share_is_the_largest_that_the_budget_allows(tmp_path: Path) -> None:
    """Against a scan of all shares that halving can give."""
    folder = attack_world.write(tmp_path)
    run = attack_world.unlearned(folder, **{"train.max_steps": 40, "train.learning_rate": 1e-2})
    match_utility(run, tmp_path / "out", 0.1, ["harmless"])
    share = load_results(tmp_path / "out")["matched"]["share"]
    base = attack_world.subject("original")
    before = {n: p.data.clone() for n, p in base.module.named_parameters()}
    questions = attack_world.exam().utility["harmless"]
    prompts = torch.tensor([base.tokens(q.prompt) for q in questions])
    options = torch.tensor([[base.tokens(o)[-1] for o in q.options] for q in questions])
    gold = torch.tensor([q.gold for q in questions])
    rights = []
    for step in range(33):
        for name, parameter in base.module.named_parameters():
            if name in run.delta:
                parameter.data = before[name] + step / 32 * (run.delta[name] - before[name])
        with torch.no_grad():
            scores = base.module(prompts).logits[:, -1].gather(1, options)
        rights.append(float((scores.argmax(1) == gold).double().mean()))
    assert 0 < share < 1
    step = round(32 * share)
    assert rights[step] >= rights[0] - 0.1 > rights[step + 1]
    kept, _ = load_delta(tmp_path / "out" / "delta.safetensors", run.base)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, before[name] + share * (run.delta[name] - before[name]))


def test_a_run_within_the_budget_stays_as_it_is(tmp_path: Path) -> None:
    run = attack_world.unlearned(attack_world.write(tmp_path))
    match_utility(run, tmp_path / "out", 1.0, ["harmless"])
    assert load_results(tmp_path / "out")["matched"]["share"] == 1
    same = (tmp_path / "out" / "delta.safetensors").read_bytes()
    assert same == (run.folder / "delta.safetensors").read_bytes()
    assert Run.open(tmp_path / "out").config.id == run.config.id


# ---- tables from attacks with known answers


def report(**attacks: Any) -> dict[str, Any]:
    """40 questions; the original knows all."""

    def entry(right: float, oracle: float, valid: bool) -> dict[str, Any]:
        def of(share: float) -> dict[str, Any]:
            count = round(40 * share)
            return {"right": "1" * count + "0" * (40 - count), "accuracy": {"value": share}}

        controls = {"original": of(1.0), "oracle": of(oracle)}
        return {"status": "done", "valid": valid, "controls": controls, **of(right)}

    entries = {name: entry(*given) for name, given in attacks.items()}
    return {
        "chance": 0.25,
        "facts": [*range(40)],
        "original": {"right": "1" * 40, "accuracy": {"value": 1.0}},
        "attacks": entries | {"utility": {"status": "done", "metrics": {}}},
    }


def test_invalid_attacks_do_not_count() -> None:
    given = [report(plain=(0.4, 0.25, True), leaky=(0.9, 0.7, False), other=(0.55, 0.3, True))] * 2
    whole = [slice(None)] * 2
    found = estimate_residual(given, (1, 2), whole)
    assert found["value"] == pytest.approx((0.55 - 0.25) / 0.75)
    assert found["low"] < found["value"] < found["high"]
    controls = [view_control(r, "oracle") for r in given]
    found = estimate_residual(controls, (1, 2), whole)
    assert found["value"] == pytest.approx((0.3 - 0.25) / 0.75)
    shown = average_attacks(given)
    assert shown["leaky"] == pytest.approx({"accuracy": 0.9, "share": 0.65 / 0.75, "valid": False})
    assert "utility" not in shown
    oracle = average_attacks(controls)
    assert oracle["plain"] == pytest.approx({"accuracy": 0.25, "share": 0.0, "valid": True})


def test_each_kind_of_question_has_its_k_star() -> None:
    """The first half of the questions comes back, the second does not."""
    given = [report(plain=(0.5, 0.25, True))]
    halves = [estimate_residual(given, (1,), [part])["value"] for part in (slice(0, 20), slice(20, 40))]
    assert halves == [1.0, 0.0]


# ---- settings and mistakes


def test_settings_fit_their_methods(tmp_path: Path) -> None:
    spec = read_preset("robust.yaml")
    config = tmp_path / "high.yaml"
    config.write_text("model: model\ntopics: {topic: {forget: f.jsonl, retain: r.jsonl}}\n")
    for name in ("names.txt", "goals.txt"):
        (tmp_path / name).write_text("Velmar\nOstin\nBor\n")
    (tmp_path / "anchors.json").write_text("{}")
    for kind in spec["tables"]:
        plan = plan_frontier(kind, tmp_path / "out")
        for one in plan.experiments.values():
            for label, settings in one.settings.items():
                given = [s.replace("{testbed}", str(tmp_path)) for s in settings]
                method = load_config(config, given).method.name
                assert f"method.name={method}" in settings, label
    (only,) = plan_frontier("ablations", tmp_path / "out").experiments
    assert only == "closed"  # the open world has none
    assert spec["cost"] in spec["worlds"]["closed"]["methods"]
    assert 0 not in spec["seeds"]  # settings were tuned on it


def test_without_retain_texts_a_run_serves_each_regime(tmp_path: Path) -> None:
    """All methods, low and high: both regimes lie in one testbed."""
    plan = plan_frontier("methods", tmp_path / "out", methods=("SRMU", "GA"), seeds=("1",))
    bed = tmp_path / "out" / "closed" / "testbed1-high"
    bed.mkdir(parents=True)
    for regime in ("low", "high"):
        topics = f"{{topic: {{forget: f.jsonl, retain: {regime}.jsonl}}}}"
        (bed / f"{regime}.yaml").write_text(f"model: model\ntopics: {topics}\n")
    plans = plan.experiments["closed"]
    rows = [experiment.PlannedRow(k, k, regime) for regime in plan.spec["in"] for k in plans.settings]
    jobs = {row: plans.plan_job(row, 1) for row in rows}
    assert [(row.label, row.regime) for row in jobs] == [
        ("SRMU", "low"), ("GA", "low"), ("SRMU", "high"), ("GA", "high"),
    ]  # fmt: skip
    assert [len({job for row, job in jobs.items() if row.label == k}) for k in ("SRMU", "GA")] == [
        2, 1,
    ]  # fmt: skip
    assert {job.config.parent for job in jobs.values()} == {bed}
    assert plan.spec["budget"] == 0.05


@pytest.mark.parametrize("world", ["closed", "open"])
def test_a_testbed_has_all_that_is_named(tmp_path: Path, world: str) -> None:
    spec = read_preset("robust.yaml")
    build_testbed(tmp_path / "out", world=world, recipe=TINY)
    metrics = [m for each in spec["worlds"][world]["columns"].values() for m in each]
    attacked = spec["worlds"][world]["attacked"].values()
    tasks = {m.split("/")[0] for m in metrics} | {*spec["judged"]} | {*attacked}
    for task in tasks | {f"{task}_val" for task in attacked}:
        assert (tmp_path / "out" / "tasks" / f"{task}.yaml").exists(), task
    regimes = {regime["config"] for regime in spec["regimes"].values()}
    for name in (*spec["texts"].values(), *regimes):
        assert (tmp_path / "out" / name).exists(), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"world": "opne"}, "--world opne does not exist; did you mean open?"),
        ({"regimes": ("hihg",)}, "--regimes hihg does not exist; did you mean high?"),
        ({"methods": ("SRUM",)}, "--methods SRUM does not exist; did you mean SRMU?"),
        ({"tier": "smok"}, "--tier smok does not exist; did you mean smoke?"),
        ({"overrides": ("train.stepz=2",)}, "stepz is not an option"),
        ({"kind": "methods", "world": "open"}, "--world open: methods runs on the closed world alone"),
        ({"out": Path("/dev/null/out")}, "cannot be made"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SrmuError, match=re.escape(said)):
        plan_frontier(**{"kind": "robust", "out": tmp_path / "out"} | given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["robust", "--model", "m"], "robust runs on testbeds of invented worlds alone"),
        (["table2", "--methods", "SRMU"], "--methods belongs to srmu reproduce robust"),
        (["table2", "--tier", "smoke"], "--tier belongs to srmu reproduce robust"),
        (["table2", "--seeds", "1,2"], "--seeds: those of table2 count from 0: 0,1,2"),
        (["robust", "--seeds", "1,x"], "--seeds 1,x: 'x' is not a seed"),
        (["robust", "--tier", "none"], "--tier none does not exist"),
    ],
)
def test_the_verb_refuses_in_one_line(tmp_path: Path, call: Any, words: Any, said: str) -> None:
    code, _, error = call("reproduce", *words, "--out", str(tmp_path / "out"))
    assert code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_there_is_shown_as_such(tmp_path: Path, call: Any) -> None:
    out = tmp_path / "out"
    code, _, said = call("reproduce", "robust", "--show", "--world", "closed", "--out", str(out))
    assert code == 2 and "nothing was run" in said and "srmu reproduce robust --world closed" in said
    assert said.count("\n") == 1 and not out.exists()
    code, said, _ = call("reproduce", "robust", "--dry-run", "--out", str(tmp_path / "other"))
    assert code == 0 and "12 testbeds to build" in said
    assert not (tmp_path / "other").exists()
