"""What stays gone, and what it costs: methods at one loss of utility under attack, two worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from srmu.attacks.measures import Utility, measure_texts
from srmu.attacks.suite import TIERS, Sources, attack_run, select_attacks
from srmu.data import sources
from srmu.engine.files import require_place
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, suggest_word
from srmu.evals.matched import load_task, match_utility
from srmu.evals.results import load_results, merge_results, read_attacks
from srmu.evals.score import score_model
from srmu.evals.statistics import LEAST, Draws, attack_share, draw_floors, residual_table, worst_case
from srmu.evals.subject import Subject
from srmu.report.build import make_runs_page
from srmu.report.markdown import frontier_section
from srmu.report.results import RunGroup
from srmu.reproduce import experiment
from srmu.reproduce.claims import estimate_cells, format_interval, resample_mean
from srmu.reproduce.experiment import Experiment, MeasuredRow, PlannedRow, RunJob, Testbeds
from srmu.runs.run import Run, open_target

CONTROLS = ("original", "oracle")  # shown beside the methods
Report = Mapping[str, Any]  # what attack_run gives
Spec = Mapping[str, Any]  # the content of configs/robust.yaml, with what its table and a person ask for instead


@dataclass(frozen=True)
class Frontier:
    """What is asked for: the table `kind` of configs/robust.yaml, an experiment for each world."""

    out: Path
    kind: str
    experiments: Mapping[str, Experiment]  # by world
    spec: Spec


@dataclass(frozen=True)
class Part:
    """A world in a regime, with its rows."""

    frontier: Frontier
    world: str
    regime: str
    rows: Sequence[MeasuredRow]
    columns: Mapping[str, Sequence[str]]  # metrics
    kept: Sequence[str]  # metrics of what is to be kept
    testbeds: Mapping[int, Path]  # by seed
    title: str


def plan_frontier(
    kind: str,
    out: Path,
    *,
    world: str = "both",
    regimes: Sequence[str] = (),
    seeds: Sequence[str] = (),
    methods: Sequence[str] = (),
    tier: str = "",
    overrides: Sequence[str] = (),
) -> Frontier:
    """What is asked for, with the defaults of configs/robust.yaml; SrmuError for what is not."""
    preset = experiment.read_preset("robust.yaml")
    asked = {"tier": tier, "in": regimes, "seeds": [*dict.fromkeys(map(int, seeds))]}
    spec = {**preset, **preset["tables"][kind], **{key: value for key, value in asked.items() if value}}
    worlds = [name for name, one in spec["worlds"].items() if one.get(spec["of"])] if world == "both" else [world]
    check_option("--world", worlds, [*spec["worlds"], "both"])
    check_option("--regimes", spec["in"], spec["regimes"])
    check_option("--tier", [spec["tier"]], TIERS)
    require_place(out)
    settings = {one: choose_settings(kind, one, spec) for one in worlds}
    check_option("--methods", methods, [label for each in settings.values() for label in each])
    folder = f"matched-{spec['budget']:g}-{spec['tier']}" + (f"-{kind}" if "attacks" in spec else "")
    experiments = {}
    for one in worlds:
        chosen = {k: v for k, v in settings[one].items() if not methods or k in methods}
        columns = spec["worlds"][one]["columns"].values()
        tasks = tuple(dict.fromkeys(metric.split("/")[0] for metrics in columns for metric in metrics))
        place = Testbeds(out / one, spec["regimes"], "testbed{seed}-{regime}", one)
        how = Attacked(spec, one, folder)
        experiments[one] = Experiment(out / one, place, chosen, tuple(spec["seeds"]), tasks, how, tuple(overrides))
    return Frontier(out, kind, experiments, spec)


def choose_settings(kind: str, world: str, spec: Spec) -> dict[str, tuple[str, ...]]:
    """What each label of a world is run with."""
    own = spec["worlds"][world]
    if kind == "methods":
        if "all_methods" not in own:
            raise SrmuError(f"--world {world}: methods runs on the closed world alone")
        return experiment.read_settings(own["all_methods"])
    methods = {label: (*own["common"], *each) for label, each in own["methods"].items()}
    if kind == "robust":
        return methods
    base = spec["ablated"]
    ablated = (*methods[base], *own.get("ablated", ()))
    return {base: ablated} | {k: (*ablated, *change) for k, change in own["ablations"].items()}


def check_option(option: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    if wrong := [name for name in names if name not in known]:
        raise SrmuError(f"{option} {wrong[0]} does not exist{suggest_word(wrong[0], list(known))}")


# ---- the runs


def measure_frontier(frontier: Frontier, watch: Watch = ignore_progress, *, make: bool = True) -> list[Part]:
    """The rows of each world and regime; makes what is missing, or without `make` runs nothing."""
    spec, parts = frontier.spec, []
    for world, one in frontier.experiments.items():
        assert isinstance(one.place, Testbeds)
        planned = [PlannedRow(label, label, regime) for regime, label in product(spec["in"], one.settings)]
        measured = experiment.run_experiment(one, planned, watch, make=make)
        own = spec["worlds"][world]
        kept = [metric for name in spec["kept"] for metric in own["columns"][name]]
        for regime in spec["in"]:
            rows = [measured[plan] for plan in planned if plan.regime == regime]
            beds = {seed: one.place.locate(regime, seed) for seed in one.seeds}
            title = f"{own['title']}, {spec['regimes'][regime]['title']}"
            parts.append(Part(frontier, world, regime, rows, own["columns"], kept, beds, title))
    return parts


def frontier_needs(frontier: Frontier) -> tuple[dict[str, int], str]:
    """What is to be built and run, in numbers and in a line."""
    parts = measure_frontier(frontier, make=False)
    rows = [row for part in parts for row in part.rows]
    beds = {folder for part in parts for folder in part.testbeds.values() if not (folder / "testbed.json").exists()}
    missing = sum(row.missing for row in rows)
    return {"testbeds": len(beds), "runs": missing}, (
        f"{len(beds)} testbeds to build, some minutes each where none was built before, "
        f"and {missing} of {len(rows) * len(frontier.spec['seeds'])} runs to make, a minute or more each with attacks "
        f"of tier {frontier.spec['tier']}; nothing is fetched"
    )


@dataclass(frozen=True)
class Attacked(experiment.Scored):
    """A run is made, brought to one loss of utility, scored and attacked, beside its controls.

    Numbers are of the largest share of the run's change that costs at most the budget of the mean accuracy on what is
    judged; they lie in `folder` beside the runs.
    """

    spec: Spec
    world: str
    folder: str

    def locate_result(self, run: Path) -> Path:
        return run.parents[1] / self.folder / run.name

    def find_result(self, job: RunJob) -> Path | None:
        """The folder, if it is complete: every attack of the tier included."""
        out = self.locate_result(experiment.locate_run(job))
        folders = (out, *(locate_control(out, job.config.parent, who) for who in CONTROLS))
        wanted = {*select_attacks(self.spec["tier"], self.spec.get("attacks", ()))}
        tried = wanted <= {*read_attacks(out).get("attacks", ())}
        return out if tried and all("texts" in load_results(each) for each in folders) else None

    def measure_run(self, job: RunJob, watch: Watch = ignore_progress) -> Path:
        whole = Run.open(super().measure_run(job, watch))
        out = self.locate_result(whole.folder)
        match_utility(whole, out, self.spec["budget"], self.spec["judged"])
        run = Run.open(out)
        score_model(run, job.tasks)
        self.read_texts(run, job.config.parent, out)
        for who, model in zip(CONTROLS, (run.base, run.base.parent / "oracle"), strict=True):
            control = locate_control(out, job.config.parent, who)
            if "texts" not in load_results(control):
                control.mkdir(parents=True, exist_ok=True)
                score_model(model, job.tasks, tasks_dir=run.config.tasks_dir, out=control)
                self.read_texts(model, job.config.parent, control)
        asked = Sources(tasks=tuple(self.spec["worlds"][self.world]["attacked"].values()), limit=10_000)
        attack_run(run, tier=self.spec["tier"], names=self.spec.get("attacks", ()), sources=asked)
        return out

    def read_texts(self, target: Path | Run, testbed: Path, out: Path) -> None:
        """Keep what a token of each kind of text costs a model or a run, in nats."""
        opened, nats = open_target(target, "cpu"), {}
        with opened.after() as module:
            subject = Subject(module, opened.tokenizer)
            for kind, name in self.spec["texts"].items():
                texts = sources.read_texts([sources.Source(path=str(testbed / name))])
                tokens = [subject.tokens(text)[: Utility.length] for text in texts[: Utility.count]]
                nats[kind] = measure_texts(subject, tokens, 0)["nats a neutral token"].value
        merge_results(out, texts=nats)


def locate_control(result: Path, testbed: Path, who: str) -> Path:
    """Where the numbers of a testbed's original or oracle are, beside a run's result."""
    return result.parents[1] / "controls" / testbed.name / who


# ---- tables


def build_frontier_tables(frontier: Frontier, measured: Sequence[Part], command: str) -> dict[str, Any]:
    """All rows in numbers: what `robust.json` holds."""
    spec, parts = frontier.spec, []
    for part in measured:
        rows = [*build_control_rows(part), *(build_row(part, row) for row in part.rows)]
        base = next((row["seconds"] for row in rows if row["label"] == spec["cost"] and "seconds" in row), None)
        rows = [row | {"times": row["seconds"] / base} if base and "seconds" in row else row for row in rows]
        head = {"world": part.world, "regime": part.regime, "title": part.title, "columns": [*part.columns]}
        parts.append(head | {"rows": rows})
    return {
        "kind": frontier.kind,
        "command": command,
        **{key: spec[key] for key in ("tier", "budget", "seeds", "kept", "cost")},
        "texts": list(spec["texts"]),
        "parts": parts,
    }


def write_frontier_reports(frontier: Frontier, measured: Sequence[Part], study: Mapping[str, Any]) -> list[Path]:
    """A page a world and regime: its tables, and its runs as they were attacked, with their recovery."""
    paths = []
    for part, tables in zip(measured, study["parts"], strict=True):
        if groups := [RunGroup(row.label, "", row.runs) for row in part.rows if not row.why]:
            forget = [metric for each in part.columns.values() for metric in each if metric not in part.kept]
            page = make_runs_page(groups, forget, part.kept, study["command"], part.title)
            page = replace(page, sections=[frontier_section(study, tables), *page.sections])
            paths.append(page.write(frontier.out / f"{frontier.kind}-{part.world}-{part.regime}.html"))
    return paths


# ---- rows


def build_row(part: Part, row: MeasuredRow) -> dict[str, Any]:
    """A method's numbers: estimates over facts and testbeds, and what it cost."""
    if row.why:
        return {"label": row.label, "why": row.why}
    records = [Run(run).record for run in row.runs]
    whole = replace(row, runs=tuple(run.parents[1] / "runs" / run.name for run in row.runs))
    return build_answers(part, row, [read_attacks(run) for run in row.runs]) | {
        "share": fmean(load_results(run)["matched"]["share"] for run in row.runs),
        "seconds": fmean(record["seconds"] for record in records),
        "megabytes": fmean(record["memory"]["peak"] - record["memory"]["before"] for record in records) / 1e6,
        "whole": estimate_cells(whole, part.columns),
    }


