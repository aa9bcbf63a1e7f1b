"""The paper's tables again: tiny testbeds, claims with known answers, what Zephyr would need."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import attack_world
from helpers.models import save_pico
from helpers.results import write_metrics
from helpers.testbeds import TINY
from srmu.engine.files import write_json
from srmu.engine.progress import ignore_progress
from srmu.engine.weights import fingerprint_model
from srmu.errors import SrmuError
from srmu.evals.results import load_results, read_metrics
from srmu.evals.statistics import Estimate, parse_answers
from srmu.report import markdown
from srmu.reproduce import claims, curves, experiment, paper
from srmu.reproduce.claims import judge_curves, judge_row
from srmu.reproduce.experiment import MeasuredRow, OneModel, PlannedRow, find_preset, read_preset
from srmu.reproduce.paper import add_mean, join_rows, paper_needs, plan_paper, plan_rows, read_paper, reproduce_paper
from srmu.runs.config import load_config
from srmu.runs.run import Run
from srmu.testbed.build import fill_template

ZEPHYR = "HuggingFaceH4/zephyr-7b-beta"
QUICK = ["train.max_steps=2", "method.layer=1", "method.window=1", "method.alpha=10"]


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small reproduction made twice: what it found, its folder, and how many runs each made."""
    out = tmp_path_factory.mktemp("reproduction") / "out"
    methods = {
        "SRMU": ["method.name=srmu", "method.kappa=4"],
        "RMU": ["method.name=rmu", "method.kappa=2"],
        "Another": ["method.name=adaptive_rmu", "method.kappa=1"],
    }
    spec = read_preset("reproduce.yaml")
    figure = spec["figures"]["figure2"]
    figure |= {"coeffs": [1, 1.0e30], "compared": {"general": [5]}}
    for label in ("difference", "product", "Adaptive RMU"):
        del figure["series"][label]
    del spec["tables"]["table3"]
    for name in ("table4", "table4-matched"):
        changes = spec["tables"][name]["changes"]
        kept = ("zero target", "no I_norm", "RMU", "full SRMU")
        spec["tables"][name]["changes"] = {label: changes[label] for label in kept}
    presets = {"reproduce.yaml": spec, spec["testbed"]["methods"]: {"common": QUICK, "methods": methods}}
    made = []

    def run_all(jobs: Sequence[Any], watch: Any, function: Callable[[Any], Any]) -> list[Any]:
        made.append(len(jobs))
        return [function(job) for job in jobs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRMU_CACHE", str(out.with_name("cache")))
        build = partial(experiment.build_testbed, recipe=TINY)
        patch.setattr(experiment, "build_testbed", build)
        patch.setattr(experiment, "RECIPE", TINY)
        patch.setattr(experiment, "run_all", run_all)
        patch.setattr(experiment, "read_preset", presets.__getitem__)
        plan = plan_paper(out, seeds=2)
        found = reproduce_paper("all", plan, command="srmu reproduce all")
        first, made = made, []
        assert reproduce_paper("all", plan, command="srmu reproduce all") == found
        more = reproduce_paper("all", plan_paper(out, seeds=3), command="srmu reproduce all", make=False)
        assert (
            table(more, "table2")["rows"]["RMU"] == table(found, "table2")["rows"]["RMU"]
        )  # of the seeds that were run
    markdown.write_study(found, out)
    return found, out, first, made


def table(found: Any, name: str) -> dict[str, Any]:
    one = next(one for one in found["tables"] if one["name"] == name)
    return one | {"rows": {row["label"]: row for row in one["rows"]}}


def records(out: Path, **wanted: Any) -> list[dict[str, Any]]:
    """The records of the runs whose method has these options."""
    runs = [Run.open(path.parent) for path in out.glob("runs/*/record.json")]
    options = [{"name": run.config.method.name, **vars(run.config.method)} for run in runs]
    return [
        run.record | {"seed": run.config.seed}
        for run, given in zip(runs, options, strict=True)
        if wanted.items() <= given.items()
    ]


@pytest.mark.slow
def test_tables_stand_beside_the_papers(again: Any) -> None:
    found, out, _, _ = again
    low = table(found, "table2")
    assert [*low["rows"]][:1] == ["before"]
    assert {"RMU", "SRMU", "Another"} < {*low["rows"]}
    assert low["rows"]["LLMU"]["why"] == "not run"
    assert low["rows"]["SRMU"]["paper"]["WMDP"] == pytest.approx((0.285 + 0.258) / 2)
    assert not low["rows"]["Another"]["paper"]
    runs = [
        run for run in map(Run.open, out.glob("runs/*"))
        if run.config.method.name == "rmu" and run.config.method.kappa == 2
        and "low" in str(run.config.topics["topic"].retain[0].path)
    ]  # fmt: skip
    values = [read_metrics(run.folder)["after"]["testbed_hazard/acc"]["value"] for run in runs]
    assert len(values) == 2
    cell = low["rows"]["RMU"]["cells"]["hazard"]
    assert cell["value"] == pytest.approx(np.mean(values))
    assert cell["low"] < cell["value"] < cell["high"]
    assert low["rows"]["RMU"]["kappa"] == pytest.approx(2, rel=1e-5)
    assert {c["verdict"] for c in low["claims"] if "LLMU" in c["claim"]} == {"not tested"}


def test_answers_are_those_of_the_scores(again: Any) -> None:
    _, out, _, _ = again
    rows = [row for path in out.glob("runs/*") for row in load_results(path)["rows"]]
    rows = [row for row in rows if row["task"] != "repetition"]  # of no question
    assert rows
    for row in rows:
        assert parse_answers(row["answers"]).mean() == pytest.approx(row["value"]), row


def test_ablations_share_a_coefficient_then_a_norm(again: Any) -> None:
    found, out, _, _ = again
    full = {
        record["seed"]: record["topics"]["topic"]
        for record in records(out, name="srmu", kappa=4.0, importance="ratio", direction="signs")
    }
    literal, matched = table(found, "table4"), table(found, "table4-matched")
    uniform = records(out, name="srmu", importance="uniform")
    for record in uniform:
        numbers = record["topics"]["topic"]
        same = [numbers[key] == pytest.approx(full[record["seed"]][key], rel=1e-4) for key in ("coeff", "kappa")]
        assert sum(same) == 1  # the one or the other, as the maps differ in norm
    assert len(uniform) == 4
    assert literal["rows"]["no I_norm"]["kappa"] > matched["rows"]["no I_norm"]["kappa"] + 0.1
    for label, row in matched["rows"].items():
        if row["cells"] and label not in ("before", "zero target"):
            assert row["kappa"] == pytest.approx(4, rel=1e-4), label
    assert matched["rows"]["zero target"]["kappa"] == 0
    assert literal["rows"]["RMU"]["kappa"] == pytest.approx(2, rel=1e-4)  # its own


def test_diverged_points_are_marked(again: Any) -> None:
    found, _, _, _ = again
    (figure,) = found["figures"]
    for series in figure["series"]:
        small, large = series["points"]
        assert small["x"]["low"] <= small["x"]["value"] <= small["x"]["high"]
        assert large["x"] is None
        assert large["why"] == "diverged in 2 of 2 runs"
    assert {c["verdict"] for c in figure["claims"]} == {"not tested"}
    (drawn,) = markdown.reproduction_sections(found)["figure2"].blocks[0].figures
    assert [len(trace.x) for trace in drawn.plot.data] == [1, 1]  # a point of each series


def test_a_second_call_makes_no_run(again: Any) -> None:
    _, _, first, second = again
    assert sum(first) == 24
    assert second == []


def test_what_is_written_has_neither_dates_nor_paths(again: Any) -> None:
    found, out, _, _ = again
    text = (out / "reproduce.md").read_text()
    assert text.startswith("```bash\nsrmu reproduce all\n```")
    assert "mean over 2 testbeds" in text
    assert "| before |" in text and "[The figure](report.html)" in text
    for shared in (text, (out / "reproduce.json").read_text()):
        assert str(out.parent) not in shared
        assert not re.search(r"\b20\d\d-\d\d", shared)
    assert json.loads((out / "reproduce.json").read_text()) == json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("low", "high", "above", "below", "said"),
    [
        (0.01, 0.1, 0, np.inf, "holds"),
        (-0.1, -0.01, 0, np.inf, "does not hold"),
        (-0.1, 0.1, 0, np.inf, "within noise"),
        (0.0, 0.0, 0, np.inf, "within noise"),
        (-0.3, -0.25, -np.inf, -0.2, "holds"),
        (-0.04, 0.04, -0.05, 0.05, "holds"),
        (0.06, 0.09, -0.05, 0.05, "does not hold"),
        (0.04, 0.09, -0.05, 0.05, "within noise"),
    ],
)
def test_verdicts(low: float, high: float, above: float, below: float, said: str) -> None:
    found = Estimate((low + high) / 2, low, high, 100)
    assert claims.judge_interval(found, above, below) == said
    assert claims.judge_interval(None, above, below) == "not tested"


