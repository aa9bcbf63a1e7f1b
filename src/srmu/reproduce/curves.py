"""Strength curves: methods where they forget as much or lose as much, and what a short training brings back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from srmu.attacks.suite import attack_run
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.compare import compare_runs
from srmu.evals.results import PLAIN, read_attacks
from srmu.evals.statistics import Draws
from srmu.reproduce import claims
from srmu.reproduce.experiment import Experiment, MeasuredRow, PlannedRow, RunJob, Scored
from srmu.reproduce.robust import estimate_residual
from srmu.runs.run import Run

BEFORE = "before"
RELEARNING = "relearning_steps"  # the attack on points of a figure
Rows = Mapping[PlannedRow, MeasuredRow]
Spec = Mapping[str, Any]  # the content of configs/reproduce.yaml, or a part of it


def plan_figure(figure: Spec) -> dict[str, dict[float, PlannedRow]]:
    """The points of each series by their strengths."""
    points: dict[str, dict[float, PlannedRow]] = {}
    for label, own in figure["series"].items():
        series = {**figure, **own}
        for coeff in map(float, series["coeffs"]):
            extra = (*series.get("set", ()), *(setting.format(coeff) for setting in series["strength"]))
            row = PlannedRow(
                f"{label} at {coeff:g}", series["of"], figure["regime"], extra, once=series.get("once", False)
            )
            points.setdefault(label, {})[coeff] = row
    return points


def build_figure(name: str, figure: Spec, own: Spec, measured: Rows) -> dict[str, Any]:
    """Utility against forgetting over the strength, and the series where they forget or lose as much."""
    planned, own = plan_figure(figure), {**own, "utility": figure.get("kept", own["utility"])}
    lines = {label: [measured[row] for row in points.values()] for label, points in planned.items()}
    before = original_row([row for points in lines.values() for row in points])
    series = []
    for label, rows in planned.items():
        points = [{"coeff": coeff, **build_point(measured[row], own)} for coeff, row in rows.items()]
        series.append({"label": label, "points": points})
    return {
        "name": name,
        "title": figure["title"],
        "head": figure["head"],
        "missing": sum(row.missing for rows in lines.values() for row in rows),
        "x_title": f"{own['forget']}: points of accuracy forgotten",
        "y_title": f"accuracy kept, {own['utility']}",
        "series": series,
        "compared": [
            compare_series(lines, kind, points, own)
            for kind, losses in figure.get("compared", {}).items()
            for points in losses
        ],
        "claims": [*chain.from_iterable(claims.judge_curves(claim, lines, before, own) for claim in figure["claims"])],
    }


def relearn_points(
    figure: Spec, plan: Experiment, measure: Callable[[Iterable[PlannedRow], Experiment], Rows]
) -> list[dict[str, Any]]:
    """What a short training brings back of the points of a figure that are named for it: accuracies, and K*."""
    planned = plan_figure(figure)
    points = {label: planned[label][float(coeff)] for label, coeff in figure.get("relearned", {}).items()}
    rows = measure(points.values(), replace(plan, measurement=Relearned())) if points else {}
    return [describe_relearned(label, rows[row]) for label, row in points.items()]


def describe_relearned(label: str, row: MeasuredRow) -> dict[str, Any]:
    """A point before and after each number of steps, a mean over its runs; K* of the strongest with its interval."""
    if row.why:
        return {"method": label, "why": row.why}
    reports = [read_attacks(run) for run in row.runs]
    for report in reports:  # of other attacks that were made on them nothing is told
        report["attacks"] = {name: report["attacks"][name] for name in (PLAIN, RELEARNING)}
    if failed := [why for report in reports if (why := report["attacks"][RELEARNING]["why"])]:
        return {"method": label, "why": failed[0]}
    steps: dict[int, list[float]] = {}
    for report in reports:
        for setting, right in report["attacks"][RELEARNING]["settings"].items():  # LoRA, 5 steps
            steps.setdefault(int(setting.split()[-2]), []).append(right["test"])
    means = {f"{count} steps": fmean(steps[count]) for count in sorted(steps)}
    share = estimate_residual(reports, row.questions, [slice(None)] * len(reports))
    return {"method": label, "kappa": mean_kappa(row), "steps": means, "K*": share}


def compare_series(lines: Mapping[str, Sequence[MeasuredRow]], kind: str, points: float, own: Spec) -> dict[str, Any]:
    """What each series leaves where it has lost so many points of a kind of knowledge, beside the first series.

    Left out is a series with fewer than half of its points, which is no curve, and one without a run on a testbed and
    with a seed of the first's: it would be held against others.
    """
    runs = {
        label: [run for row in rows for run in row.runs]
        for label, rows in lines.items()
        if 2 * sum(bool(row.runs) for row in rows) >= len(rows)
    }
    places = {label: {(c.model, c.seed) for c in (Run(run).config for run in some)} for label, some in runs.items()}
    first = places.get(next(iter(lines)), set())
    runs = {label: some for label, some in runs.items() if places[label] & first}
    if not runs:
        return {"kept": kind, "lost": points / 100, "rows": []}
    columns = own["columns"]
    rows = compare_runs([*chain(*runs.values())], points / 100, columns[own["forget"]], columns[kind])
    named = [{**asdict(row), "method": label} for label, row in zip(runs, rows, strict=True)]
    return {"kept": kind, "lost": points / 100, "rows": named}


def build_point(row: MeasuredRow, own: Spec) -> dict[str, Any]:
    """A point of the figure: what is forgotten, what is kept; or why there is none."""
    if row.why:
        return {"kappa": None, "x": None, "y": None, "why": row.why}
    draws = Draws()
    known, left = (claims.resample_kind(one, own, "forget", draws) for one in (original_row([row]), row))
    kept = claims.estimate_cells(row, own["columns"])[own["utility"]]
    return {"kappa": mean_kappa(row), "x": claims.format_interval(draws.estimate(known - left)), "y": kept}


class Relearned(Scored):
    """A run is made, scored, and trained on other facts of what it is to forget."""

    def find_result(self, job: RunJob) -> Path | None:
        folder = super().find_result(job)
        report = read_attacks(folder) if folder else {}
        return folder if RELEARNING in report.get("attacks", {}) and report["tier"] == "smoke" else None

    def measure_run(self, job: RunJob, watch: Watch = ignore_progress) -> Path:
        folder = super().measure_run(job, watch)
        attack_run(Run.open(folder), names=(RELEARNING,), watch=watch)
        return folder


def original_row(rows: Sequence[MeasuredRow]) -> MeasuredRow:
    """The original models, whose scores lie beside those of any of their runs."""
    known = [row for row in rows if row.is_whole] or [row for row in rows if not row.why]
    if not known:
        raise SrmuError(f"not one run succeeded: {rows[0].label} {rows[0].why}")
    whole = known[0]
    return MeasuredRow(BEFORE, whole.runs, whole.questions, when="before")


def mean_kappa(row: MeasuredRow) -> float | None:
    """The mean norm of the target over that of forget activations, where a method has one."""
    topics = [topic for run in row.runs for topic in Run.open(run).record["topics"].values()]
    values = [topic["kappa"] for topic in topics if "kappa" in topic]
    return fmean(values) if values else None