def build_control_rows(part: Part) -> list[dict[str, Any]]:
    """The rows of the original and the oracle; none without a run that has them."""
    known: dict[int, Path] = {}  # by seed, a run that was attacked beside them
    for row in part.rows:
        for seed, run in zip(row.questions, row.runs, strict=True):
            known.setdefault(seed, run)
    found = []
    for who in CONTROLS if known else ():
        folders = tuple(locate_control(run, part.testbeds[seed], who) for seed, run in known.items())
        reports = [view_control(read_attacks(run), who) for run in known.values()]
        found.append(build_answers(part, MeasuredRow(who, folders, tuple(known)), reports))
    return found


def view_control(report: Report, who: str) -> dict[str, Any]:
    """A run's attacks as if the control had been attacked alone; those that count for the run count."""
    attacks = {
        name: entry | entry["controls"][who]
        for name, entry in report["attacks"].items()
        if "right" in entry.get("controls", {}).get(who, {})
    }
    return {**report, "attacks": attacks}


def build_answers(part: Part, row: MeasuredRow, reports: Sequence[Report]) -> dict[str, Any]:
    """What a row's models answer, plainly and under attack, and what a token of texts costs."""
    nats = [load_results(run)["texts"] for run in row.runs]
    return {
        "label": row.label,
        "cells": {name: estimate_mean(row, metrics) for name, metrics in part.columns.items()},
        "kept": estimate_mean(row, part.kept),
        "perplexity": {kind: exp(fmean(n[kind] for n in nats)) for kind in part.frontier.spec["texts"]},
        **estimate_residuals(part, row, reports),
        "attacks": average_attacks(reports),
    }