def line(folder: Path, label: str, right: Sequence[Any], **tasks: Sequence[Any]) -> MeasuredRow:
    """Runs of which each answered so: arrays (seeds, questions) of the task `t` and of others."""
    runs = []
    given = {"t": right, **tasks}
    for seed in range(len(right)):
        run = folder / f"{label}{seed}"
        run.mkdir(parents=True, exist_ok=True)
        both = {task: np.asarray(rows[seed]).astype(float) for task, rows in given.items()}
        scores = {
            f"{task}/acc": {"value": row.mean(), "n": len(row), "answers": row.tolist()} for task, row in both.items()
        }
        write_metrics(run, before=scores, after=scores)
        runs.append(run)
    return MeasuredRow(label, tuple(runs), tuple(range(len(right))))


CLAIM = {"claim": "A is above B", "of": ["A", "B"], "metric": "utility", "above": 0}
COLUMNS = {"utility": "t", "columns": {"t": ["t/acc"]}}


def judged(one: MeasuredRow, other: MeasuredRow) -> dict[str, Any]:
    return judge_row(CLAIM, {"A": one, "B": other}, COLUMNS, {})


def test_a_difference_is_covered_and_paired(tmp_path: Path) -> None:
    """Rows that differ by 0.1 on questions that are easy or hard for both."""
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(30):
        luck = rng.random((3, 100))
        found = judged(line(tmp_path, "A", luck < 0.6), line(tmp_path, "B", luck < 0.5))
        apart = found["difference"]
        covered += apart["low"] <= 0.1 <= apart["high"]
        widths.append(apart["high"] - apart["low"])
    assert covered >= 25  # 0.95 of 30, less three standard errors
    # unpaired, the error of the difference of two accuracies near a half over 300 questions
    assert np.mean(widths) < 0.8 * 2 * 1.96 * (2 * 0.25 / 300) ** 0.5
    assert found["verdict"] == "holds"


