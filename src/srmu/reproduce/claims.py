"""What measured rows say of a paper's claims: differences with intervals, and verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np

from srmu.evals.compare import resample_row
from srmu.evals.results import read_metrics
from srmu.evals.statistics import Array, Draws, Estimate, average_seeds

CHANCE = 0.25  # four options
NOISE = 1.96
QUESTIONS = {"MMLU": 14042, "bio": 1273, "cyber": 1987}  # behind the paper's numbers

Columns = Mapping[str, Sequence[str]]  # a column's name: the metrics that it is the mean of


@dataclass(frozen=True)
class ClaimLine:
    """A row of a table or a point of a figure: runs that differ only in their seed.

    `asked` says which questions each run was asked: the same number, the same questions. `why` says
    why there are no runs.
    """

    label: str
    runs: tuple[Path, ...]
    asked: tuple[int, ...]
    when: Literal["before", "after"] = "after"
    why: str = ""


def resample_mean(line: ClaimLine, metrics: Sequence[str], draws: Draws) -> Array:
    """The mean of some accuracies as it is, and in each resample: (1 + RESAMPLES, seeds)."""
    runs = zip(line.runs, line.asked, strict=True)
    each = [[resample_accuracy(line, run, asked, m, draws) for m in metrics] for run, asked in runs]
    return np.mean(each, axis=1).T


def resample_accuracy(line: ClaimLine, run: Path, asked: int, metric: str, draws: Draws) -> Array:
    """An accuracy as it is, and in each resample of the questions."""
    row = read_metrics(run)[line.when][metric]
    return resample_row(row, draws, (asked, metric), (metric, asked, line.when, line.label))


def mean_cell(line: ClaimLine, metrics: Sequence[str]) -> dict[str, float]:
    """The mean accuracy of a row's runs with its interval, as in every other table of ours."""
    found = average_seeds([read_metrics(run)[line.when] for run in line.runs], metrics)
    assert found is not None  # every run has all metrics
    return interval_of(found)


def accuracy_drop(before: ClaimLine, line: ClaimLine, metrics: Sequence[str]) -> dict[str, float]:
    """How far an accuracy fell, with its interval."""
    draws = Draws()
    fallen = resample_mean(before, metrics, draws) - resample_mean(line, metrics, draws)
    return interval_of(draws.estimate(fallen))


def judge_row(
    claim: Mapping[str, Any],
    lines: Mapping[str, ClaimLine],
    column: str,
    metrics: Sequence[str],
    paper: Mapping[str, Mapping[str, float]],
    source: str,
) -> dict[str, Any]:
    """A claim about how two rows differ in a column, with the paper's own difference beside it."""
    one, other = claim["of"]
    found, note = None, ""
    if missing := [name for name in claim["of"] if name not in lines]:
        note = f"{missing[0]} was not run"
    elif failed := [lines[name] for name in claim["of"] if lines[name].why]:
        note = f"{failed[0].label} {failed[0].why}"
    else:
        draws = draws_of(claim)
        apart = resample_mean(lines[one], metrics, draws) - resample_mean(
            lines[other], metrics, draws
        )
        found = draws.estimate(apart)
    theirs = "MMLU" if claim["metric"] == "utility" else "WMDP"
    own = paper_gap(paper.get(one, {}), paper.get(other, {}), theirs)
    return judge_difference(claim, column, found, note, claim.get("source", source), own)


def judge_curves(
    claim: Mapping[str, Any],
    curves: Mapping[str, Sequence[ClaimLine]],
    before: ClaimLine,
    forget: Sequence[str],
    column: str,
    utility: Sequence[str],
    source: str,
) -> list[dict[str, Any]]:
    """A claim about what two curves keep where they have forgotten as much, at each share."""
    found = []
    for percent in claim["at"]:
        draws, kept, note = draws_of(claim), [], ""
        for name in claim["of"]:
            points = [line for line in curves.get(name, ()) if not line.why]
            at = (
                best_kept(points, before, forget, utility, percent / 100, draws) if points else None
            )
            if at is None:
                note = f"{name} never forgets {percent} %"
            else:
                kept.append(at)
        both = None if note else draws.estimate(kept[0] - kept[1])
        this = {**claim, "claim": f"{claim['claim']}, {percent} %", "above": 0}
        found.append(judge_difference(this, column, both, note, source, None))
    return found


