"""What stays gone, and what it costs: methods at one loss of utility under attack, two worlds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from srmu.attacks.suite import TIERS, Sources, attack_run, select_attacks
from srmu.attacks.summary import CONTROLS
from srmu.attacks.utility import COUNT, LENGTH, measure_texts
from srmu.data import sources
from srmu.engine import weights
from srmu.engine.files import require_place
from srmu.engine.loading import load_module
from srmu.engine.progress import Watch, ignore_progress, silence_libraries
from srmu.errors import DivergedError, SrmuError, first_line, suggest_word
from srmu.evals.matched import load_task, match_utility
from srmu.evals.parallel import RunJob, run_all, run_one
from srmu.evals.results import load_results, merge_results, read_attacks
from srmu.evals.score import score_model
from srmu.evals.statistics import (
    LEAST,
    Array,
    Draws,
    parse_answers,
    residual_table,
    worst_case,
)
from srmu.evals.subject import Subject
from srmu.report.build import write_runs_page
from srmu.report.results import RunGroup
from srmu.reproduce.claims import ClaimLine, interval_of, mean_cell, resample_mean
from srmu.reproduce.runs import existing_run, preset_file
from srmu.runs.config import build_config, load_config
from srmu.runs.run import Run, load_tokenizer, plan_run, run_folder
from srmu.testbed.build import build_testbed

NOT_RUN = "not run"

Report = Mapping[str, Any]  # what `attack_run` gives


@dataclass(frozen=True)
class Frontier:
    """What is asked for: `kind` names a list of each world in configs/robust.yaml."""

    out: Path
    kind: str
    worlds: tuple[str, ...]
    regimes: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    tier: str
    overrides: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, world: str) -> dict[str, tuple[str, ...]]:
        """What each label of a world is run with."""
        given = self.spec["worlds"][world]
        methods = {label: (*given["common"], *each) for label, each in given["methods"].items()}
        if self.kind == "robust":
            return methods
        base = self.spec["ablated"]
        own = (*methods[base], *given.get("ablated", ()))
        return {base: own} | {k: (*own, *v) for k, v in given["ablations"].items()}

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks by name; (): all of the tier."""
        return tuple(self.spec.get("attacks", {}).get(self.kind, ()))

    @property
    def tried(self) -> str:
        """A name for what the runs are attacked with."""
        return f"{self.tier}-{self.kind}" if self.attacks else self.tier

    def labels(self, world: str) -> list[str]:
        return [k for k in self.settings(world) if not self.methods or k in self.methods]

    def testbed(self, world: str, regime: str, seed: int) -> Path:
        return self.out / world / f"testbed{seed}-{regime}"

    def columns(self, world: str) -> dict[str, list[str]]:
        return self.spec["worlds"][world]["columns"]

    def parts(self) -> Iterator[tuple[str, str]]:
        return product(self.worlds, self.regimes)


class Case(NamedTuple):
    """A run to be made, brought to the budget and attacked; `out` is where that is written."""

    job: RunJob
    out: Path
    budget: float
    judged: tuple[str, ...]
    attacked: tuple[str, ...]  # tasks that ask for what is to go
    texts: Mapping[str, str]
    tier: str
    attacks: tuple[str, ...] = ()  # these alone, where they are named


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
    spec: Mapping[str, Any] | None = None,
) -> Frontier:
    """What is asked for, with the defaults of configs/robust.yaml; SrmuError for what is not."""
    spec = spec or yaml.safe_load(preset_file("robust.yaml").read_text(encoding="utf-8"))
    listed = "ablations" if kind == "ablations" else "methods"
    some = [one for one, each in spec["worlds"].items() if each[listed]]
    worlds = some if world == "both" else [world]
    check_option("--world", worlds, [*spec["worlds"], "both"])
    regimes = regimes or spec["runs"][kind]
    check_option("--regimes", regimes, spec["regimes"])
    check_option("--tier", [tier or spec["tier"]], TIERS)
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise SrmuError(f"--seeds {wrong[0]}: name the seeds of the testbeds, 1,2,3")
    topics = {"organism": {"forget": "forget.jsonl"}}
    build_config({"model": "model", "method": "srmu", "topics": topics}, overrides)
    require_place(out)
    numbers = tuple(dict.fromkeys(map(int, seeds))) or tuple(spec["seeds"])
    found = Frontier(
        out, kind, tuple(worlds), tuple(regimes), numbers, tuple(methods), tier or spec["tier"],
        tuple(overrides), spec,
    )  # fmt: skip
    if kind == "ablations":
        for one in worlds:
            check_option(
                "configs/robust.yaml, ablated:", [spec["ablated"]], spec["worlds"][one]["methods"]
            )
    check_option("--methods", methods, [label for one in worlds for label in found.settings(one)])
    return found