def estimate_mean(row: MeasuredRow, metrics: Sequence[str]) -> dict[str, float]:
    draws = Draws()
    return format_interval(draws.estimate(resample_mean(row, metrics, draws), clip=(0, 1)))


# ---- what attacks find


def estimate_residuals(part: Part, row: MeasuredRow, reports: Sequence[Report]) -> dict[str, Any]:
    """K* over facts and testbeds under all attacks; of each kind of questions too, where several are asked."""
    kinds = part.frontier.spec["worlds"][part.world]["attacked"]
    slices: dict[str, list[slice]] = {name: [] for name in kinds}
    for seed in row.questions:
        folder, end = part.testbeds[seed] / "tasks", 0
        for name, task in kinds.items():  # an attack asks one task after the other
            start, end = end, end + len(load_task(task, folder))
            slices[name].append(slice(start, end))
    seeds = row.questions
    found: dict[str, Any] = {"K*": estimate_residual(reports, seeds, [slice(None)] * len(seeds))}
    if len(kinds) > 1:
        found["kinds"] = {
            name: estimate_residual(reports, seeds, own)
            for name, own in slices.items()
            if all(len({*report["facts"][some]}) >= LEAST for report, some in zip(reports, own, strict=True))
        }
    return found


def estimate_residual(reports: Sequence[Report], seeds: Sequence[int], slices: Sequence[slice]) -> dict[str, float]:
    """K* of some of the questions of each report."""
    draws = Draws()
    values = []
    for report, seed, some in zip(reports, seeds, slices, strict=True):
        facts = [(seed, fact) for fact in report["facts"][some]]
        means = draws.means(residual_table(report)[some], facts)
        values.append(worst_case(means, report["chance"], draw_floors(report, draws, seed)))
    return format_interval(draws.estimate(np.stack(values, axis=1), clip=(0, 1)))


def average_attacks(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """The mean accuracy and share of the knowledge that each attack reaches; `valid`: whether K* counts it."""
    found = {}
    for name in dict.fromkeys(name for report in reports for name in report["attacks"]):
        entries = [report["attacks"].get(name, {}) for report in reports]
        if all("accuracy" in entry for entry in entries):
            values = [entry["accuracy"]["value"] for entry in entries]
            shares = map(attack_share, reports, entries)
            valid = all(entry.get("valid") is not False for entry in entries)
            found[name] = {"accuracy": fmean(values), "share": fmean(shares), "valid": valid}
    return found
