"""Files of open-unlearning beside runs: in the format that it writes, with the numbers worked out by hand."""

import json
from math import exp, log10
from pathlib import Path
from typing import Any

import pytest

from helpers.models import Call
from helpers.report_world import write_run
from helpers.results import write_rows
from srmu.errors import SrmuError
from srmu.evals.peers import find_peers
from srmu.evals.results import metric_rows

NPO = "tofu_Llama-3.2-1B-Instruct_forget10_NPO"


def by_index(key: str, values: list[Any], **more: Any) -> dict[str, Any]:
    return {str(400 + i): {key: value, **more} for i, value in enumerate(values)}


EVAL = {
    "exact_memorization": {"agg_value": 0.9, "value_by_index": by_index("score", [0.9, None])},
    "forget_Q_A_PARA_Prob": {"agg_value": 0.1, "value_by_index": by_index("avg_loss", [2.0, 1.0], prob=0.1)},
    "forget_Q_A_PERT_Prob": {
        "agg_value": 0.1,
        "value_by_index": by_index("avg_loss", [[2.0, 3.0], [0.5, 1.0]], prob=[0.1, 0.2]),
    },
    "forget_Q_A_Prob": {"agg_value": 0.3, "value_by_index": by_index("prob", [0.2, 0.4], avg_loss=1.0)},
    "forget_Q_A_ROUGE": {
        "agg_value": 0.5,
        "value_by_index": by_index("rougeL_recall", [0.25, 0.75], rougeL_f1=0.1, generation="a text"),
    },
    "forget_quality": {"agg_value": 1e-3},
    "forget_truth_ratio": {"agg_value": 0.77, "value_by_index": by_index("score", [0.7, 0.84])},
    "mia_min_k": {"agg_value": 0.9, "auc": 0.9, "forget": {"agg_value": 0.1, "value_by_index": {}}},
    "model_utility": {"agg_value": 0.6},
    "retain_Q_A_ROUGE": {"agg_value": None},
}
MUSE = {"forget_knowmem_ROUGE": 0.4, "forget_verbmem_ROUGE": 0.5, "privleak": -50.0, "retain_knowmem_ROUGE": 0.45}


def write_peer(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=4))
    return folder / name


def test_each_metric_is_ours(tmp_path: Path) -> None:
    path = write_peer(tmp_path / NPO / "evals", "TOFU_EVAL.json", EVAL)
    runs, (peer,) = find_peers([path, tmp_path])
    assert runs == [tmp_path]
    assert (peer.name, peer.benchmark) == (NPO, "tofu/forget10")
    assert {key: entry["value"] for key, entry in peer.metrics.items()} == pytest.approx(
        {
            "tofu/model_utility": 0.6,
            "tofu/forget_quality": 1e-3,
            "tofu/forget_quality_log10": log10(1e-3),
            "tofu/forget/probability": 0.3,
            "tofu/forget/rouge": 0.5,
            # R = exp(loss of the right answer - mean loss of the wrong): exp(-1/2) and exp(1/4)
            "tofu/forget/truth_ratio": (exp(-0.5) + exp(-0.25)) / 2,
        }
    )
    errors = {key: entry.get("stderr") for key, entry in peer.metrics.items()}
    assert errors["tofu/forget/probability"] == pytest.approx(0.1)  # of 0.2 and 0.4
    assert errors["tofu/forget/rouge"] == pytest.approx(0.25) and errors["tofu/model_utility"] is None