def check_option(
    option: str, given: Sequence[str], known: Sequence[str] | Mapping[str, Any]
) -> None:
    if wrong := [name for name in given if name not in known]:
        raise SrmuError(f"{option} {wrong[0]} does not exist{suggest_word(wrong[0], list(known))}")


# ---- the runs


def measure_frontier(
    frontier: Frontier, watch: Watch = ignore_progress
) -> dict[tuple[str, str, str], list[Any]]:
    """Make what is missing: by world, regime and label what came of each seed.

    A folder with all its numbers, or why there is none. What is there is not made again.
    """
    for (world, regime), seed in product(frontier.parts(), frontier.seeds):
        folder = frontier.testbed(world, regime, seed)
        if not (folder / "organism.json").exists():
            share = frontier.spec["regimes"][regime]["entanglement"]
            build_testbed(
                folder, seed=seed, entanglement=share, oracle=True, world=world, watch=watch
            )
    cases, found = case_states(frontier)
    missing = [key for key, state in found.items() if state == NOT_RUN and key in cases]
    # the first of each testbed before the others: its controls are kept for them
    first = {(key[0], key[3]): key for key in reversed(missing)}
    order = [*reversed(first.values()), *(key for key in missing if key not in first.values())]
    if order:
        made = run_all([cases[key] for key in order], watch, measure_case)
        found |= dict(zip(order, made, strict=True))
    return by_label(frontier, found)


def read_frontier(frontier: Frontier) -> dict[tuple[str, str, str], list[Any]]:
    """What is there already, as `measure` gives it; runs nothing."""
    return by_label(frontier, case_states(frontier)[1])


def frontier_needs(frontier: Frontier) -> tuple[dict[str, int], str]:
    """What is to be built and run, in numbers and in a line."""
    found = case_states(frontier)[1]
    beds = [frontier.testbed(*part, seed) for part in frontier.parts() for seed in frontier.seeds]
    counts = {
        "testbeds": sum(not (bed / "organism.json").exists() for bed in beds),
        "runs": sum(state == NOT_RUN for state in found.values()),
    }
    return counts, (
        f"{counts['testbeds']} testbeds to build, some minutes each where none was built before, "
        f"and {counts['runs']} of {len(found)} runs to make, a minute or more each with attacks of "
        f"tier {frontier.tier}; nothing is fetched"
    )


def by_label(
    frontier: Frontier, found: Mapping[tuple[str, str, str, int], Any]
) -> dict[tuple[str, str, str], list[Any]]:
    return {
        (world, regime, label): [found[world, regime, label, seed] for seed in frontier.seeds]
        for world, regime in frontier.parts()
        for label in frontier.labels(world)
    }


def case_states(frontier: Frontier) -> tuple[dict[Any, Case], dict[Any, Path | str]]:
    """All cases, and what is there of each: its folder, or why there is none."""
    cases: dict[Any, Case] = {}
    found: dict[Any, Path | str] = {}
    for world, regime in frontier.parts():
        for label, seed in product(frontier.labels(world), frontier.seeds):
            key = (world, regime, label, seed)
            found[key] = NOT_RUN
            if not (frontier.testbed(world, regime, seed) / "organism.json").exists():
                continue
            try:
                cases[key] = case_of(frontier, *key)
                if is_done(cases[key]):
                    found[key] = cases[key].out
                elif existing_run(cases[key].job) == "diverged":
                    found[key] = "diverged"
            except SrmuError as error:
                found[key] = f"failed: {error}"
    return cases, found


