"""The paper's tables and its figure again, on testbeds or on the paper's own model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from srmu.engine.files import require_place
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.reproduce.claims import (
    ClaimLine,
    Columns,
    accuracy_drop,
    judge_curves,
    judge_row,
    mean_cell,
)
from srmu.reproduce.needs import estimate_needs, explain_needs
from srmu.reproduce.runs import Model, Place, Testbeds, WantedRun, existing_run, read_spec
from srmu.runs.run import Run

BEFORE = "before"


def make_runs(
    place: Place, wanted: Sequence[WantedRun], watch: Watch
) -> dict[WantedRun, ClaimLine]:
    """The runs of all rows and points, made where they are missing; each different one once."""
    # what gives others their strength comes first
    sources = {w.like[0]: WantedRun(w.like[0], w.like[0], w.regime) for w in wanted if w.like}
    lines: dict[WantedRun, ClaimLine] = {}
    for stage in (
        [*(w for w in wanted if not w.like), *sources.values()],
        [w for w in wanted if w.like],
    ):
        jobs = {}
        for want in dict.fromkeys(stage):
            for seed in range(place.seeds):
                extra: tuple[str, ...] = ()
                if want.like:
                    method, key = want.like
                    extra = strength_overrides(lines[sources[method]], seed, key)
                jobs[want, seed] = place.job(want, seed, extra)
        found = {job: existing_run(job) for job in dict.fromkeys(jobs.values())}
        missing = [job for job, run in found.items() if run is None]
        found |= dict(zip(missing, place.run(missing, watch), strict=True))
        for want in dict.fromkeys(stage):
            mine = [found[jobs[want, seed]] for seed in range(place.seeds)]
            lines[want] = claim_line(want.label, mine, place)
    return lines


def strength_overrides(line: ClaimLine, seed: int, key: str) -> tuple[str, ...]:
    """The overrides that give a run the coeff or the kappa of another method's run."""
    if line.why:
        raise SrmuError(f"{line.label} {line.why}: others take their strength from it")
    run = Run.open(line.runs[seed])
    given = getattr(run.config.method, key)
    if given is not None:
        other = "kappa" if key == "coeff" else "coeff"
        return (f"method.{other}=null", f"method.{key}={given!r}")
    return tuple(f"topics.{k}.{key}={v[key]!r}" for k, v in run.record["topics"].items())


def claim_line(label: str, found: Sequence[Path | str | None], place: Place) -> ClaimLine:
    seeds = tuple(place.asked(seed) for seed in range(place.seeds))
    wrong = [run for run in found if isinstance(run, str)]
    if wrong:
        why = wrong[0].replace(f"{place.out.resolve()}/", "")
        return ClaimLine(label, (), (), why=f"{why} in {len(wrong)} of {len(found)} runs")
    return ClaimLine(label, tuple(run for run in found if isinstance(run, Path)), seeds)


def kappa_of(line: ClaimLine) -> float | None:
    """The mean norm of the target over that of forget activations, where a method has one."""
    records = [Run.open(run).record["topics"] for run in line.runs]
    values = [topic["kappa"] for topics in records for topic in topics.values() if "kappa" in topic]
    return fmean(values) if values else None


def wanted_rows(name: str, spec: Mapping[str, Any], place: Place) -> list[WantedRun]:
    """The rows of a table, without the original model's."""
    if "changes" not in spec:
        own = [label for label in spec["rows"] if label in place.settings]
        others = [label for label in place.settings if label not in own]
        labels = own + (others if spec.get("others") and isinstance(place, Testbeds) else [])
        return [WantedRun(label, label, spec["regime"]) for label in labels]
    source, key = spec["strength"]["of"], spec["strength"]["key"]
    found = []
    for label, change in spec["changes"].items():
        base = change.get("of", source)
        extra = tuple(change.get("set", ()))
        # a coefficient means something within one method only; the source has its own
        alike = bool(extra) or base != source if key == "kappa" else extra and base == source
        like = (source, key) if alike else None
        found.append(WantedRun(label, base, spec["regime"], extra, like))
    return found


