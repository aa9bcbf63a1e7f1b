"""Benchmarks on a model and on a run: tables, an oracle, the report, mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.models import Call
from helpers.people_world import people_folder
from srmu.evals import benchmarks
from srmu.evals.benchmarks.base import TableColumn
from srmu.evals.results import read_benchmarks, read_metrics
from srmu.evals.score import benchmark_table, format_metric, score_benchmark
from srmu.runs.config import load_config
from srmu.runs.run import unlearn_config
from srmu.runs.verify import verify_folder

# What tells each suite that the forget set is known: 1 where it is, little where it is not.
KNOWN = {
    "tofu": "tofu/forget/rouge",
    "muse": "muse/knowmem_f",
    "rwku": "rwku/forget/all",
    "whp": "whp/probability_familiarity",
    "wmdp": "wmdp/mean_cloze_norm",
}
KEPT = {"tofu": "tofu/model_utility", "muse": "muse/knowmem_r", "rwku": "rwku/neighbor/all"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed of authors, with a run of NPO."""
    place = tmp_path_factory.mktemp("suites") / "people"
    shutil.copytree(people_folder(), place)
    options = ["method.name=npo", "method.retain=kl", "train.learning_rate=1e-3"]
    options += ["train.max_steps=80", f"runs_dir={place / 'runs'}", "device=cpu"]
    unlearn_config(load_config(place / "high.yaml", options))
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def way(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    first = name.partition("/")[0]
    given = {"data": str(folder / "suites" / first), "oracle": str(folder / "oracle")}
    return {"name": name, **given, **options}


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_original_unlearned_and_oracle_come_out_in_order(folder: Path, run: Path, name: str) -> None:
    """What is unlearned answers as the oracle does rather than as the original."""
    found = score_benchmark(str(run), **way(folder, name))
    before, after, oracle = (found[when][KNOWN[name]]["value"] for when in ("before", "after", "oracle"))
    assert before > oracle + 0.3
    assert abs(after - oracle) < 0.75 * (before - oracle) and after < before
    if name in KEPT:
        kept = [found[when][KEPT[name]]["value"] for when in ("before", "after")]
        assert kept[0] > kept[1] > 0.2
    known = read_benchmarks(run)[name]
    after = {metric: row["value"] for metric, row in known["after"].items()}
    written = {metric: row["value"] for metric, row in read_metrics(run)["after"].items()}
    assert {"repetition/forget", "repetition/neutral"} <= {*written}
    assert after | written == {metric: entry["value"] for metric, entry in found["after"].items()}
    assert known["asked"]["data"] and known["oracle"]
    assert verify_folder(run)["files"]


@pytest.mark.slow
def test_forget_quality_and_privleak_are_those_of_the_oracle(folder: Path) -> None:
    """Held against itself, the oracle's truth ratios are its own, and it leaks nothing more."""
    oracle = str(folder / "oracle")
    found = score_benchmark(oracle, **way(folder, "tofu"))["after"]
    assert found["tofu/forget_quality"]["value"] == 1
    assert score_benchmark(oracle, **way(folder, "muse"))["after"]["muse/privleak"]["value"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "tofu/forget7"], "did you mean forget"),
        (["--tasks", "tofu", "--data", "{}/suites/tofu"], "--oracle none to leave it out"),
        (["--tasks", "wmdp", "--data", "{}/nowhere"], "no such folder"),
        (["--tasks", "rwku", "--data", "{}", "--template", "Q: {{q}}"], "has no {question} in it"),
        (["--tasks", "rwku", "--data", "{}", "--limit", "0"], "must be 1 or more"),
        (["--tasks", "quiz", "--data", "{}"], "go with a benchmark: --tasks tofu"),
        (["--tasks", "rwku", "--data", "{}/suites/tofu"], "jinzhuoran/RWKU"),
        (["--tasks", "rwku/Nobody", "--data", "{}/suites/rwku"], "nothing about 'Nobody'"),
    ],
)
def test_mistakes(folder: Path, call: Call, words: list[str], said: str) -> None:
    given = [word.format(folder) for word in words]
    code, out, err = call("eval", str(folder / "model"), *given)
    assert code == 2 and said in err and err.startswith("srmu: ") and err.count("\n") == 1
    assert "Traceback" not in err and not out