def case_of(frontier: Frontier, world: str, regime: str, label: str, seed: int) -> Case:
    spec, folder = frontier.spec, frontier.testbed(world, regime, seed).resolve()
    home = (frontier.out / world).resolve()
    settings = [s.replace("{testbed}", str(folder)) for s in frontier.settings(world)[label]]
    own = (f"seed={seed}", f"runs_dir={home / 'runs'}")
    tasks = dict.fromkeys(
        metric.split("/")[0] for each in frontier.columns(world).values() for metric in each
    )
    config = folder / spec["regimes"][regime]["config"]
    job = RunJob(config, (*settings, *own, *frontier.overrides), tuple(tasks))
    run = run_folder(plan_run(load_config(job.config, job.overrides))[0])
    return Case(
        job,
        home / f"matched-{spec['budget']:g}-{frontier.tried}" / run.name,
        spec["budget"],
        tuple(spec["judged"]),
        tuple(spec["worlds"][world]["attacked"].values()),
        {kind: str(folder / name) for kind, name in spec["texts"].items()},
        frontier.tier,
        frontier.attacks,
    )


def is_done(case: Case) -> bool:
    """Whether all is there: every attack of the tier, too."""
    wanted = {*select_attacks(case.tier, case.attacks)}  # type: ignore[arg-type]
    measured = [case.out, *(controls_of(case) / who for who in CONTROLS)]
    tried = wanted <= {*read_attacks(case.out).get("attacks", ())}
    return tried and all("texts" in load_results(folder) for folder in measured)


def controls_of(case: Case) -> Path:
    """Where the numbers of the testbed's original and oracle are."""
    return case.out.parents[1] / "controls" / case.job.config.parent.name


def measure_case(case: Case) -> Path | str:
    """The folder of a case with all its numbers; or why there is none."""
    torch.set_num_threads(1)
    silence_libraries()
    try:
        whole = Run.open(run_one(case.job))
        match_utility(whole, case.out, case.budget, case.judged)
        run = Run.open(case.out)
        score_model(run, case.job.tasks)
        examine_run(run, case)
        examine_controls(run, case)
        sources = Sources(tasks=case.attacked, limit=10_000)
        attack_run(run, tier=case.tier, names=case.attacks, sources=sources)  # type: ignore[arg-type]
        return case.out
    except DivergedError:
        return "diverged"
    except SrmuError as error:
        return f"failed: {error}"
    except Exception as error:  # a fault of one method must not cost the rows of the others
        return f"failed: {type(error).__name__}: {first_line(error)}"


def examine_run(run: Run, case: Case) -> None:
    module = load_module(run.base)
    method = run.config.method
    with method.at_inference(module, partial(weights.apply_delta, module, run.base, run.delta)):
        examine_subject(Subject(module, load_tokenizer(run.base)), run.folder, case)


def examine_controls(run: Run, case: Case) -> None:
    """The same numbers of the original and the oracle, once a testbed."""
    for who, folder in (("original", run.base), ("oracle", run.base.parent / "oracle")):
        out = controls_of(case) / who
        if "texts" not in load_results(out):
            out.mkdir(parents=True, exist_ok=True)
            score_model(folder, case.job.tasks, tasks_dir=run.config.tasks_dir, out=out)
            examine_subject(Subject(load_module(folder), load_tokenizer(folder)), out, case)


def examine_subject(subject: Subject, out: Path, case: Case) -> None:
    """Keep what a token of each kind of text costs a model, in nats."""
    nats = {}
    for kind, name in case.texts.items():
        texts = sources.read_texts([sources.Source(path=name)], Path())[:COUNT]
        rows = [subject.tokens(text)[:LENGTH] for text in texts]
        nats[kind] = measure_texts(subject, rows, 0)["nats a neutral token"].value
    merge_results(out, texts=nats)


# ---- the tables


def tables_of(
    frontier: Frontier, found: Mapping[tuple[str, str, str], Sequence[Any]], command: str
) -> dict[str, Any]:
    """All rows in numbers: what `robust.json` holds."""
    parts = []
    for world, regime in frontier.parts():
        lines = {
            label: frontier_line(frontier, label, found[world, regime, label])
            for label in frontier.labels(world)
        }
        base = seconds_of(frontier, world, regime)
        spec = frontier.spec
        title = f"{spec['worlds'][world]['title']}, {spec['regimes'][regime]['title']}"
        rows = [row_of(frontier, world, regime, line, base) for line in lines.values()]
        rows = [*control_rows(frontier, world, regime, lines.values()), *rows]
        columns = [*frontier.columns(world)]
        parts.append(
            {"world": world, "regime": regime, "title": title, "columns": columns, "rows": rows}
        )
    return {
        "kind": frontier.kind,
        "command": command,
        "tier": frontier.tier,
        "budget": frontier.spec["budget"],
        "seeds": list(frontier.seeds),
        "texts": list(frontier.spec["texts"]),
        "kept": frontier.spec["kept"],
        "cost": frontier.spec["cost"],
        "parts": parts,
    }


