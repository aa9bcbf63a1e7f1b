"""One file of results: what is merged, what is replaced, and what cannot be read."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from srmu.errors import SrmuError
from srmu.evals.results import (
    RESULTS,
    attack_rows,
    load_results,
    merge_results,
    metric_rows,
    plain_metrics,
    read_attacks,
    read_benchmarks,
    read_metrics,
)


def metrics(*names: str, value: float = 0.5, **more: Any) -> dict[str, dict[str, Any]]:
    return {name: {"value": value, "n": 100, **more} for name in names}


def test_what_is_measured_later_is_added(tmp_path: Path) -> None:
    merge_results(tmp_path, metric_rows(metrics("a/acc", "b/acc"), "after"))
    merge_results(tmp_path, metric_rows(metrics("a/acc", value=0.9), "before"))
    merge_results(tmp_path, metric_rows(metrics("b/acc", value=0.4), "after"))
    assert {name: row["value"] for name, row in read_metrics(tmp_path)["after"].items()} == {"a/acc": 0.5, "b/acc": 0.4}
    assert read_metrics(tmp_path)["before"]["a/acc"]["value"] == 0.9
    text = (tmp_path / RESULTS).read_text()
    merge_results(tmp_path, metric_rows(metrics("b/acc", value=0.4), "after"))
    assert (tmp_path / RESULTS).read_text() == text  # the same again changes nothing


def test_shares_of_questions_have_wilsons_interval(tmp_path: Path) -> None:
    given = metrics("a/acc", answers="10" * 50) | {"a/ppl": {"value": 12.0, "n": 9}}
    share, other = metric_rows(given, "after")
    assert (share["low"], share["high"]) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert "low" not in other
    assert plain_metrics({"a/acc": share}) == metrics("a/acc")


def test_a_benchmark_replaces_itself_alone(tmp_path: Path) -> None:
    """A metric that it no longer gives is gone; the tasks and other benchmarks stay."""
    merge_results(tmp_path, metric_rows(metrics("tofu/acc"), "after"))
    for name in ("tofu/forget10", "tofu/forget05"):
        rows = metric_rows(metrics("tofu/rouge", "tofu/forget/rouge"), "after", benchmark=name)
        merge_results(tmp_path, rows, benchmarks={name: {"asked": {"limit": 3}}})
    rows = metric_rows(metrics("tofu/rouge", value=0.1), "after", benchmark="tofu/forget05")
    merge_results(tmp_path, rows, benchmarks={"tofu/forget05": {"asked": {}}})
    found = read_benchmarks(tmp_path)
    assert found["tofu/forget10"]["after"].keys() == {"tofu/rouge", "tofu/forget/rouge"}
    assert found["tofu/forget05"]["after"].keys() == {"tofu/rouge"}
    assert found["tofu/forget05"]["after"]["tofu/rouge"]["value"] == 0.1
    assert found["tofu/forget05"]["asked"] == {}
    assert read_metrics(tmp_path)["after"].keys() == {"tofu/acc"}


def marked(right: Any) -> dict[str, Any]:
    return {"right": right, "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 4}}


def test_a_report_of_attacks_comes_back_as_it_was(tmp_path: Path) -> None:
    plain = marked("0011") | {"controls": {"original": marked("1111"), "oracle": marked("0001")}}
    report = {
        "tier": "smoke", "facts": [0, 0, 1, 1], "tasks": {"test": ["a", "b"], "utility": ["c"]},
        "attacks": {
            "forced_choice": plain,
            "noise": marked([0.5, 1, 0, 0]) | {"controls": {"oracle": {"why": "no"}}},
            "leak": {"status": "failed", "why": "no room"},
        },
        "original": marked("1111"),
        "utility": {"c": {"facts": [0, 1], "before": "11", "after": "10"}},
        "K*": {"value": 0.3},
    }  # fmt: skip
    rows, left = attack_rows(report)
    assert "0011" not in json.dumps(left)
    merge_results(tmp_path, rows, attacks=left)
    merge_results(tmp_path, metric_rows(metrics("a/acc"), "after"))
    assert read_attacks(tmp_path) == report
    less = report | {"attacks": {"forced_choice": plain}}
    rows, left = attack_rows(less)
    merge_results(tmp_path, rows, attacks=left)
    assert read_attacks(tmp_path) == less
    assert read_metrics(tmp_path)["after"].keys() == {"a/acc"}


def test_a_floor_comes_back_as_it_was(tmp_path: Path) -> None:
    """Facts that were never known have rows of their own, under their own tasks."""
    controls = {"original": marked("1111"), "unknown": marked("01")}
    report = {
        "facts": [0, 0, 1, 1], "unknown": [0, 1], "tasks": {"test": ["a"], "utility": [], "unknown": ["b", "c"]},
        "attacks": {"forced_choice": marked("0011") | {"controls": controls, "floor": 0.5}},
        "original": marked("1111"), "utility": {},
    }  # fmt: skip
    rows, left = attack_rows(report)
    assert [(row["task"], row["answers"]) for row in rows if row["when"] == "unknown"] == [("b + c", "01")]
    merge_results(tmp_path, rows, attacks=left)
    assert read_attacks(tmp_path) == report
    assert read_metrics(tmp_path) == {"before": {}, "after": {}}


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    def measure(number: int) -> None:
        merge_results(tmp_path, metric_rows(metrics(f"task{number}/acc"), "after"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(measure, range(24)))
    assert len(read_metrics(tmp_path)["after"]) == 24


@pytest.mark.parametrize("text", ["{", "[]", '{"quiz/acc": {"value": 1}}', '{"rows": [{"task": "a"}]}', '{"rows": 3}'])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(SrmuError, match=r"results\.json is damaged") as caught:
        load_results(tmp_path)
    assert "\n" not in str(caught.value) and "srmu eval" in str(caught.value)
    with pytest.raises(SrmuError):
        merge_results(tmp_path, metric_rows(metrics("a/acc"), "after"))
    assert (tmp_path / RESULTS).read_text() == text  # nothing is lost


MERGE = """
import sys
from pathlib import Path
from srmu.evals.results import merge_results
for i in range(20):
    row = {"task": f"{sys.argv[2]}{i}", "metric": "acc", "when": "after", "value": 0.5, "n": 2}
    merge_results(Path(sys.argv[1]), [row])
"""


def test_processes_with_caches_of_their_own_lose_no_row(tmp_path: Path) -> None:
    """The lock lies in the run's folder, and is gone afterwards."""
    run = tmp_path / "run"
    run.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MERGE, str(run), name], env=os.environ | {"SRMU_CACHE": str(tmp_path / name)}
        )
        for name in ("a", "b", "c")
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(load_results(run)["rows"]) == 60
    assert [path.name for path in run.iterdir()] == ["results.json"]