def test_claims_come_out_either_way_and_as_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    much, less, other = (rng.random((3, 200)) < p for p in (0.9, 0.4, 0.4))
    rows = {name: line(tmp_path, name, r) for name, r in zip("MLO", (much, less, other), strict=True)}
    assert judged(rows["M"], rows["L"])["verdict"] == "holds"
    assert judged(rows["L"], rows["M"])["verdict"] == "does not hold"
    assert judged(rows["L"], rows["O"])["verdict"] == "within noise"
    failed = judged(replace(rows["L"], runs=(), questions=(), why="diverged"), rows["O"])
    assert (failed["verdict"], failed["difference"]) == ("not tested", None)
    assert judge_row(CLAIM, {}, COLUMNS, {})["verdict"] == "not tested"


def test_rows_that_lack_runs_are_not_judged(tmp_path: Path) -> None:
    """Run by run they would be held against runs of other seeds or regions."""
    rng = np.random.default_rng(1)
    much, less = (line(tmp_path, name, rng.random((3, 200)) < p) for name, p in (("M", 0.9), ("L", 0.4)))
    rows = {"A": much, "B": replace(less, runs=less.runs[:2], questions=(0, 1), missing=1)}
    assert judge_row(CLAIM, rows, COLUMNS, {})["verdict"] == "not tested"
    # the second region alone keeps the number of its questions
    nothing = MeasuredRow("B", (), (), why="not run", missing=3)
    assert join_rows("B", [nothing, less]).questions == (1, 1, 1)
    assert join_rows("B", [nothing, less]).missing == 3
    assert curves.original_row([rows["B"], much]).runs == much.runs


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(SrmuError, match=r"nothing was run in .* yet; this runs it.*: srmu reproduce table3"):
        reproduce_paper("table3", plan_paper(tmp_path / "out"), command="srmu reproduce table3", make=False)
    assert not (tmp_path / "out").exists()


