"""The tables of a frontier: what is left at one loss of utility, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from srmu.attacks.summary import CONTROLS
from srmu.evals.matched import load_task
from srmu.evals.results import load_results, read_attacks
from srmu.evals.statistics import LEAST, Draws, residual_table, worst_case
from srmu.report.build import write_runs_page
from srmu.report.results import RunGroup
from srmu.reproduce.claims import estimate_cells, format_interval, resample_mean
from srmu.reproduce.experiment import MeasuredRow, PlannedRow, Scored, read_experiment
from srmu.reproduce.robust import Frontier, Rows, choose_settings, locate_control
from srmu.runs.run import Run

Report = Mapping[str, Any]  # what attack_run gives


def build_frontier_tables(frontier: Frontier, measured: Rows, command: str) -> dict[str, Any]:
    """All rows in numbers: what `robust.json` holds."""
    spec, parts = frontier.spec, []
    for (world, regime), rows in measured.items():
        seconds = base_seconds(frontier, world, regime)
        parts.append(
            {
                "world": world,
                "regime": regime,
                "title": title_part(frontier, world, regime),
                "columns": [*frontier.columns(world)],
                "rows": [
                    *build_control_rows(frontier, world, regime, rows),
                    *(build_row(frontier, world, regime, row, seconds) for row in rows),
                ],
            }
        )
    return {
        "kind": frontier.kind,
        "command": command,
        "tier": frontier.tier,
        "budget": frontier.budget,
        "seeds": list(frontier.seeds),
        "texts": list(spec["texts"]),
        "kept": spec["kept"],
        "cost": spec["cost"],
        "parts": parts,
    }


def write_frontier_reports(frontier: Frontier, measured: Rows, command: str) -> list[Path]:
    """A page a world and regime on its runs as they were attacked, with their recovery."""
    paths = []
    for (world, regime), rows in measured.items():
        groups = [RunGroup(row.label, "", row.runs) for row in rows if not row.why]
        if not groups:
            continue
        columns = frontier.columns(world)
        utility = [metric for name in frontier.spec["kept"] for metric in columns[name]]
        metrics = [metric for each in columns.values() for metric in each]
        page = write_runs_page(
            groups,
            frontier.out / f"{frontier.kind}-{world}-{regime}.html",
            title=title_part(frontier, world, regime),
            forget_metrics=[metric for metric in metrics if metric not in utility],
            utility_metrics=utility,
            command=command,
        )
        paths.append(page)
    return paths


def title_part(frontier: Frontier, world: str, regime: str) -> str:
    spec = frontier.spec
    return f"{spec['worlds'][world]['title']}, {spec['regimes'][regime]['title']}"


# ---- rows


def build_row(frontier: Frontier, world: str, regime: str, row: MeasuredRow, base: float | None) -> dict[str, Any]:
    """A method's numbers: estimates over facts and testbeds, and what it cost."""
    if row.why:
        return {"label": row.label, "why": row.why}
    records = [Run(run).record for run in row.runs]
    seconds = fmean(record["seconds"] for record in records)
    memory = fmean(record["memory"]["peak"] - record["memory"]["before"] for record in records)
    runs = tuple(run.parents[1] / "runs" / run.name for run in row.runs)
    whole = MeasuredRow(row.label, runs, row.questions)
    shares = [load_results(run)["matched"]["share"] for run in row.runs]
    reports = [read_attacks(run) for run in row.runs]
    return build_answers(frontier, world, regime, row, reports) | {
        "share": fmean(shares),
        "seconds": seconds,
        "times": seconds / base if base else None,
        "megabytes": memory / 1e6,
        "whole": estimate_cells(whole, frontier.columns(world)),
    }


def build_control_rows(
    frontier: Frontier, world: str, regime: str, rows: Sequence[MeasuredRow]
) -> list[dict[str, Any]]:
    """The rows of the original and the oracle; none without a run that has them."""
    known: dict[int, Path] = {}  # by seed, a run that was attacked beside them
    for row in rows:
        for seed, run in zip(row.questions, row.runs, strict=True):
            known.setdefault(seed, run)
    place = frontier.experiments[world].testbeds
    found = []
    for who in CONTROLS if known else ():
        beds = [place.locate(regime, seed) for seed in known]
        folders = tuple(locate_control(frontier.out / world, bed, who) for bed in beds)
        reports = [view_control(read_attacks(run), who) for run in known.values()]
        control = MeasuredRow(who, folders, tuple(known))
        found.append(build_answers(frontier, world, regime, control, reports))
    return found