def test_data_lie_beside_the_model_or_on_the_hub(folder: Path, tmp_path: Path, call: Call) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    words = ["--tasks", "tofu", "--oracle", "none"]
    code, _, err = call("eval", str(model), *words)
    assert code == 2 and "locuslab/TOFU" in err and "hf download locuslab/TOFU" in err
    code, _, err = call("eval", str(model), "--tasks", "whp")
    assert code == 2 and "--tasks whp has no data set of its own" in err
    shutil.copytree(folder / "suites/tofu", tmp_path / "suites/tofu")
    code, out, _ = call("eval", str(model), *words, "--json")
    named = score_benchmark(str(folder / "model"), **way(folder, "tofu", oracle="none"))
    assert code == 0 and json.loads(out) == named


@pytest.mark.slow
def test_one_person_of_rwku(folder: Path) -> None:
    rows = (folder / "suites/rwku/forget_level1/test.jsonl").read_text().splitlines()
    person = json.loads(rows[0])["subject"]
    found = score_benchmark(str(folder / "model"), **way(folder, f"rwku/{person}"))["after"]
    named = [row for row in rows if json.loads(row)["subject"] == person]
    assert found["rwku/forget/level1"]["n"] == len(named) < len(rows)
    assert found["rwku/mia_retain/loss"]["n"] >= 1


def test_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = score_benchmark(str(folder / "model"), **way(folder, "whp", oracle="none"))
    monkeypatch.setattr("srmu.runs.run.load_module", lambda *_: 1 / 0)
    assert score_benchmark(str(folder / "model"), **way(folder, "whp", oracle="none")) == first
    with pytest.raises(ZeroDivisionError):
        score_benchmark(str(folder / "model"), **way(folder, "whp", oracle="none", limit=2))


def test_a_run_on_the_command_line(folder: Path, run: Path, call: Call) -> None:
    words = ["--tasks", "muse", "--data", str(folder / "suites/muse"), "--oracle", "none"]
    code, out, _ = call("eval", str(run), *words)
    assert code == 0 and "VerbMem f" in out and "original" in out and "unlearned" in out
    assert "oracle" not in out.split("metric")[0] and f"srmu report {run}" in out
    code, out, _ = call("eval", str(run), *words, "--json")
    assert set(json.loads(out)) == {"before", "after"}


@pytest.mark.slow
def test_report_of_benchmarks_alone(folder: Path, run: Path, tmp_path: Path, call: Call) -> None:
    for name in ("tofu", "muse"):
        score_benchmark(str(run), **way(folder, name))
    page = tmp_path / "report.html"
    code, _, err = call("report", str(run), "-o", str(page))
    assert code == 0, err
    text = page.read_text()
    assert "Benchmark: TOFU" in text and "Benchmark: MUSE" in text and "Oracle" in text
    for file in (folder / "suites/tofu/forget10/train.jsonl", folder / "forget.jsonl"):
        for line in file.read_text().splitlines()[:20]:
            for value in json.loads(line).values():
                assert value not in text


def test_cells() -> None:
    suite = benchmarks.BENCHMARKS["tofu"]
    metrics = {suite.columns[0].metric: {"value": 0.51234, "n": 3.0}}
    (row,) = benchmark_table(suite, {"after": metrics})
    assert row[suite.columns[0].title] == "0.512" and row[suite.columns[1].title] == ""
    column = TableColumn("a", "tofu/model_utility", "high")
    assert format_metric(column, {"tofu/model_utility": {"value": 0.51234}}) == "51.2"


@pytest.mark.slow
def test_columns_and_axes_are_measured(folder: Path) -> None:
    for name, suite in benchmarks.BENCHMARKS.items():
        found = score_benchmark(str(folder / "model"), **way(folder, name))["after"]
        titles = [column.title for column in suite.columns]
        assert set(suite.axes) <= set(titles) and suite.axes[0] != suite.axes[1]
        assert [c.metric for c in suite.columns if c.metric not in found] == []
        assert {column.better for column in suite.columns} <= {"high", "low", "zero"}
        assert all(key.startswith(f"{name}/") for key in found)
