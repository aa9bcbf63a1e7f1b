"""The paper's tables and its figure again, on testbeds or on the paper's own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from srmu.engine.files import require_place
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.reproduce.claims import estimate_cells, estimate_drop, judge_curves, judge_row
from srmu.reproduce.experiment import (
    Experiment,
    MeasuredRow,
    OneModel,
    PlannedRow,
    Testbeds,
    read_preset,
    read_settings,
    run_experiment,
)
from srmu.reproduce.needs import estimate_needs, explain_needs
from srmu.runs.config import build_config, load_config
from srmu.runs.plan import load_tokenizer, load_topics, plan_run
from srmu.runs.run import Run

BEFORE = "before"
SEEDS = {"testbeds": 3, "model": 1}  # on a model as in the paper; each run takes long

Rows = Mapping[PlannedRow, MeasuredRow]


def plan_paper(
    out: Path,
    model: str = "",
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
) -> Experiment:
    """The experiment on testbeds, or on the model that is named; SrmuError for what cannot be."""
    if seeds is not None and seeds < 1:
        raise SrmuError("--seeds must be at least 1")
    require_place(out)
    spec = spec or read_preset("reproduce.yaml")
    count = range(seeds or SEEDS["model" if model else "testbeds"])
    if model:
        own = spec["zephyr"]
        settings = {label: tuple(one.get("set", ())) for label, one in own["methods"].items()}
        place: Testbeds | OneModel = OneModel(model, own)
    else:
        own = spec["testbed"]
        settings, place = read_settings(own["methods"]), Testbeds(out)
    tasks = tuple(own["tasks"])
    return Experiment(out, place, settings, (*count,), tasks, overrides=tuple(overrides))


def reproduce_paper(
    what: str,
    experiment: Experiment,
    *,
    command: str,
    watch: Watch = ignore_progress,
    spec: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the runs that are missing, and give the tables and figures: what `reproduce.json` holds.

    What is in the experiment's folder already is used again.
    """
    spec = spec or read_preset("reproduce.yaml")
    check_settings(experiment)
    rows = run_experiment(experiment, plan_rows(what, spec, experiment), watch)
    tables, figure = choose_tables(what, spec)
    return {
        "kind": "reproduction",
        "paper": "arXiv 2512.16297",
        "model": name_model(experiment),
        "command": command,
        "seeds": [*experiment.seeds],
        "tables": [build_table(name, spec, experiment, rows) for name in tables],
        "figures": build_figures(spec, experiment, rows) if figure else [],
    }


def check_settings(experiment: Experiment) -> None:
    """SrmuError, before anything is made, for overrides of no method and what is out of reach."""
    place = experiment.place
    if isinstance(place, Testbeds):
        topics = {"organism": {"forget": "forget.jsonl"}}
        build_config({"model": "model", "method": "srmu", "topics": topics}, experiment.overrides)
        return
    job = experiment.plan_job(PlannedRow("SRMU", "SRMU", "low"), 0)
    config = load_config(job.config, job.overrides)
    try:
        plan = plan_run(config)
        load_topics(plan.config, load_tokenizer(plan.base))
    except SrmuError as error:
        gated = ", ".join(k for k, v in place.spec["sources"].items() if v.startswith("gated"))
        raise SrmuError(
            f"{error}; it takes the model and the texts ({gated} is gated): "
            f"srmu reproduce all --model {place.name} --dry-run says how to get them"
        ) from error


# ---- which rows and points