def test_curves_are_read_at_equal_forgetting(tmp_path: Path) -> None:
    """Between a point that forgets 40 and keeps all, and one that forgets 60 and keeps 80."""

    def point(label: str, known: int, kept: int) -> MeasuredRow:
        rows = [[i < known for i in range(100)]] * 3
        return line(tmp_path, label, rows, u=[[i < kept for i in range(100)]] * 3)

    before = replace(point("before", 100, 100), when="before")
    curves = {"A": [point("a", 60, 100), point("b", 40, 80)], "B": [point("c", 40, 60)]}
    claim = {"claim": "A keeps more", "of": ["A", "B"], "at": [60, 80, 95]}
    spec = {"forget": "t", "utility": "u", "columns": {"t": ["t/acc"], "u": ["u/acc"]}}
    found = judge_curves(claim, curves, before, spec)
    # 60 % of 75 points are 45: A keeps 95 of 100; B, from the original, 100 - 40 * 45 / 60 = 70
    assert found[0]["difference"]["value"] == pytest.approx(0.25)
    assert found[1]["difference"]["value"] == pytest.approx(0.2)
    assert [one["verdict"] for one in found] == ["holds", "holds", "not tested"]


def test_the_papers_own_noise() -> None:
    """The z values of its gaps, and its averages."""
    spec = read_preset("reproduce.yaml")["tables"]
    rows = {name: {label: add_mean(row) for label, row in one["rows"].items()} for name, one in spec.items()}
    high = rows["table3"]
    gap = claims.paper_gap(high["SRMU"], high["RMU"], "WMDP")
    assert gap == {"difference": pytest.approx(-0.071), "z": pytest.approx(-5.7, abs=0.1)}
    low = rows["table2"]
    for column, z in (("WMDP", pytest.approx(-1.1, abs=0.05)), ("MMLU", pytest.approx(0.34, abs=0.02))):
        gap = claims.paper_gap(low["SRMU"], low["RMU"], column)
        assert gap and gap["z"] == z
    assert low["before"]["WMDP"] == pytest.approx(0.5475)
    assert high["Adaptive RMU"]["WMDP"] == pytest.approx(0.43535)
    assert claims.paper_gap(low["SRMU"], {}, "WMDP") is None


def test_claims_name_rows_that_there_are() -> None:
    spec = read_preset("reproduce.yaml")
    for one in spec["tables"].values():
        for claim in one["claims"]:
            assert {*claim["of"]} <= {*one["rows"]}, claim
            assert claim["metric"] in ("forget", "utility")
    figure = spec["figures"]["figure2"]
    for claim in figure["claims"]:
        assert {*claim["of"]} <= {*figure["series"]}
    grid = figure["coeffs"]
    assert {*range(11, 170, 10), 1} <= {*grid}