def wanted_points(spec: Mapping[str, Any]) -> dict[str, list[tuple[float, WantedRun]]]:
    """The points of each series of the figure, with their coefficients."""
    return {
        label: [
            (
                float(coeff),
                WantedRun(
                    f"{label} at {coeff:g}",
                    series["of"],
                    spec["regime"],
                    (*series.get("set", ()), "method.kappa=null", f"method.coeff={coeff}"),
                ),
            )
            for coeff in spec["coeffs"]
        ]
        for label, series in spec["series"].items()
    }


def table_of(
    name: str, spec: Mapping[str, Any], place: Place, lines: Mapping[WantedRun, ClaimLine]
) -> dict[str, Any]:
    """A table with the paper's numbers beside ours, and its claims."""
    wanted = {want.label: lines[want] for want in wanted_rows(name, spec, place)}
    columns: Columns = place.spec["columns"]
    found = {BEFORE: before_of(wanted.values()), **wanted}
    paper = {label: with_mean(values) for label, values in spec["rows"].items()}
    rows = []
    for label in dict.fromkeys([*spec["rows"], *found]):
        row: dict[str, Any] = {"label": label, "cells": {}, "kappa": None}
        row["paper"] = paper.get(label, {})
        line = found.get(label)
        if line is None or line.why:
            row["why"] = line.why if line else "not run"
        else:
            row["cells"] = {column: mean_cell(line, metrics) for column, metrics in columns.items()}
            row["kappa"] = kappa_of(line) if line.when == "after" else None
        rows.append(row)
    source = spec["title"].split(":")[0]
    claims = []
    for claim in spec["claims"]:
        column = place.spec[claim["metric"]]
        claims.append(judge_row(claim, found, column, columns[column], paper, source))
    return {
        "name": name,
        "title": spec["title"],
        "note": spec["note"],
        "columns": [*columns],
        "rows": rows,
        "paper_columns": spec["paper_columns"],
        "claims": claims,
    }


def with_mean(row: Mapping[str, float]) -> dict[str, float]:
    """The paper's percentages as fractions, with the mean of bio and cyber that it calls WMDP."""
    found = {key: value / 100 for key, value in row.items()}
    if {"bio", "cyber"} <= found.keys():
        found["WMDP"] = (found["bio"] + found["cyber"]) / 2
    return found


def before_of(lines: Iterable[ClaimLine]) -> ClaimLine:
    """The original models, whose scores lie beside those of any of their runs."""
    whole = next((line for line in lines if not line.why), None)
    if whole is None:
        raise SrmuError("not one run succeeded")
    return ClaimLine(BEFORE, whole.runs, whole.asked, when="before")


def paper_figures(
    spec: Mapping[str, Any], place: Place, lines: Mapping[WantedRun, ClaimLine]
) -> list[dict[str, Any]]:
    """Utility against forgetting over the coefficient; on testbeds also with all utility tasks."""
    points = wanted_points(spec)
    curves = {label: [lines[want] for _, want in each] for label, each in points.items()}
    before = before_of(line for each in curves.values() for line in each)
    forget, kept = (place.spec["columns"][place.spec[key]] for key in ("forget", "utility"))
    kinds = [("figure2", place.spec["utility"], kept)]
    if more := place.spec.get("all_utility"):
        kinds.append(("figure2-all", "mean of neighbour and general", more))
    found = []
    for name, y_title, utility in kinds:
        series = []
        for label, each in points.items():
            drawn = []
            for coeff, want in each:
                line = lines[want]
                point: dict[str, Any] = {"coeff": coeff, "kappa": None, "x": None, "y": None}
                if line.why:
                    point["why"] = line.why
                else:
                    point["kappa"] = kappa_of(line)
                    point |= {
                        "x": accuracy_drop(before, line, forget),
                        "y": mean_cell(line, utility),
                    }
                drawn.append(point)
            series.append({"label": label, "points": drawn})
        claims = [
            judgement
            for claim in spec["claims"]
            for judgement in judge_curves(
                claim, curves, before, forget, y_title, utility, "Figure 2"
            )
        ]
        found.append(
            {
                "name": name,
                "title": spec["title"],
                "x_title": f"{place.spec['forget']}: points of accuracy forgotten",
                "y_title": f"accuracy kept, {y_title}",
                "series": series,
                "claims": claims,
            }
        )
    return found