def frontier_line(frontier: Frontier, label: str, states: Sequence[Path | str]) -> ClaimLine:
    """A row's folders; while not all are there the label says how many are."""
    some = [(path, s) for path, s in zip(states, frontier.seeds, strict=True) if path != NOT_RUN]
    wrong = [state for state, _ in some if isinstance(state, str)]
    if wrong or not some:
        why = f"{wrong[0]} in {len(wrong)} of {len(some)} runs" if wrong else NOT_RUN
        return ClaimLine(label, (), (), why=why.replace(f"{frontier.out.resolve()}/", ""))
    if len(some) < len(states):
        label = f"{label} ({len(some)} of {len(states)})"
    runs = tuple(Path(path) for path, _ in some)
    return ClaimLine(label, runs, tuple(seed for _, seed in some))


def seconds_of(frontier: Frontier, world: str, regime: str) -> float | None:
    """What a run of the method takes that cost is told by; None where it was not run here."""
    whose = frontier.spec["cost"]
    here = {"kind": "robust", "worlds": (world,), "regimes": (regime,), "methods": (whose,)}
    _, found = case_states(Frontier(**vars(frontier) | here))
    made = [path for path in found.values() if isinstance(path, Path)]
    return fmean(Run(path).record["seconds"] for path in made) if made else None


def row_of(
    frontier: Frontier, world: str, regime: str, line: ClaimLine, base: float | None
) -> dict[str, Any]:
    """A method's numbers: estimates over facts and testbeds, and what it cost."""
    if line.why:
        return {"label": line.label, "why": line.why}
    reports = reports_of(line)
    records = [Run(run).record for run in line.runs]
    seconds = fmean(r["seconds"] for r in records)
    memory = fmean(r["memory"]["peak"] - r["memory"]["before"] for r in records)
    whole = tuple(run.parents[1] / "runs" / run.name for run in line.runs)
    columns = frontier.columns(world)
    shares = [load_results(run)["matched"]["share"] for run in line.runs]
    tables = [residual_table(report) for report in reports]
    left = estimate_residuals(frontier, world, regime, reports, tables, line.asked)
    return answers_row(frontier, world, line) | {
        "share": fmean(shares),
        **left,
        "attacks": by_attack(reports, "unlearned"),
        "seconds": seconds,
        "times": seconds / base if base else None,
        "megabytes": memory / 1e6,
        "whole": {
            k: mean_cell(ClaimLine(line.label, whole, line.asked), m) for k, m in columns.items()
        },
    }


def reports_of(line: ClaimLine) -> list[dict[str, Any]]:
    return [read_attacks(run) for run in line.runs]


def control_rows(frontier: Frontier, world: str, regime: str, lines: Any) -> list[dict[str, Any]]:
    """The rows of the original and the oracle; none where no run is there to tell of them."""
    known: dict[int, Path] = {}  # by seed, a run that was attacked beside them
    for line in lines:
        for seed, run in zip(line.asked, line.runs, strict=True):
            known.setdefault(seed, run)
    rows = []
    for who in CONTROLS if known else ():
        reports = reports_of(ClaimLine(who, tuple(known.values()), tuple(known)))
        folders = tuple(
            run.parents[1] / "controls" / frontier.testbed(world, regime, seed).name / who
            for seed, run in known.items()
        )
        tables = [control_residuals(report, who) for report in reports]
        rows.append(
            answers_row(frontier, world, ClaimLine(who, folders, tuple(known)))
            | estimate_residuals(frontier, world, regime, reports, tables, tuple(known))
            | {"attacks": by_attack(reports, who)}
        )
    return rows


def answers_row(frontier: Frontier, world: str, line: ClaimLine) -> dict[str, Any]:
    """What a row's models answer, and what a token of texts costs them."""
    columns = frontier.columns(world)
    kept = [metric for name in frontier.spec["kept"] for metric in columns[name]]
    nats = [load_results(run)["texts"] for run in line.runs]
    return {
        "label": line.label,
        "cells": {name: estimate_line(line, metrics) for name, metrics in columns.items()},
        "kept": estimate_line(line, kept),
        "perplexity": {kind: exp(fmean(n[kind] for n in nats)) for kind in frontier.spec["texts"]},
    }