def choose_tables(what: str, spec: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The tables that a name stands for, and whether it stands for the figure."""
    tables = {k: v for k, v in spec["tables"].items() if what in ("all", k.split("-")[0])}
    return tables, what in ("all", "figure2")


def plan_rows(what: str, spec: Mapping[str, Any], experiment: Experiment) -> list[PlannedRow]:
    """All rows and points of what is asked for."""
    tables, figure = choose_tables(what, spec)
    rows = [row for table in tables.values() for row in plan_table(table, experiment)]
    if figure:
        rows += [row for points in plan_figure(spec["figure2"]).values() for row in points.values()]
    return rows


def plan_table(table: Mapping[str, Any], experiment: Experiment) -> list[PlannedRow]:
    """The rows of a table, without the original model's."""
    regime = table["regime"]
    if "changes" not in table:
        own = [label for label in table["rows"] if label in experiment.settings]
        others = [label for label in experiment.settings if label not in own]
        further = table.get("others") and isinstance(experiment.place, Testbeds)
        return [PlannedRow(label, label, regime) for label in own + (others if further else [])]
    source, key = table["strength"]["of"], table["strength"]["key"]
    rows = []
    for label, change in table["changes"].items():
        method, extra = change.get("of", source), tuple(change.get("set", ()))
        # a coefficient means something within one method only; the source has its own
        alike = bool(extra) or method != source if key == "kappa" else extra and method == source
        rows.append(PlannedRow(label, method, regime, extra, (source, key) if alike else None))
    return rows


def plan_figure(figure: Mapping[str, Any]) -> dict[str, dict[float, PlannedRow]]:
    """The points of each series by their coefficients."""
    return {
        label: {
            float(coeff): PlannedRow(
                f"{label} at {coeff:g}",
                series["of"],
                figure["regime"],
                (*series.get("set", ()), "method.kappa=null", f"method.coeff={coeff}"),
            )
            for coeff in figure["coeffs"]
        }
        for label, series in figure["series"].items()
    }


# ---- tables and figure


def build_table(name: str, spec: Mapping[str, Any], experiment: Experiment, measured: Rows) -> dict[str, Any]:
    """A table with the paper's numbers beside ours, and its claims."""
    table, own = spec["tables"][name], columns_of(spec, experiment)
    planned = {row.label: measured[row] for row in plan_table(table, experiment)}
    lines = {BEFORE: original_row([*planned.values()]), **planned}
    paper = {label: add_mean(values) for label, values in table["rows"].items()}
    rows = []
    for label in dict.fromkeys([*table["rows"], *lines]):
        row: dict[str, Any] = {"label": label, "cells": {}, "kappa": None}
        row["paper"] = paper.get(label, {})
        line = lines.get(label)
        if line is None or line.why:
            row["why"] = line.why if line else "not run"
        else:
            row["cells"] = estimate_cells(line, own["columns"])
            row["kappa"] = mean_kappa(line) if line.when == "after" else None
        rows.append(row)
    source = table["title"].split(":")[0]
    return {
        "name": name,
        "title": table["title"],
        "note": table["note"],
        "columns": [*own["columns"]],
        "rows": rows,
        "paper_columns": table["paper_columns"],
        "claims": [judge_row(claim, lines, own, paper, source) for claim in table["claims"]],
    }


def build_figures(spec: Mapping[str, Any], experiment: Experiment, measured: Rows) -> list[dict[str, Any]]:
    """Utility against forgetting over the coefficient; on testbeds also with all utility tasks."""
    figure, own = spec["figure2"], columns_of(spec, experiment)
    curves = {
        label: {coeff: measured[row] for coeff, row in points.items()} for label, points in plan_figure(figure).items()
    }
    lines = {label: [*points.values()] for label, points in curves.items()}
    before = original_row([row for points in lines.values() for row in points])
    forget = own["columns"][own["forget"]]
    kinds = {"figure2": (own["utility"], own["columns"][own["utility"]])}
    if more := own.get("all_utility"):
        kinds["figure2-all"] = ("mean of neighbour and general", more)
    figures = []
    for name, (y_title, utility) in kinds.items():
        series = [
            {
                "label": label,
                "points": [
                    {"coeff": coeff} | build_point(row, before, forget, utility) for coeff, row in points.items()
                ],
            }
            for label, points in curves.items()
        ]
        claims = [
            verdict
            for claim in figure["claims"]
            for verdict in judge_curves(claim, lines, before, forget, y_title, utility, "Figure 2")
        ]
        figures.append(
            {
                "name": name,
                "title": figure["title"],
                "x_title": f"{own['forget']}: points of accuracy forgotten",
                "y_title": f"accuracy kept, {y_title}",
                "series": series,
                "claims": claims,
            }
        )
    return figures


def build_point(row: MeasuredRow, before: MeasuredRow, forget: Sequence[str], utility: Sequence[str]) -> dict[str, Any]:
    """A point of the figure: what is forgotten, what is kept; or why there is none."""
    if row.why:
        return {"kappa": None, "x": None, "y": None, "why": row.why}
    kept = estimate_cells(row, {"y": utility})["y"]
    return {"kappa": mean_kappa(row), "x": estimate_drop(before, row, forget), "y": kept}


def columns_of(spec: Mapping[str, Any], experiment: Experiment) -> dict[str, Any]:
    """The columns and which of them claims call forget and utility."""
    return spec["testbed" if isinstance(experiment.place, Testbeds) else "zephyr"]


def add_mean(row: Mapping[str, float]) -> dict[str, float]:
    """The paper's percentages as fractions, with the mean of bio and cyber that it calls WMDP."""
    shares = {key: value / 100 for key, value in row.items()}
    if {"bio", "cyber"} <= shares.keys():
        shares["WMDP"] = (shares["bio"] + shares["cyber"]) / 2
    return shares


def original_row(rows: Sequence[MeasuredRow]) -> MeasuredRow:
    """The original models, whose scores lie beside those of any of their runs."""
    whole = next((row for row in rows if not row.why), None)
    if whole is None:
        raise SrmuError(f"not one run succeeded: {rows[0].label} {rows[0].why}")
    return MeasuredRow(BEFORE, whole.runs, whole.questions, when="before")


def mean_kappa(row: MeasuredRow) -> float | None:
    """The mean norm of the target over that of forget activations, where a method has one."""
    topics = [topic for run in row.runs for topic in Run.open(run).record["topics"].values()]
    values = [topic["kappa"] for topic in topics if "kappa" in topic]
    return fmean(values) if values else None


# ---- the command, and what it needs


def name_model(experiment: Experiment) -> str:
    place = experiment.place
    if isinstance(place, Testbeds):
        return "testbed"
    return Path(place.name).name if Path(place.name).exists() else place.name


def format_command(what: str, experiment: Experiment, settings: Sequence[str]) -> str:
    """What to type for this reproduction; of paths only their last part."""
    words, count = ["srmu reproduce", what], len(experiment.seeds)
    on_model = isinstance(experiment.place, OneModel)
    words += [f"--model {name_model(experiment)}"] if on_model else []
    numbers = ",".join(map(str, range(count)))
    words += [f"--seeds {numbers}"] if count != SEEDS["model" if on_model else "testbeds"] else []
    for setting in settings:
        key, _, value = setting.partition("=")
        words.append(f"{key}={Path(value).name if '/' in value else value}")
    return " ".join(words)


def paper_needs(what: str, experiment: Experiment) -> tuple[dict[str, Any], list[str]]:
    """What the runs need, in numbers and in lines; makes and fetches nothing."""
    rows = [*dict.fromkeys(plan_rows(what, read_preset("reproduce.yaml"), experiment))]
    count = len(experiment.seeds)
    place = experiment.place
    if isinstance(place, Testbeds):
        return {"testbeds": count, "runs": len(rows) * count}, [
            f"{count} testbeds, a minute or two each where none was built before, and at "
            f"most {len(rows) * count} runs of some seconds; nothing is fetched"
        ]
    bases = {row.method: PlannedRow("", row.method, row.regime) for row in rows}
    jobs = {method: experiment.plan_job(row, 0) for method, row in bases.items()}
    counts = {method: count * sum(row.method == method for row in rows) for method in bases}
    needs = estimate_needs(jobs, counts, place.spec, place.name)
    return needs, explain_needs(needs)
