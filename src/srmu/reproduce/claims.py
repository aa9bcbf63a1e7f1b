"""What measured rows say of a paper's claims: differences with intervals, and verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any
from zlib import crc32

import numpy as np

from srmu.evals.compare import resample_row
from srmu.evals.results import read_metrics
from srmu.evals.statistics import Array, Draws, Estimate
from srmu.report.results import Columns, RunGroup, aggregate_columns
from srmu.reproduce.experiment import MeasuredRow

CHANCE = 0.25  # four options
QUESTIONS = {"MMLU": 14042, "bio": 1273, "cyber": 1987}  # behind the paper's numbers
Claim = Mapping[str, Any]
Spec = Mapping[str, Any]  # what is asked: the columns, and which of them claims call forget and utility
Rows = Mapping[str, MeasuredRow]
Verdict = dict[str, Any]


def resample_mean(row: MeasuredRow, metrics: Sequence[str], draws: Draws) -> Array:
    """The mean of some accuracies as it is, and in each resample of the questions: (1 + RESAMPLES, seeds)."""
    values = []
    for run, asked in zip(row.runs, row.questions, strict=True):
        scores = read_metrics(run)[row.when]
        values.append([resample_row(scores[m], draws, (asked, m), (m, asked, row.when, row.label)) for m in metrics])
    return np.mean(values, axis=1).T


def resample_kind(row: MeasuredRow, spec: Spec, kind: str, draws: Draws) -> Array:
    """The same for the column that `spec` calls "forget" or "utility"."""
    return resample_mean(row, spec["columns"][spec[kind]], draws)


def estimate_cells(row: MeasuredRow, columns: Columns) -> dict[str, dict[str, Any]]:
    """A row's accuracies with their intervals, as in every other table of ours."""
    (numbers,) = aggregate_columns([RunGroup(row.label, "", row.runs)], columns)
    cells = numbers.before if row.when == "before" else numbers.after
    return {name: format_interval(e) for name, e in cells.items()}


def format_interval(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def judge_row(claim: Claim, rows: Rows, spec: Spec, paper: Mapping[str, Mapping[str, float]]) -> Verdict:
    """A claim about how two rows differ in what is to be forgotten or kept, beside the paper's own difference."""
    estimate, draws = None, seed_draws(claim)
    if all(name in rows and rows[name].is_whole for name in claim["of"]):
        one, other = (resample_kind(rows[name], spec, claim["metric"], draws) for name in claim["of"])
        estimate = draws.estimate(one - other)
    first, second = (paper.get(name, {}) for name in claim["of"])
    gap = paper_gap(first, second, "MMLU" if claim["metric"] == "utility" else "WMDP")
    return judge_difference(claim, estimate, gap)


def judge_curves(
    claim: Claim, curves: Mapping[str, Sequence[MeasuredRow]], before: MeasuredRow, spec: Spec
) -> list[Verdict]:
    """A claim about what two curves keep where they have forgotten as much, at each share."""
    verdicts = []
    for percent in claim["at"]:
        draws = seed_draws(claim)
        points = ([row for row in curves.get(name, ()) if row.is_whole] for name in claim["of"])
        one, other = (best_kept(rows, before, spec, percent / 100, draws) for rows in points)
        gap = None if one is None or other is None else draws.estimate(one - other)
        here = {**claim, "claim": f"{claim['claim']}, {percent} %", "above": 0}
        verdicts.append(judge_difference(here, gap, None))
    return verdicts


def best_kept(
    points: Sequence[MeasuredRow], before: MeasuredRow, spec: Spec, share: float, draws: Draws
) -> Array | None:
    """The most that a curve keeps where it has forgotten `share` of what can be, a column a seed.

    Read in each resample anew, in a straight line between the best points that forget more and less, the original model
    among them. None where a seed's curve does not go as far.
    """
    known = resample_kind(before, spec, "forget", draws)
    lost = np.stack([known - known, *(known - resample_kind(p, spec, "forget", draws) for p in points)])
    kept = np.stack([resample_kind(row, spec, "utility", draws) for row in (before, *points)])
    level = share * (known - CHANCE)
    if (lost[:, 0].max(axis=0) < level[0] - 1e-9).any():
        return None
    best_at = np.empty_like(level)
    for place in np.ndindex(level.shape):
        x, y = lost[(slice(None), *place)], kept[(slice(None), *place)]
        order = np.argsort(x)
        best = np.maximum.accumulate(y[order][::-1])[::-1]  # of all that forget as much or more
        best_at[place] = np.interp(level[place], x[order], best)
    return best_at


def seed_draws(claim: Claim) -> Draws:
    """Resamples that depend on the claim alone, not on what was judged before."""
    return Draws(crc32(json.dumps(claim, sort_keys=True).encode()))


def judge_difference(claim: Claim, estimate: Estimate | None, paper: Mapping[str, float] | None) -> Verdict:
    """What is found of a claim; `paper` is what `paper_gap` gives."""
    return {
        "claim": claim["claim"],
        "verdict": judge_interval(estimate, claim.get("above", -inf) / 100, claim.get("below", inf) / 100),
        "difference": format_interval(estimate) if estimate else None,
        "paper": paper,
    }


def judge_interval(estimate: Estimate | None, above: float, below: float) -> str:
    """Whether an interval lies between two bounds, outside them, or across one of them."""
    if estimate is None:
        return "not tested"
    if above < estimate.low and estimate.high < below:
        return "holds"
    return "does not hold" if estimate.high < above or estimate.low > below else "within noise"


def paper_gap(one: Mapping[str, float], other: Mapping[str, float], column: str) -> dict[str, float] | None:
    """The paper's difference between two rows, and z, the difference over its standard error.

    With questions drawn anew for each row: how many of the same ones changed is not printed.
    """
    if column not in one or column not in other:
        return None
    parts = ("bio", "cyber") if column == "WMDP" else (column,)
    # Table 4 prints the mean of bio and cyber alone
    shares = [(row.get(part, row[column]), part) for row in (one, other) for part in parts]
    variance = sum(p * (1 - p) / QUESTIONS[part] / len(parts) ** 2 for p, part in shares)
    gap = one[column] - other[column]
    return {"difference": gap, "z": gap / variance**0.5}