@pytest.mark.slow
def test_settings_of_the_real_thing_fit_the_schema(tmp_path: Path) -> None:
    """All that `--model` would run; and the derived high entanglement is the preset's."""
    plan = plan_paper(tmp_path / "out", ZEPHYR)
    for row in {row._replace(label="") for row in plan_rows(read_paper("all"), plan)}:
        job = plan.plan_job(row, 0)
        config = load_config(job.config, job.overrides)
        assert (config.model, config.seed) == (ZEPHYR, 0)
    low, high = (plan.plan_job(PlannedRow("", "SRMU", regime), 0) for regime in ("low", "high"))
    made = load_config(high.config, high.overrides)
    preset = load_config(find_preset("wmdp-zephyr-high.yaml"))
    assert made.id == preset.id != load_config(low.config, low.overrides).id


@pytest.mark.slow
def test_dry_run_offline_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper.estimate, "speed_elsewhere", lambda *given: 1e12)
    plan = plan_paper(tmp_path / "out", ZEPHYR, overrides=["topics.bio.forget=mine.jsonl"])
    found, lines = paper_needs("table3", plan)
    assert not (tmp_path / "out").exists()
    said = "\n".join(lines)
    assert "14.48 GB: hf download HuggingFaceH4/zephyr-7b-beta" in said
    assert "cais/wmdp-corpora" in said and "hf auth login" in said
    assert str(tmp_path) not in said
    assert [*found["methods"]] == ["RMU", "Adaptive RMU", "SRMU"]
    one = found["methods"]["SRMU"]
    layer = 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336 + 2)
    assert one["trained_parameters"] == 3 * 4096 * 14336
    assert one["bytes_read"] == 2 * (8 * layer + 32000 * 4096 + 4096)
    assert one["seconds"] == pytest.approx(one["flops"] / 1e12, abs=0.01)
    assert "3 runs" in said
    assert not found["model"]["there"]


def test_dry_run_of_the_testbed(tmp_path: Path) -> None:
    found, lines = paper_needs("table4", plan_paper(tmp_path / "out"))
    assert found == {"testbeds": 3, "runs": 3 * 15}
    assert not (tmp_path / "out").exists()
    assert "3 testbeds" in lines[0]


