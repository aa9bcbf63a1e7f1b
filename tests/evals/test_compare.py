"""Comparisons at matched utility loss, of runs whose numbers are made up and so known."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.results import keep_rows, write_metrics, write_report
from srmu.errors import SrmuError
from srmu.evals.compare import ComparisonRow, choose_metrics, compare_runs, read_reports, spell_metrics, suggest_attack
from srmu.evals.results import read_attacks
from srmu.report.format import format_comparison, write_range
from srmu.runs.config import build_config, make_config
from srmu.runs.run import Run
from srmu.runs.setting import run_setting

QUESTIONS = 200  # two of each fact
METRICS = ["hazard/acc"], ["near/acc"]


def answers(share: float, seed: int = 0) -> list[int]:
    """A share of the facts is known, in both phrasings; who knows less knows a part of it."""
    order = np.random.default_rng(seed).permutation(QUESTIONS // 2)
    return np.repeat(order < round(share * QUESTIONS / 2), 2).astype(int).tolist()


def folder_of(place: Path, method: str, overrides: Sequence[str], seed: int, bed: str) -> Path:
    """A run's folder without results, on the model of a testbed of its own."""
    model = place / bed / "model"
    model.mkdir(parents=True, exist_ok=True)
    bed_folder = place / bed
    config = make_config(
        str(model), bed_folder / "forget.jsonl", bed_folder / "retain-low.jsonl", method,
        [*overrides, f"seed={seed}", f"runs_dir={place / 'runs'}"],
    )  # fmt: skip
    folder = place / "runs" / f"{config.id}-{method}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    record = {"base": {"files": {"model.safetensors": {"sha256": bed}}}, "data": {}}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def attacked(
    place: Path,
    method: str,
    forget: float,
    utility: float,
    *overrides: str,
    best: float | None = None,
    seed: int = 0,
    bed: str = "bed0",
    **changes: Any,
) -> Path:
    """A run that was attacked: all known before, after it these shares."""
    folder = folder_of(place, method, overrides, seed, bed)
    names = [i // 2 for i in range(QUESTIONS)]
    draw = seed + 10 * int(bed[-1])
    strongest = "".join(map(str, answers(forget if best is None else best, draw)))
    original = marked("1" * QUESTIONS)
    attacks: dict[str, Any] = {
        "forced_choice": marked(answers(forget, draw), None) | {"controls": {"original": original}},
        "quantisation": marked(strongest, True),
        "soft_prompt": marked(answers(1), False),
        "membership": {"status": "does not apply", "why": "no hold-out texts"},
    }  # fmt: skip
    found = {
        "tier": "smoke", "seed": 0, "chance": 0.25, "facts": names,
        "tasks": {"test": ["hazard"], "val": "hazard_val", "utility": ["near", "far"]},
        "original": original,
        "utility": {
            "near": {"facts": names, "before": answers(1), "after": answers(utility, draw + 1)},
            "far": {"facts": names, "before": answers(1), "after": answers(1)},
        },
        "attacks": attacks,
    }  # fmt: skip
    write_report(folder, found | changes)
    return folder


def marked(right: str | list[int], valid: bool | None = None) -> dict[str, Any]:
    """An attack's answers, with an accuracy that no comparison looks at."""
    accuracy = {"value": 0.5, "low": 0.4, "high": 0.6, "n": QUESTIONS}
    return {"status": "done", "right": right, "valid": valid, "accuracy": accuracy}


def evaluated(
    place: Path, method: str, forget: float, utility: float, *overrides: str, seed: int = 0, n: int = 400
) -> Path:
    folder = folder_of(place, method, overrides, seed, "bed0")
    for when, values in (("before", (1.0, 1.0)), ("after", (forget, utility))):
        entries = {
            f"{task}/acc": {"value": value, "stderr": 0.01, "n": n}
            for task, value in zip(("hazard", "near"), values, strict=True)
        }
        write_metrics(folder, **{when: entries})
    return folder


def inside(row: ComparisonRow) -> bool:
    found = [row.utility_loss, row.forget_accuracy, *([row.residual] if row.residual else [])]
    return all(one.low <= one.value <= one.high for one in found)


def test_a_method_is_interpolated_along_its_own_curve(tmp_path: Path) -> None:
    """Loss 0.02 at kappa 4 and 0.1 at kappa 8, the mean over two tasks: half-way is 0.06."""
    runs = [
        attacked(tmp_path, "srmu", 0.6, 0.96, "method.kappa=4", best=0.8),
        attacked(tmp_path, "srmu", 0.3, 0.8, "method.kappa=8", best=0.5),
    ]
    (row,) = compare_runs(runs, budget=0.06)
    assert (row.method, row.points, row.seeds, row.note) == ("srmu", 2, 1, "")
    assert row.utility_loss.value == pytest.approx(0.06)
    assert row.forget_accuracy.value == pytest.approx(0.45)
    assert row.residual is not None
    assert row.residual.value == pytest.approx((0.65 - 0.25) / 0.75)
    assert inside(row)
    assert row.utility_loss.low == row.utility_loss.high  # it is read there, and shown as a single number
    assert format_comparison(asdict(row))["utility lost"] == "6.0"
    assert row.forget_difference is row.residual_difference is None and row.verdict == ""
    assert (row.forget_accuracy.n, row.utility_loss.n) == (QUESTIONS, 2 * QUESTIONS)
    assert compare_runs(runs[::-1], budget=0.06) == [row]
    assert compare_runs([str(runs[0]), Run.open(runs[1])], budget=0.06, forget="hazard/acc") == [row]
    assert compare_runs(str(runs[0])) == compare_runs(runs[:1])
    # a quarter of the way to the first point, from the original: nothing lost, all known, K* 1
    (row,) = compare_runs(runs, budget=0.005)
    assert row.forget_accuracy.value == pytest.approx(0.9)
    assert row.residual is not None
    assert row.residual.value == pytest.approx(0.75 + 0.25 * (0.8 - 0.25) / 0.75)
    assert "weakest setting" in row.note


def test_a_run_within_the_budget_has_the_interval_of_its_own_loss(tmp_path: Path) -> None:
    """It is not cut off at the budget, which the run was not read at."""
    run = attacked(tmp_path, "srmu", 0.6, 0.92)
    rows = [compare_runs([run], budget)[0].utility_loss for budget in (0.041, 0.9)]
    assert rows[0] == rows[1] and rows[0].value == pytest.approx(0.04)
    assert rows[0].low < 0.04 and rows[0].high > 0.041


def test_copies_of_a_run_count_once(tmp_path: Path) -> None:
    """A copied testbed is no second seed, and a folder that is named twice no second run."""
    run, other = attacked(tmp_path, "rmu", 0.5, 0.9), attacked(tmp_path, "rmu", 0.5, 0.8, bed="bed1")
    copy = attacked(tmp_path, "rmu", 0.5, 0.9, bed="bed2")
    (copy / "record.json").write_text((run / "record.json").read_text())
    assert compare_runs([run, other, copy, run]) == compare_runs([run, other])
    assert [one.folder for one, _ in read_reports([run, other, copy])] == [run, other]
    assert compare_runs([run, other])[0].seeds == 2 and compare_runs([run, copy])[0].seeds == 1


def test_a_curve_that_ends_below_the_budget(tmp_path: Path) -> None:
    """Its strongest setting, also where that gained utility: never the original model."""
    runs = [
        attacked(tmp_path, "srmu", 0.6, 1, "method.kappa=4"),
        attacked(tmp_path, "srmu", 0.3, 1, "method.kappa=8"),
        attacked(tmp_path, "rmu", 0.5, 0.98),
    ]
    for row, accuracy, loss in zip(compare_runs(runs, 0.2), (0.3, 0.5), (0, 0.01), strict=True):
        assert row.forget_accuracy.value == pytest.approx(accuracy)
        assert row.utility_loss.value == pytest.approx(loss)
        assert "strongest setting, where that loses less than 20.0%" in row.note
    found = read_attacks(runs[2])
    found["utility"]["near"] = {
        "facts": found["facts"], "before": answers(0.8), "after": answers(0.9)
    }  # fmt: skip
    write_report(runs[2], found)
    assert compare_runs(runs[2:])[0].forget_accuracy.value == pytest.approx(0.5)


def test_the_same_method_twice_is_noise_and_a_better_one_is_not(tmp_path: Path) -> None:
    """In pairs: both lose the same questions, so that a small difference shows."""
    runs = [
        attacked(tmp_path, "rmu", 0.5, 0.8),
        attacked(tmp_path, "adaptive_rmu", 0.5, 0.8),
        attacked(tmp_path, "srmu", 0.4, 0.8),
        attacked(tmp_path, "npo", 0.4, 0.8, best=0.7),
    ]
    first, same, better, worse = compare_runs(runs, 0.1)
    assert [row.verdict for row in (first, same, better, worse)] == ["", "noise", "better", "worse"]
    assert same.forget_difference is not None
    assert (same.forget_difference.low, same.forget_difference.high) == (0, 0)
    found = better.forget_difference
    assert found is not None and found.value == pytest.approx(-0.1)
    alone = first.forget_accuracy
    assert found.high - found.low < 0.8 * (alone.high - alone.low)
    # less is answered as it is, more comes back: K* decides
    assert worse.forget_difference is not None and worse.forget_difference.high < 0
    assert worse.residual_difference is not None
    assert worse.residual_difference.value == pytest.approx(0.2 / 0.75)


def test_seeds_and_testbeds_are_repetitions(tmp_path: Path) -> None:
    """Of one point; the interval is that of their spread."""
    shares = {("bed0", 0): 0.3, ("bed0", 1): 0.5, ("bed1", 0): 0.7}
    runs = [attacked(tmp_path, "srmu", share, 0.9, seed=seed, bed=bed) for (bed, seed), share in shares.items()]
    (row,) = compare_runs(runs)
    assert (row.points, row.seeds, row.method) == (1, 3, "srmu")
    assert row.forget_accuracy.value == pytest.approx(0.5)
    (one,) = compare_runs(runs[1:2])
    spread = [row.forget_accuracy.high - row.forget_accuracy.low,
              one.forget_accuracy.high - one.forget_accuracy.low]  # fmt: skip
    assert spread[0] > 1.5 * spread[1]
    # another method on the same two: what they have in common is compared in pairs
    others = [attacked(tmp_path, "rmu", share + 0.1, 0.9, seed=seed, bed=bed) for (bed, seed), share in shares.items()]
    _, rmu = compare_runs([*runs, *others])
    assert rmu.forget_difference is not None
    assert rmu.forget_difference.value == pytest.approx(0.1)
    assert rmu.verdict == "worse"
    lone = compare_runs([*runs, others[0]])[1].forget_difference
    assert lone is not None and lone.value == pytest.approx(0.1)
    apart = compare_runs([*runs[:2], others[2]])[1].forget_difference  # nothing in common
    assert apart is not None and apart.value == pytest.approx(0.8 - 0.4)


def test_what_is_no_number_makes_another_method(tmp_path: Path) -> None:
    runs = [
        attacked(tmp_path, "graddiff", 0.5, 0.9, "method.retain=nll"),
        attacked(tmp_path, "graddiff", 0.4, 0.9, "method.retain=kl", "train.max_steps=9"),
        attacked(tmp_path, "graddiff", 0.3, 0.7, "method.retain=kl"),
        attacked(tmp_path, "ga", 0.3, 0.7),
    ]
    rows = compare_runs(runs)
    assert [(row.method, row.points) for row in rows] == [
        ("graddiff (nll)", 1), ("graddiff (kl)", 2), ("ga", 1)
    ]  # fmt: skip


def test_results_alone(tmp_path: Path) -> None:
    """The normal interval from n; seeds share their questions, so they are no more of them."""
    run = evaluated(tmp_path, "rmu", 0.4, 0.9)
    (row,) = compare_runs([run], 1, *METRICS)
    assert row.forget_accuracy.value == pytest.approx(0.4)
    width = row.forget_accuracy.high - row.forget_accuracy.low
    assert width == pytest.approx(2 * 1.96 * (0.24 / 400) ** 0.5, rel=0.15)
    assert row.residual is None and row.forget_accuracy.n == 400
    more = [run, *(evaluated(tmp_path, "rmu", 0.4, 0.9, seed=seed) for seed in (1, 2))]
    (three,) = compare_runs(more, 1, *METRICS)
    found = three.forget_accuracy
    assert three.seeds == 3 and found.high - found.low == pytest.approx(width, rel=0.02)
    runs = [
        *more, evaluated(tmp_path, "srmu", 0.41, 0.9), evaluated(tmp_path, "npo", 0.2, 0.9)
    ]  # fmt: skip
    rows = compare_runs(runs, 1, *METRICS)
    assert [row.verdict for row in rows] == ["", "noise", "better"]
    assert rows[0].forget_accuracy == three.forget_accuracy


def test_answers_of_an_evaluation_are_paired(tmp_path: Path) -> None:
    """As those of an attack are: half of a difference's width is that of the questions."""
    runs = [evaluated(tmp_path, "rmu", 0.5, 0.9), evaluated(tmp_path, "srmu", 0.4, 0.9)]
    for run, share in zip(runs, (0.5, 0.4), strict=True):
        for when, right in (("before", answers(1)), ("after", answers(share))):
            entry = {"value": np.mean(right), "n": QUESTIONS, "answers": right,
                     "facts": [i // 2 for i in range(QUESTIONS)]}  # fmt: skip
            write_metrics(run, **{when: {"hazard/acc": entry}})
    rows = compare_runs(runs, 1, *METRICS)
    change, alone = rows[1].forget_difference, rows[0].forget_accuracy
    assert change is not None and change.value == pytest.approx(-0.1)
    assert change.high - change.low < 0.8 * (alone.high - alone.low)
    assert rows[1].verdict == "better"


def test_attacked_and_evaluated_runs_together(tmp_path: Path) -> None:
    """The one with answers says which results of the other are meant."""
    runs = [attacked(tmp_path, "rmu", 0.5, 0.9), evaluated(tmp_path, "srmu", 0.5, 0.95)]
    for when in ("before", "after"):
        write_metrics(runs[1], **{when: {"far/acc": {"value": 1.0, "n": 400}}})
    rmu, srmu = compare_runs(runs, 0.025)
    assert rmu.residual is not None and srmu.residual is srmu.residual_difference is None
    assert srmu.verdict == "noise"


def test_there_is_no_share_of_knowledge_that_the_original_lacks(tmp_path: Path) -> None:
    folder = attacked(tmp_path, "rmu", 0.25, 0.9)
    results = json.loads((folder / "results.json").read_text())
    (original,) = (row for row in results["rows"] if row.get("attack") == "forced_choice" and row["when"] == "before")
    original |= {"answers": "0001" * (QUESTIONS // 4), "value": 0.25, "low": 0.2}
    (folder / "results.json").write_text(json.dumps(results))
    (row,) = compare_runs([folder], 0.025)
    assert row.residual is None and inside(row)


def test_named_metrics_are_read_from_attacked_runs_too(tmp_path: Path) -> None:
    """Those that the attacks asked with K*; others from the evaluation, without."""
    runs = [attacked(tmp_path, "rmu", 0.5, 0.9), evaluated(tmp_path, "srmu", 0.5, 0.95)]
    for when in ("before", "after"):
        values = {"hazard/acc": {"value": 0.5, "n": 400}, "near/acc": {"value": 1.0, "n": 400}}
        write_metrics(runs[0], **{when: values})
    assert [row.residual for row in compare_runs(runs, 0.025, *METRICS)] == [None, None]
    (asked,) = compare_runs(runs[:1], 0.025, ["hazard/acc"], ["near/acc", "far/acc"])
    assert asked == compare_runs(runs[:1], 0.025)[0] and asked.residual is not None


def test_the_same_call_gives_the_same_rows(tmp_path: Path) -> None:
    runs = [attacked(tmp_path, "rmu", 0.5, 0.9, seed=seed) for seed in range(3)]
    assert compare_runs(runs) == compare_runs(runs) != compare_runs(runs, seed=1)


def with_floor(share: float) -> dict[str, Any]:
    """Two attacks: one answers 0.9 of the questions and, of facts that were never known, a share; one 0.6 of them."""
    original, never = marked("1" * QUESTIONS), [i // 2 for i in range(40)]
    found = {
        "forced_choice": marked(answers(0.6)) | {"controls": {"original": original}},
        "prompts": marked(answers(0.9)) | {"controls": {"unknown": marked(right_share(share, 40))}},
    }
    tasks = {"test": ["hazard"], "val": "hazard_val", "utility": ["near", "far"], "unknown": ["never"]}
    return {"attacks": found, "unknown": never, "tasks": tasks}


def right_share(share: float, count: int) -> str:
    return "".join(str(int(i < share * count)) for i in range(count))


def test_k_star_is_above_what_was_never_known(tmp_path: Path) -> None:
    taught = attacked(tmp_path, "rmu", 0.6, 0.9, **with_floor(0.85))
    found = attacked(tmp_path, "srmu", 0.6, 0.9, **with_floor(0.2))
    first, second = compare_runs([taught], 0.05)[0].residual, compare_runs([found], 0.05)[0].residual
    assert first is not None and second is not None
    assert first.value == pytest.approx((0.6 - 0.25) / 0.75)  # 0.05 above 0.85 is a third
    assert second.value == pytest.approx((0.9 - 0.25) / 0.75)
    with pytest.raises(SrmuError, match="unknown facts and without them"):
        compare_runs([found, attacked(tmp_path, "graddiff", 0.6, 0.9, bed="bed1")])
    with pytest.raises(SrmuError, match="with other questions"):
        compare_runs([found, attacked(tmp_path, "ssd", 0.6, 0.9)])
    assert suggest_attack(read_reports([found]), (), ())[1]["unknown"] == "never"


def on_other_texts(run: Path) -> Path:
    """A run of the same config beside another."""
    other = Path(shutil.copytree(run, run.with_name("other")))
    record = json.loads((run / "record.json").read_text()) | {"data": {"topic": {"forget": {"digest": "2"}}}}
    (other / "record.json").write_text(json.dumps(record))
    return other


CANNOT: dict[str, tuple[Any, str]] = {
    "none": (lambda one, make: compare_runs([]), "name the folders"),
    "budget": (lambda one, make: compare_runs([one], 5), "utility loss 5: it is a share"),
    "no run": (lambda one, make: compare_runs([one.parent]), "is not a finished run"),
    "no results": (lambda one, make: compare_runs([one, make(None)]), "run `srmu eval "),
    "metrics": (lambda one, make: compare_runs([make(evaluated)]), "there are hazard/acc, near/acc"),
    "unknown": (lambda one, make: compare_runs([make(evaluated)], 1, ["x"], ["y"]), "no result x"),
    "tasks": (
        lambda one, make: compare_runs(
            [one, make(attacked, tasks={"test": ["a"], "val": "", "utility": ["near", "far"]})]
        ),
        "different tasks: hazard/acc, near/acc, far/acc and a/acc, near/acc, far/acc",
    ),
    "tier": (lambda one, make: compare_runs([one, make(attacked, tier="deep")]), "tier smoke and deep"),
    "questions": (
        lambda one, make: compare_runs([one, make(attacked, facts=list(range(QUESTIONS)))]),
        "with other questions",
    ),
    "other texts": (lambda one, make: compare_runs([one, on_other_texts(one)]), "one config on different texts"),
    "utility": (
        lambda one, make: keep_rows(one, lambda row: row["attack"] != "utility") or compare_runs([one]),
        "attacked without utility tasks",
    ),
    "damaged": (
        lambda one, make: (one / "results.json").write_text("{") and compare_runs([one]),
        "results.json is damaged",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    def make(how: Any, **changes: Any) -> Path:
        if how is None:
            return folder_of(tmp_path, "npo", (), 0, "bed0")
        return how(tmp_path, "npo", 0.5, 0.9, **changes)

    call, expected = CANNOT[case]
    with pytest.raises(SrmuError) as caught:
        call(attacked(tmp_path, "rmu", 0.5, 0.9), make)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_is_named_as_a_command(tmp_path: Path) -> None:
    """A run without results: what the other was asked; of attacks: the run without one, and how the other was."""
    done, other = attacked(tmp_path, "rmu", 0.5, 0.9), folder_of(tmp_path, "npo", [], 0, "bed0")
    with pytest.raises(SrmuError, match=rf"`srmu eval {other} --tasks hazard,near,far` first"):
        compare_runs([done, other])
    plain = evaluated(tmp_path, "simnpo", 0.5, 0.9)
    write_metrics(plain, after={"repetition/forget": {"value": 0.5, "n": 16}})  # no task that one could type
    with pytest.raises(SrmuError, match=rf"`srmu eval {other} --tasks hazard,near` first"):
        compare_runs([plain, other])
    named = {"tasks": "hazard", "utility": "near,far", "seed": "0", "val": "hazard_val"}
    assert suggest_attack(read_reports([done, other]), (), ()) == (other, named | {"tier": "smoke"})
    assert suggest_attack(read_reports([done]), (), ()) == (done, named | {"tier": "standard"})
    deep = attacked(tmp_path, "rmu", 0.5, 0.9, seed=1, tier="deep")
    assert suggest_attack(read_reports([deep]), (), ())[1]["tier"] == "deep"
    assert suggest_attack(read_reports([plain]), ["hazard/acc"], ()) == (
        plain,
        {"tasks": "hazard", "utility": "near", "val": "split"},
    )


def test_a_setting_has_paths_by_name_and_templates_whole() -> None:
    def of(path: str, template: str) -> Any:
        source = {"path": path, "template": template}
        tree = {"model": "m", "method": {"name": "ga"}, "topics": {"t": {"forget": source, "retain": "b.jsonl"}}}
        return run_setting(build_config(tree, []))

    assert of("x/a.jsonl", "{q} [/I]{a}") == of("y/a.jsonl", "{q} [/I]{a}")
    assert of("x/a.jsonl", "{q} [/I]{a}") != of("x/a.jsonl", "{p} [/I]{a}")


def test_evaluated_runs_are_compared_on_what_both_measured(tmp_path: Path) -> None:
    """The testbed's tasks say which should fall; where names leave it open, one line asks."""
    tasks = ("testbed_hazard", "testbed_hazard_held", "testbed_neighbour", "testbed_general", "quiz")
    runs = [evaluated(tmp_path, method, 0.4, 0.9) for method in ("srmu", "rmu")]
    for run, known in zip(runs, (tasks, tasks[:-1]), strict=True):
        keep_rows(run, lambda row: False)
        for when, value in (("before", 1.0), ("after", 0.9)):
            write_metrics(run, **{when: {f"{task}/acc": {"value": value, "n": 400} for task in known}})
    named = ["testbed_hazard/acc"], ["testbed_neighbour/acc", "testbed_general/acc"]
    assert compare_runs(runs) == compare_runs(runs, 0.05, *named)
    for run in runs:
        keep_rows(run, lambda row: row["task"] == "testbed_general")
    with pytest.raises(SrmuError, match=r"--metrics\) and .*--utility-metrics\); there are testbed_general/acc$"):
        compare_runs(runs)


def test_repetition_is_offered_neither_as_knowledge_nor_as_utility() -> None:
    """A rise of it would have counted as utility that was kept."""
    with pytest.raises(SrmuError, match=r"; there are quiz/acc$"):
        choose_metrics(["quiz/acc", "repetition/forget", "repetition/neutral"], (), (), ())


def test_when_half_is_back_is_told_of_each_method(tmp_path: Path) -> None:
    runs = [attacked(tmp_path, method, 0.3, 0.98) for method in ("srmu", "rmu")]
    prices = ([{"share": 0.5, "steps": 12.4}, {"share": 0.9, "steps": None}], [{"share": 0.5, "steps": None}])
    for run, price in zip(runs, prices, strict=True):
        results = json.loads((run / "results.json").read_text())
        results["attacks"]["attacks"]["quantisation"]["price"] = price
        (run / "results.json").write_text(json.dumps(results))
    rows = compare_runs(runs)
    assert [row.half_back for row in rows] == [(12.4,), (None,)]
    assert [write_range(row.half_back) for row in rows] == ["12 steps", "not in 1 of 1 runs"]
    assert write_range((12.4, None, 3.0)) == "3\N{EN DASH}12 steps, not in 1 of 3 runs"
    assert write_range((30.0, 3.0)) == "3\N{EN DASH}30 steps" and write_range(()) == ""


def test_half_is_back_at_the_point_nearest_the_budget(tmp_path: Path) -> None:
    runs = [
        attacked(tmp_path, "srmu", 0.3, 1 - loss, f"method.kappa={k}") for k, loss in ((2, 0.02), (4, 0.06), (8, 0.3))
    ]
    for number, run in enumerate(runs):
        results = json.loads((run / "results.json").read_text())
        results["attacks"]["attacks"]["quantisation"]["price"] = [{"share": 0.5, "steps": float(number)}]
        (run / "results.json").write_text(json.dumps(results))
    assert [compare_runs(runs, budget)[0].half_back for budget in (0.001, 0.04, 0.5)] == [(0.0,), (1.0,), (2.0,)]


def test_metrics_have_short_names(tmp_path: Path) -> None:
    known = ["testbed_hazard/acc", "testbed_hazard_val/acc", "other_hazard_val/acc", "near/acc", "near/acc_norm"]
    assert spell_metrics(["hazard", "near", "near/acc_norm"], known) == (
        "testbed_hazard/acc",
        "near/acc",
        "near/acc_norm",
    )
    assert spell_metrics(["hazard_val", "ard", "x"], known) == ("hazard_val", "ard", "x")  # of two, of none
    run = evaluated(tmp_path / "one", "srmu", 0.4, 0.98)
    assert compare_runs([run], 0.05, ["hazard"], ["near"]) == compare_runs([run], 0.05, *METRICS)
    run = attacked(tmp_path / "two", "srmu", 0.4, 0.98)
    assert compare_runs([run], 0.05, ["hazard"]) == compare_runs([run], 0.05, METRICS[0])