def test_a_folder_is_as_good_and_says_what_was_asked(tmp_path: Path) -> None:
    retain = tmp_path / "tofu_Llama-3.2-1B-Instruct_retain95"
    write_peer(retain, "TOFU_EVAL.json", EVAL)
    write_peer(retain, "TOFU_SUMMARY.json", {"model_utility": 0.1})  # says less
    full = tmp_path / "tofu_Llama-3.2-1B-Instruct_full" / "evals_forget01"
    write_peer(full, "TOFU_SUMMARY.json", {"model_utility": 0.5, "forget_truth_ratio": 0.5})
    news = write_peer(tmp_path / "muse_Llama-2-7b-hf_News_GradDiff", "MUSE_SUMMARY.json", MUSE).parent
    runs, peers = find_peers([retain, full, news])
    assert not runs
    assert [(one.name, one.benchmark) for one in peers] == [
        (retain.name, "tofu/forget05"),
        (full.parent.name, "tofu/forget01"),
        (news.name, "muse/news"),
    ]
    assert peers[0].metrics["tofu/model_utility"]["value"] == 0.6
    assert set(peers[1].metrics) == {"tofu/model_utility"}  # the summary's truth ratio has two meanings
    assert peers[2].metrics["muse/privleak"]["value"] == -0.5  # per cent there


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        ("forget10/results.json", {}, "is neither a run's folder nor one of open-unlearning's files: TOFU_EVAL.json"),
        ("forget10/TOFU_EVAL.json", "{", "is damaged"),
        ("forget10/TOFU_EVAL.json", [1], "is not as open-unlearning writes it: expected numbers by metric"),
        ("forget10/TOFU_EVAL.json", {"model_utility": "high"}, "is not as open-unlearning writes it"),
        ("forget10/TOFU_EVAL.json", {"extraction_strength": {"agg_value": 1.0}}, "has no metric that srmu has, too"),
        ("npo/TOFU_SUMMARY.json", {"model_utility": 0.5}, "put forget10 or forget05 or forget01 into the name"),
    ],
)
def test_another_file_is_one_line(place: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / place
    with pytest.raises(SrmuError) as error:
        find_peers([write_peer(path.parent, path.name, content)])
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


# ---- beside runs


def write_tofu_run(folder: Path) -> Path:
    run = write_run(folder, "SRMU", "high", 0, (34, 100, 78), steps=6)
    entry = {"value": 0.8, "n": 300.0, "stderr": 0.02}
    for when in ("before", "after"):
        rows = metric_rows({"tofu/model_utility": entry, "tofu/forget/rouge": entry}, when, benchmark="tofu/forget10")
        write_rows(run, rows, benchmarks={"tofu/forget10": {"asked": {}, "rows": {}}})
    return run


def test_compare_puts_them_into_one_table(call: Call, tmp_path: Path) -> None:
    run = write_tofu_run(tmp_path / "run")
    path = write_peer(tmp_path / NPO, "TOFU_EVAL.json", EVAL)
    done = call("compare", run, path)
    assert done.code == 0, done.err
    assert "tofu/forget10" in done.out and NPO in done.out.replace("\n", "")
    assert "0.5 (0.25\N{EN DASH}0.75)" in done.out and "next: srmu report" in done.out
    assert "retain ROUGE" not in done.out  # nobody has it
    (suite,) = json.loads(call("compare", run, path.parent, "--json").out)["suites"].values()
    assert [row["model"] for row in suite] == ["Original model", "srmu", NPO]
    assert suite[2]["forget ROUGE"] == pytest.approx({"value": 0.5, "low": 0.25, "high": 0.75})
    assert suite[2]["model utility"] == {"value": 0.6} and suite[2]["retain ROUGE"] is None
    assert call("compare", path).code == 0


def test_compare_says_what_is_missing(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "SRMU", "high", 0, (34, 100, 78), steps=6)
    path = write_peer(tmp_path / NPO, "TOFU_EVAL.json", EVAL)
    done = call("compare", run, path)
    assert done.code == 2 and f"`srmu eval {run} --tasks tofu/forget10 --oracle MODEL` first" in done.err
    done = call("compare", run, path, "--metrics", "a/acc")
    assert done.code == 2 and "leave them out" in done.err


def test_report_puts_them_into_one_table(call: Call, tmp_path: Path) -> None:
    run, out = write_tofu_run(tmp_path / "run"), tmp_path / "report.html"
    path = write_peer(tmp_path / NPO, "TOFU_EVAL.json", EVAL)
    assert call("report", run, path, "-o", out).code == 0
    text = out.read_text(encoding="utf-8")
    assert f"open-unlearning measured {NPO}" in text and str(tmp_path) not in text
    assert "Original model" in text and text.count(NPO) > 3
    assert call("report", path.parent, "-o", out).code == 0  # alone
    assert f"{NPO}: benchmarks" in out.read_text(encoding="utf-8")
    done = call("report", path, "-o", out, "--samples", "neutral")
    assert done.code == 2 and "--samples neutral is for runs" in done.err


def test_the_oracle_of_a_model_of_the_hub_is_named(call: Call) -> None:
    done = call("eval", "open-unlearning/tofu_Llama-3.2-1B-Instruct_full", "--tasks", "tofu/forget05")
    assert done.code == 2 and "give --oracle open-unlearning/tofu_Llama-3.2-1B-Instruct_retain95," in done.err
    assert "give --oracle MODEL," in call("eval", "open-unlearning/some_full", "--tasks", "muse").err