def choose_tables(what: str, spec: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The tables that a name stands for, and whether it stands for the figure."""
    tables = {k: v for k, v in spec["tables"].items() if what in ("all", k.split("-")[0])}
    return tables, what in ("all", "figure2")


def wanted_of(what: str, spec: Mapping[str, Any], place: Place) -> list[WantedRun]:
    """All rows and points of what is asked for."""
    tables, figure = choose_tables(what, spec)
    found = [want for name, table in tables.items() for want in wanted_rows(name, table, place)]
    if figure:
        found += [w for each in wanted_points(spec["figure2"]).values() for _, w in each]
    return found


def place_of(
    out: Path, model: str = "", seeds: int | None = None, overrides: Sequence[str] = ()
) -> Place:
    """Testbeds, or the model that is named; SrmuError for what cannot be."""
    if seeds is not None and seeds < 1:
        raise SrmuError("--seeds must be at least 1")
    require_place(out)
    if model:
        return Model(model, out, seeds or Model.usual, tuple(overrides))
    return Testbeds(out, seeds or Testbeds.usual, tuple(overrides))


def reproduce_paper(
    what: str, place: Place, *, command: str, watch: Watch = ignore_progress, spec: Any = None
) -> dict[str, Any]:
    """Make the runs that are missing, and give the tables and figures: what `reproduce.json` holds.

    What is in the place's folder already is used again.
    """
    spec = spec or read_spec()
    tables, figure = choose_tables(what, spec)
    place.prepare(watch)
    lines = make_runs(place, wanted_of(what, spec, place), watch)
    return {
        "kind": "reproduction",
        "paper": "arXiv 2512.16297",
        "model": place.model,
        "command": command,
        "seeds": [*range(place.seeds)],
        "tables": [table_of(name, table, place, lines) for name, table in tables.items()],
        "figures": paper_figures(spec["figure2"], place, lines) if figure else [],
    }


def command_of(what: str, place: Place, settings: Sequence[str]) -> str:
    """What to type for this reproduction; of paths only their last part."""
    words = ["srmu reproduce", what]
    words += [f"--model {place.model}"] if isinstance(place, Model) else []
    words += (
        [f"--seeds {','.join(map(str, range(place.seeds)))}"]
        if place.seeds != type(place).usual
        else []
    )
    for setting in settings:
        key, _, value = setting.partition("=")
        words.append(f"{key}={Path(value).name if '/' in value else value}")
    return " ".join(words)


def paper_needs(what: str, place: Place) -> tuple[dict[str, Any], list[str]]:
    """What the runs need, in numbers and in lines; makes and fetches nothing."""
    wanted = list(dict.fromkeys(wanted_of(what, read_spec(), place)))
    runs = len(wanted) * place.seeds
    if isinstance(place, Testbeds):
        found = {"testbeds": place.seeds, "runs": runs}
        return found, [
            f"{place.seeds} testbeds, a minute or two each where none was built before, and at "
            f"most {runs} runs of some seconds; nothing is fetched"
        ]
    jobs = {want.base: place.job(WantedRun("", want.base, want.regime), 0, ()) for want in wanted}
    counts = {base: place.seeds * sum(w.base == base for w in wanted) for base in jobs}
    found = estimate_needs(jobs, counts, place.spec, place.name)
    return found, explain_needs(found)