def estimate_line(line: ClaimLine, metrics: Sequence[str]) -> dict[str, float]:
    draws = Draws()
    return interval_of(draws.estimate(resample_mean(line, metrics, draws), clip=(0, 1)))


def estimate_residuals(
    frontier: Frontier,
    world: str,
    regime: str,
    reports: Sequence[Report],
    tables: Sequence[Array],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """K* over facts and testbeds, of the answers under all attacks; of each kind of questions too,
    where several are asked."""
    kinds = frontier.spec["worlds"][world]["attacked"]
    parts: dict[str, list[slice]] = {name: [] for name in kinds}
    for seed in seeds:
        folder = str(frontier.testbed(world, regime, seed) / "tasks")
        end = 0
        for name, task in kinds.items():  # an attack asks one task after the other
            start, end = end, end + len(load_task(task, folder))
            parts[name].append(slice(start, end))
    whole = [slice(None)] * len(seeds)
    found: dict[str, Any] = {"K*": residual_of(reports, tables, seeds, whole)}
    if len(kinds) > 1:
        found["kinds"] = {
            name: residual_of(reports, tables, seeds, those)
            for name, those in parts.items()
            if all(len({*r["facts"][p]}) >= LEAST for r, p in zip(reports, those, strict=True))
        }
    return found


def residual_of(
    reports: Sequence[Report],
    tables: Sequence[Array],
    seeds: Sequence[int],
    parts: Sequence[slice],
) -> dict[str, float]:
    draws = Draws()
    values = [
        worst_case(
            draws.means(table[part], [(seed, f) for f in report["facts"][part]]), report["chance"]
        )
        for report, table, seed, part in zip(reports, tables, seeds, parts, strict=True)
    ]
    return interval_of(draws.estimate(np.stack(values, axis=1), clip=(0, 1)))


def write_frontier_reports(
    frontier: Frontier, found: Mapping[tuple[str, str, str], Sequence[Any]], command: str
) -> list[Path]:
    """A page a world and regime on its runs as they were attacked, with their recovery."""
    paths = []
    for world, regime in frontier.parts():
        lines = [
            frontier_line(frontier, label, found[world, regime, label])
            for label in frontier.labels(world)
        ]
        entries = [RunGroup(line.label, "", line.runs) for line in lines if not line.why]
        if not entries:
            continue
        columns, keep = frontier.columns(world), frontier.spec["kept"]
        utility = [metric for name in keep for metric in columns[name]]
        every = [metric for metrics in columns.values() for metric in metrics]
        title = frontier.spec["worlds"][world]["title"]
        paths.append(
            write_runs_page(
                entries,
                frontier.out / f"{frontier.kind}-{world}-{regime}.html",
                title=f"{title}, {frontier.spec['regimes'][regime]['title']}",
                forget_metrics=[metric for metric in every if metric not in utility],
                utility_metrics=utility,
                command=command,
            )
        )
    return paths


def control_residuals(report: Report, who: str) -> Array:
    """As `residual`, of a control: the attacks that count are those that count for the run."""
    given = [
        parse_answers(entry["controls"][who]["right"])
        for entry in report["attacks"].values()
        if entry["status"] == "done" and entry.get("right") and entry.get("valid") is not False
        if "right" in entry["controls"].get(who, {})
    ]
    return np.stack([parse_answers(report["original"]["right"]), *given], axis=1)


def by_attack(reports: Sequence[Report], who: str) -> dict[str, dict[str, Any]]:
    """Of each attack the accuracy it reaches and the share of the knowledge that is, means over
    testbeds; `valid` is false where the oracle recovers, too: K* does not count it."""
    found = {}
    for name in dict.fromkeys(name for report in reports for name in report["attacks"]):
        entries = [report["attacks"].get(name, {}) for report in reports]
        given = [e if who == "unlearned" else e.get("controls", {}).get(who, {}) for e in entries]
        if not all("accuracy" in entry for entry in given):
            continue
        values = [entry["accuracy"]["value"] for entry in given]
        shares = [
            float(worst_case(np.array([r["original"]["accuracy"]["value"], value]), r["chance"]))
            for value, r in zip(values, reports, strict=True)
        ]
        valid = all(entry.get("valid") is not False for entry in entries)
        found[name] = {"accuracy": fmean(values), "share": fmean(shares), "valid": valid}
    return found