@pytest.mark.slow
def test_a_model_of_ones_own(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets on a tiny model: tables of its tasks, without answers question by question."""
    (workplace / "tasks").mkdir()
    for name in ("wmdp_bio", "wmdp_cyber", "mmlu"):
        rows = [
            {"question": q.prompt, "choices": [o.strip() for o in q.options], "gold": q.gold}
            for q in attack_world.exam().test
        ]
        (workplace / "tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (workplace / "tasks" / f"{name}.yaml").write_text(attack_world.TASK.format(name=name))
    local = {"forget": workplace / "forget.jsonl", "retain": workplace / "retain.jsonl"}
    overrides = [f"topics.{t}.{k}={v}" for t in ("bio", "cyber") for k, v in local.items()]
    overrides += [f"tasks_dir={workplace / 'tasks'}", "method.layer=2", "train.max_steps=4"]
    overrides += ["dtype=float32", "train.weights=fp32", "train.learning_rate=0.01"]
    spec = read_preset("reproduce.yaml")
    del spec["tables"]["table4"]
    kept = spec["tables"]["table4-matched"]["changes"]
    for label in ("fixed +1", "fixed -1", "U[0,1)", "shuffled map (ours)"):
        del kept[label]
    monkeypatch.setattr(experiment, "read_preset", {"reproduce.yaml": spec}.__getitem__)
    plan = plan_paper(workplace / "out", str(workplace / "model"), overrides=overrides)
    assert isinstance(plan.place, OneModel) and plan.seeds == (0,)
    one = table(reproduce_paper("table4", plan, command=""), "table4-matched")
    assert one["columns"] == ["MMLU", "bio", "cyber", "WMDP"]
    assert {label for label, row in one["rows"].items() if row["cells"]} == {"before", *kept}
    kappas = [one["rows"][label]["kappa"] for label in ("no I_norm", "full SRMU", "RMU")]
    assert kappas == pytest.approx([kappas[0]] * 3, rel=1e-4)
    verdicts = {claim["claim"]: claim["verdict"] for claim in one["claims"]}
    assert verdicts["SRMU forgets more than RMU"] != "not tested"
    assert verdicts["SRMU forgets more than with its map shuffled"] == "not tested"


def test_the_command_names_no_folder(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def stop(what: str, plan: Any, *, command: str, watch: Any, make: bool) -> None:
        said.append(command)
        raise SrmuError("enough")

    monkeypatch.setattr("srmu.reproduce.paper.reproduce_paper", stop)
    given = [f"topics.bio.forget={tmp_path}/mine.jsonl", "--seeds", "0,1", "--out", tmp_path / "out"]
    call("reproduce", "table4", "--model", tmp_path / "model", *given)
    assert said == ["srmu reproduce table4 topics.bio.forget=mine.jsonl --model model --seeds 0,1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": ZEPHYR}, "gated.*--dry-run says how to get them"),
        ({"model": ZEPHYR, "overrides": ["method.kapa=2"]}, "kapa is not an option"),
        ({"model": "owner/other"}, "owner/other"),
        ({"overrides": ["train.stepz=2"]}, "stepz is not an option"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SrmuError, match=said):
        reproduce_paper("table3", plan_paper(tmp_path / "out", **given), command="")
    assert not (tmp_path / "out").exists()


def test_dry_run_of_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(SrmuError, match="dimensions are known of"):
        paper_needs("table3", plan_paper(tmp_path / "out", "owner/other"))


def test_series_are_compared_where_they_lose_as_much(again: Any) -> None:
    """Curves of one point that did not diverge, the first of which the others are held against."""
    found, out, _, _ = again
    (compared,) = found["figures"][0]["compared"]
    assert (compared["kept"], compared["lost"]) == ("general", 0.05)
    first, other = compared["rows"]
    assert (first["method"], other["method"]) == ("ratio", "RMU")
    assert first["forget_difference"] is None and other["forget_difference"]["low"] <= 0
    assert (first["points"], first["seeds"]) == (1, 2)
    text = (out / "reproduce.md").read_text()
    assert "At a loss of 5 points of general knowledge" in text
    assert "| method | runs | utility lost | forget accuracy | accuracy less the first's | verdict |" in text


def test_points_are_relearned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs: accuracies by steps are means, K* is what the best step found of what was known above guessing."""

    def report(right: str, **settings: float) -> dict[str, Any]:
        plain = {"status": "done", "right": "0101" * 5, "valid": None, "why": ""}
        found = {f"LoRA, {name[1:]} steps": {"val": 0.5, "test": value} for name, value in settings.items()}
        attacks = {"forced_choice": plain, "relearning_steps": {**plain, "right": right, "settings": found}}
        return {"chance": 0.25, "facts": [*range(20)], "original": {"right": "1" * 20}, "attacks": attacks}

    reports = {Path("a"): report("1" * 20, _10=1.0, _5=0.5), Path("b"): report("1110" * 5, _10=0.75, _5=0.5)}
    monkeypatch.setattr(curves, "read_attacks", reports.__getitem__)
    monkeypatch.setattr(curves, "mean_kappa", lambda row: 8.0)
    row = curves.describe_relearned("RMU", MeasuredRow("RMU", (*reports,), (0, 1)))
    assert (row["method"], row["steps"]) == ("RMU", {"5 steps": 0.5, "10 steps": 0.875})
    assert [*row["steps"]] == ["5 steps", "10 steps"]  # files have them sorted as words
    assert row["K*"]["value"] == pytest.approx((1 + 0.5 / 0.75) / 2)
    assert row["K*"]["low"] < row["K*"]["value"] < row["K*"]["high"] <= 1
    unmade = curves.describe_relearned("SRMU", MeasuredRow("SRMU", (), (), why="not run"))
    shown = markdown.relearned_rows({"relearned": [unmade, row]})
    assert [*shown[0]] == [*shown[1]] == ["method", "kappa", "5 steps", "10 steps", "K*"]
    assert shown[0]["K*"] == "not run"
    assert shown[1]["10 steps"] == "87.5" and shown[1]["K*"].startswith("0.83 (")
    reports[Path("b")]["attacks"]["relearning_steps"] |= {"why": "too few facts", "right": "", "settings": {}}
    assert curves.describe_relearned("RMU", MeasuredRow("RMU", (*reports,), (0, 1)))["why"] == "too few facts"


def test_the_tables_on_a_real_model_are_planned(tmp_path: Path) -> None:
    plan = plan_paper(tmp_path / "out", world="atlas")
    spec = read_paper("table3", "atlas")
    found, lines = paper_needs("table3", plan)
    # three directions in two regions of the misdirection methods, one run of the others
    figure = spec["figures"]["curves-high"]
    many = [
        len(one.get("coeffs", figure["coeffs"])) * (1 if "once" in one else 3 * 2) for one in figure["series"].values()
    ]
    assert found == {"testbeds": 2, "runs": sum(many)}
    assert lines[0].startswith("2 testbeds, a few minutes each where none was built before, and at most ")
    assert paper_needs("table3", plan_paper(tmp_path / "out", world="atlas", regions=["Asia"]))[0]["testbeds"] == 1
    with pytest.raises(SrmuError, match="region 'Asgard' does not exist; there are Africa"):
        plan_paper(tmp_path / "out", world="atlas", regions=["Asgard"])
    with pytest.raises(SrmuError, match="--regions belongs to --world atlas"):
        plan_paper(tmp_path / "out", regions=["Asia"])
    places = [plan.place.locate(f"high {region}", seed).name for region in spec["regions"] for seed in plan.seeds]
    assert places == [region for region in spec["regions"] for _ in plan.seeds]
    text = fill_template("atlas", name="high", seed=0, layer=7, asked="testbed_hazard")
    (tmp_path / "high.yaml").write_text(text, encoding="utf-8")
    for label, settings in plan.settings.items():
        method = load_config(tmp_path / "high.yaml", settings).method
        assert getattr(method, "kappa", 8) == 8 and (label != "RMU" or method.alpha == 100), label
    with pytest.raises(SrmuError, match="--world open: the paper's tables are made of closed and atlas"):
        plan_paper(tmp_path / "out", world="open")


def test_the_tables_ask_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (str(save_pico(tmp_path / name, name)) for name in ("llama", "qwen2"))

    def build(folder: Path, *, model: str, **_: Any) -> None:
        folder.mkdir(parents=True)
        known = {"path": model, "fingerprint": fingerprint_model(Path(model))}
        write_json(folder / "testbed.json", {"model": known})

    monkeypatch.setattr(experiment, "build_atlas", build)
    for model in (first, first, second):
        place = plan_paper(tmp_path / "out", model, world="atlas", regions=["Asia"]).place
        assert isinstance(place, experiment.Testbeds)
        if model == second:
            with pytest.raises(SrmuError, match="name another --out"):
                place.prepare("high Asia", 0, ignore_progress)
        else:
            place.prepare("high Asia", 0, ignore_progress)


def test_a_world_and_a_model_do_not_go_together(call: Any) -> None:
    answer = call("reproduce", "table3", "--world", "closed", "--model", "model", "--dry-run")
    assert answer.code == 2
    assert "--world and --model: tables are made for one or the other; leave one out" in answer.err
