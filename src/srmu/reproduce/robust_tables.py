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
from srmu.report.build import make_runs_page
from srmu.report.markdown import frontier_section
from srmu.report.results import RunGroup
from srmu.reproduce.claims import estimate_cells, format_interval, resample_mean
from srmu.reproduce.experiment import MeasuredRow
from srmu.reproduce.robust import Frontier, Part, locate_control
from srmu.runs.run import Run

Report = Mapping[str, Any]  # what attack_run gives


def build_frontier_tables(frontier: Frontier, measured: Sequence[Part], command: str) -> dict[str, Any]:
    """All rows in numbers: what `robust.json` holds."""
    spec, parts = frontier.spec, []
    for part in measured:
        seconds = base_seconds(part)
        rows = [*build_control_rows(part), *(build_row(part, row, seconds) for row in part.rows)]
        head = {"world": part.world, "regime": part.regime, "title": part.title, "columns": [*part.columns]}
        parts.append(head | {"rows": rows})
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


def write_frontier_reports(frontier: Frontier, measured: Sequence[Part], study: Mapping[str, Any]) -> list[Path]:
    """A page a world and regime: its tables, and its runs as they were attacked, with their recovery."""
    paths = []
    for part, tables in zip(measured, study["parts"], strict=True):
        if groups := [RunGroup(row.label, "", row.runs) for row in part.rows if not row.why]:
            metrics = [metric for each in part.columns.values() for metric in each]
            page = make_runs_page(
                groups,
                forget=[metric for metric in metrics if metric not in part.kept],
                utility=part.kept,
                command=study["command"],
                title=part.title,
            )
            page = replace(page, sections=[frontier_section(study, tables), *page.sections])
            paths.append(page.write(frontier.out / f"{frontier.kind}-{part.world}-{part.regime}.html"))
    return paths


# ---- rows


def build_row(part: Part, row: MeasuredRow, base: float | None) -> dict[str, Any]:
    """A method's numbers: estimates over facts and testbeds, and what it cost."""
    if row.why:
        return {"label": row.label, "why": row.why}
    records = [Run(run).record for run in row.runs]
    seconds = fmean(record["seconds"] for record in records)
    whole = replace(row, runs=tuple(run.parents[1] / "runs" / run.name for run in row.runs))
    return build_answers(part, row, [read_attacks(run) for run in row.runs]) | {
        "share": fmean(load_results(run)["matched"]["share"] for run in row.runs),
        "seconds": seconds,
        "times": seconds / base if base else None,
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
    """A run's attacks as if the control had been attacked alone; those count that count for the
    run."""
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


def base_seconds(part: Part) -> float | None:
    """Seconds of the method that the others' are divided by; None where it is not in this table."""
    runs = next((row.runs for row in part.rows if row.label == part.frontier.spec["cost"]), ())
    return fmean(Run(run).record["seconds"] for run in runs) if runs else None


def estimate_mean(row: MeasuredRow, metrics: Sequence[str]) -> dict[str, float]:
    draws = Draws()
    return format_interval(draws.estimate(resample_mean(row, metrics, draws), clip=(0, 1)))


# ---- what attacks find


def estimate_residuals(part: Part, row: MeasuredRow, reports: Sequence[Report]) -> dict[str, Any]:
    """K* over facts and testbeds, of the answers under all attacks; of each kind of questions too,
    where several are asked."""
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
        values.append(worst_case(means, report["chance"]))
    return format_interval(draws.estimate(np.stack(values, axis=1), clip=(0, 1)))


def average_attacks(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """Of each attack the accuracy it reaches and the share of the knowledge that is, means over
    testbeds; `valid` is false where the oracle recovers, too: K* does not count it."""
    found = {}
    for name in dict.fromkeys(name for report in reports for name in report["attacks"]):
        entries = [report["attacks"].get(name, {}) for report in reports]
        if all("accuracy" in entry for entry in entries):
            values = [entry["accuracy"]["value"] for entry in entries]
            known = [report["original"]["accuracy"]["value"] for report in reports]
            shares = [worst_case(np.array(pair), r["chance"]) for *pair, r in zip(known, values, reports, strict=True)]
            valid = all(entry.get("valid") is not False for entry in entries)
            found[name] = {"accuracy": fmean(values), "share": fmean(map(float, shares)), "valid": valid}
    return found