def best_kept(
    points: Sequence[ClaimLine],
    before: ClaimLine,
    forget: Sequence[str],
    utility: Sequence[str],
    share: float,
    draws: Draws,
) -> Array | None:
    """The most that a curve keeps where it has forgotten `share` of what can be, a column a seed.

    Read in each resample anew, in a straight line between the best points that forget more and
    less, the original model among them. None where a seed's curve does not go as far.
    """
    known = resample_mean(before, forget, draws)
    lost = np.stack([known - known, *(known - resample_mean(p, forget, draws) for p in points)])
    kept = np.stack([resample_mean(line, utility, draws) for line in (before, *points)])
    level = share * (known - CHANCE)
    if (lost[:, 0].max(axis=0) < level[0] - 1e-9).any():
        return None
    found = np.empty_like(level)
    for place in np.ndindex(level.shape):
        x, y = lost[(slice(None), *place)], kept[(slice(None), *place)]
        order = np.argsort(x)
        best = np.maximum.accumulate(y[order][::-1])[::-1]  # of all that forget as much or more
        found[place] = np.interp(level[place], x[order], best)
    return found


def judge_difference(
    claim: Mapping[str, Any],
    column: str,
    found: Estimate | None,
    note: str,
    source: str,
    own: tuple[float, float] | None,
) -> dict[str, Any]:
    """A claim with its verdict, in numbers and in a sentence."""
    bounds = claim.get("above", -inf) / 100, claim.get("below", inf) / 100
    result = interval_verdict(found, *bounds)
    one, other = claim["of"]
    if found is None:
        sentence = f"{claim['claim']}: not tested here, {note}."
    else:
        value, low, high = (f"{100 * x:+.1f}" for x in (found.value, found.low, found.high))
        apart = f"{one} less {other}, {column}: {value} points ({low} to {high})"
        sentence = f"{claim['claim']}: {result}. {apart}."
    if own:
        noise = "within its own sampling noise" if abs(own[1]) < NOISE else "beyond sampling noise"
        sentence += f" In the paper {100 * own[0]:+.1f}, {noise} (z = {own[1]:.1f})."
    return {
        "claim": claim["claim"],
        "source": source,
        "verdict": result,
        "difference": interval_of(found) if found else None,
        "paper": {"difference": own[0], "z": own[1]} if own else None,
        "sentence": sentence,
    }


def interval_verdict(found: Estimate | None, above: float, below: float) -> str:
    """Whether an interval lies between two bounds, outside them, or across one of them."""
    if found is None:
        return "not tested"
    if above < found.low and found.high < below:
        return "holds"
    if found.high < above or found.low > below:
        return "does not hold"
    return "within noise"


def paper_gap(
    one: Mapping[str, float], other: Mapping[str, float], column: str
) -> tuple[float, float] | None:
    """The paper's difference between two rows, and over its standard error.

    With questions drawn anew for each row: how many of the same ones changed is not printed.
    """
    parts = ("bio", "cyber") if column == "WMDP" else (column,)
    if not all(column in row for row in (one, other)):
        return None
    variance = 0.0
    for row in (one, other):
        for part in parts:
            p = row.get(part, row[column])  # Table 4 prints their mean alone
            variance += p * (1 - p) / QUESTIONS[part] / len(parts) ** 2
    apart = one[column] - other[column]
    return apart, apart / variance**0.5


def draws_of(claim: Mapping[str, Any]) -> Draws:
    """Resamples that depend on the claim alone, not on what was judged before."""
    return Draws(crc32(json.dumps(claim, sort_keys=True).encode()))


def interval_of(found: Estimate) -> dict[str, float]:
    return {key: value for key, value in asdict(found).items() if key != "n"}