def view_control(report: Report, who: str) -> dict[str, Any]:
    """A run's attacks as if the control had been attacked alone; those count that count for the
    run."""
    attacks = {
        name: entry | entry["controls"][who]
        for name, entry in report["attacks"].items()
        if "right" in entry.get("controls", {}).get(who, {})
    }
    return {**report, "attacks": attacks}


def build_answers(
    frontier: Frontier, world: str, regime: str, row: MeasuredRow, reports: Sequence[Report]
) -> dict[str, Any]:
    """What a row's models answer, plainly and under attack, and what a token of texts costs."""
    columns = frontier.columns(world)
    kept = [metric for name in frontier.spec["kept"] for metric in columns[name]]
    nats = [load_results(run)["texts"] for run in row.runs]
    return {
        "label": row.label,
        "cells": {name: estimate_mean(row, metrics) for name, metrics in columns.items()},
        "kept": estimate_mean(row, kept),
        "perplexity": {kind: exp(fmean(n[kind] for n in nats)) for kind in frontier.spec["texts"]},
        **estimate_residuals(frontier, world, regime, row, reports),
        "attacks": average_attacks(reports),
    }


def estimate_mean(row: MeasuredRow, metrics: Sequence[str]) -> dict[str, float]:
    draws = Draws()
    return format_interval(draws.estimate(resample_mean(row, metrics, draws), clip=(0, 1)))


def base_seconds(frontier: Frontier, world: str, regime: str) -> float | None:
    """Seconds of the method that the others' are divided by; None where it was not run here."""
    whose = frontier.spec["cost"]
    experiment = replace(
        frontier.experiments[world], settings=choose_settings("robust", world, frontier.spec), measurement=Scored()
    )
    (row,) = read_experiment(experiment, [PlannedRow(whose, whose, regime)]).values()
    return fmean(Run(run).record["seconds"] for run in row.runs) if row.runs else None


# ---- what attacks find


def estimate_residuals(
    frontier: Frontier, world: str, regime: str, row: MeasuredRow, reports: Sequence[Report]
) -> dict[str, Any]:
    """K* over facts and testbeds, of the answers under all attacks; of each kind of questions too,
    where several are asked."""
    kinds = frontier.spec["worlds"][world]["attacked"]
    place = frontier.experiments[world].testbeds
    parts: dict[str, list[slice]] = {name: [] for name in kinds}
    for seed in row.questions:
        folder = str(place.locate(regime, seed) / "tasks")
        end = 0
        for name, task in kinds.items():  # an attack asks one task after the other
            start, end = end, end + len(load_task(task, folder))
            parts[name].append(slice(start, end))
    seeds = row.questions
    found: dict[str, Any] = {"K*": estimate_residual(reports, seeds, [slice(None)] * len(seeds))}
    if len(kinds) > 1:
        found["kinds"] = {
            name: estimate_residual(reports, seeds, slices)
            for name, slices in parts.items()
            if all(len({*r["facts"][s]}) >= LEAST for r, s in zip(reports, slices, strict=True))
        }
    return found


def estimate_residual(reports: Sequence[Report], seeds: Sequence[int], slices: Sequence[slice]) -> dict[str, float]:
    """K* of some of the questions of each report."""
    draws = Draws()
    values = []
    for report, seed, part in zip(reports, seeds, slices, strict=True):
        facts = [(seed, fact) for fact in report["facts"][part]]
        means = draws.means(residual_table(report)[part], facts)
        values.append(worst_case(means, report["chance"]))
    return format_interval(draws.estimate(np.stack(values, axis=1), clip=(0, 1)))


def average_attacks(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """Of each attack the accuracy it reaches and the share of the knowledge that is, means over
    testbeds; `valid` is false where the oracle recovers, too: K* does not count it."""
    found = {}
    for name in dict.fromkeys(name for report in reports for name in report["attacks"]):
        entries = [report["attacks"].get(name, {}) for report in reports]
        if not all("accuracy" in entry for entry in entries):
            continue
        values = [entry["accuracy"]["value"] for entry in entries]
        shares = [
            float(worst_case(np.array([r["original"]["accuracy"]["value"], value]), r["chance"]))
            for value, r in zip(values, reports, strict=True)
        ]
        valid = all(entry.get("valid") is not False for entry in entries)
        found[name] = {"accuracy": fmean(values), "share": fmean(shares), "valid": valid}
    return found
