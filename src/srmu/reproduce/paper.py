"""The paper's tables and its figure again, on testbeds or on the paper's own model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from srmu.engine.files import format_gb, require_place
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.statistics import Draws
from srmu.report.format import count_words
from srmu.report.results import strip_paths
from srmu.reproduce import claims, experiment
from srmu.reproduce.experiment import Experiment, MeasuredRow, OneModel, PlannedRow, Testbeds
from srmu.runs import estimate
from srmu.runs.config import load_config
from srmu.runs.plan import load_tokenizer, load_topics, plan_run
from srmu.runs.run import Run

BEFORE = "before"
WORLDS = {"closed": "testbed", "atlas": "atlas"}  # what configs/reproduce.yaml calls them
FAST = 100e12  # FLOPs a second that one may expect of a data-centre GPU in bfloat16
Rows = Mapping[PlannedRow, MeasuredRow]
Spec = Mapping[str, Any]  # the content of configs/reproduce.yaml, or a part of it


def read_paper(what: str) -> Spec:
    """What is run and claimed, with the tables and figures that a name stands for."""
    spec = experiment.read_preset("reproduce.yaml")
    tables = {name: table for name, table in spec["tables"].items() if what in ("all", name.split("-")[0])}
    return {**spec, "tables": tables, "figures": [spec["figure2"]] if what in ("all", "figure2") else []}


def plan_paper(
    out: Path, model: str = "", seeds: int | None = None, overrides: Sequence[str] = (), world: str = "closed"
) -> Experiment:
    """The experiment on testbeds of a world, or on the model that is named; SrmuError for what cannot be."""
    if world not in WORLDS:
        raise SrmuError(f"--world {world}: the paper's tables are made of {' and '.join(WORLDS)}")
    require_place(out)
    place: Testbeds | OneModel = Testbeds(out)
    if model:
        place = OneModel(model, read_paper("all")["zephyr"])
    elif world == "atlas":
        place = Testbeds(out, folder="atlas", world="atlas", oracle=False)
    own = choose_spec(place)
    if model:
        settings = {label: tuple(one.get("set", ())) for label, one in own["methods"].items()}
    else:
        settings = experiment.read_settings(own["methods"])
    count = range(seeds or (1 if model else 3))  # on a model as in the paper: each run takes long
    return Experiment(out, place, settings, (*count,), tuple(own["tasks"]), overrides=tuple(overrides))


def choose_spec(place: Testbeds | OneModel) -> Spec:
    """What is run and asked at a place: the columns, and which of them claims call forget and utility."""
    return place.spec if isinstance(place, OneModel) else read_paper("all")[WORLDS[place.world]]


def reproduce_paper(what: str, plan: Experiment, *, command: str, watch: Watch = ignore_progress) -> dict[str, Any]:
    """Make the runs that are missing, and give the tables and figures: what `reproduce.json` holds.

    What is in the experiment's folder already is used again.
    """
    spec, place = read_paper(what), plan.place
    if isinstance(place, OneModel):
        check_sources(plan, place)
    rows = experiment.run_experiment(plan, plan_rows(spec, plan), watch)
    own = choose_spec(place)
    return {
        "kind": "reproduction",
        "paper": "arXiv 2512.16297",
        "model": strip_paths(place.name) if isinstance(place, OneModel) else WORLDS[place.world],
        "command": command,
        "seeds": [*plan.seeds],
        "tables": [build_table(name, table, own, plan, rows) for name, table in spec["tables"].items()],
        "figures": [build_figure(figure, own, rows) for figure in spec["figures"]],
    }


def check_sources(plan: Experiment, place: OneModel) -> None:
    """SrmuError, before anything is made, for a model or texts that are out of reach."""
    job = plan.plan_job(PlannedRow("SRMU", "SRMU", "low"), 0)
    config = load_config(job.config, job.overrides)
    try:
        found = plan_run(config)
        load_topics(found.config, load_tokenizer(found.base))
    except SrmuError as error:
        gated = ", ".join(k for k, v in place.spec["sources"].items() if v.startswith("gated"))
        raise SrmuError(
            f"{error}; it takes the model and the texts ({gated} is gated): "
            f"srmu reproduce all --model {place.name} --dry-run says how to get them"
        ) from error


def plan_rows(spec: Spec, plan: Experiment) -> list[PlannedRow]:
    """All rows and points of what is asked for, each once."""
    rows = [row for table in spec["tables"].values() for row in plan_table(table, plan)]
    series = [points for figure in spec["figures"] for points in plan_figure(figure).values()]
    return [*dict.fromkeys([*rows, *(row for points in series for row in points.values())])]


def plan_table(table: Spec, plan: Experiment) -> list[PlannedRow]:
    """The rows of a table, without the original model's."""
    regime = table["regime"]
    if "changes" not in table:
        labels = [label for label in table["rows"] if label in plan.settings]
        if table.get("others") and isinstance(plan.place, Testbeds):
            labels += [label for label in plan.settings if label not in labels]
        return [PlannedRow(label, label, regime) for label in labels]
    source, key = table["strength"]["of"], table["strength"]["key"]
    rows = []
    for label, change in table["changes"].items():
        method, extra = change.get("of", source), tuple(change.get("set", ()))
        # the source has its own strength; a coefficient means something within one method only
        alike = bool(extra) if method == source else key == "kappa"
        rows.append(PlannedRow(label, method, regime, extra, (source, key) if alike else None))
    return rows


def plan_figure(figure: Spec) -> dict[str, dict[float, PlannedRow]]:
    """The points of each series by their coefficients."""
    points: dict[str, dict[float, PlannedRow]] = {}
    for label, series in figure["series"].items():
        points[label] = {}
        for coeff in map(float, figure["coeffs"]):
            extra = (*series.get("set", ()), "method.kappa=null", f"method.coeff={coeff}")
            points[label][coeff] = PlannedRow(f"{label} at {coeff:g}", series["of"], figure["regime"], extra)
    return points


def build_table(name: str, table: Spec, own: Spec, plan: Experiment, measured: Rows) -> dict[str, Any]:
    """A table with the paper's numbers beside ours, and its claims."""
    planned = {row.label: measured[row] for row in plan_table(table, plan)}
    lines = {BEFORE: original_row([*planned.values()]), **planned}
    paper = {label: add_mean(values) for label, values in table["rows"].items()}
    rows = []
    for label in dict.fromkeys([*table["rows"], *lines]):
        row: dict[str, Any] = {"label": label, "cells": {}, "kappa": None, "paper": paper.get(label, {})}
        line = lines.get(label) or MeasuredRow(label, (), (), why=experiment.NOT_RUN)
        if line.why:
            row["why"] = line.why
        else:
            row["cells"] = claims.estimate_cells(line, own["columns"])
            row["kappa"] = mean_kappa(line) if line.when == "after" else None
        rows.append(row)
    return {
        "name": name,
        **{key: table[key] for key in ("title", "note", "paper_columns")},
        "columns": [*own["columns"]],
        "rows": rows,
        "claims": [claims.judge_row(claim, lines, own, paper) for claim in table["claims"]],
    }


def build_figure(figure: Spec, own: Spec, measured: Rows) -> dict[str, Any]:
    """Utility against forgetting over the coefficient, and the claims at equal forgetting."""
    planned = plan_figure(figure)
    lines = {label: [measured[row] for row in points.values()] for label, points in planned.items()}
    before = original_row([row for points in lines.values() for row in points])
    series = []
    for label, rows in planned.items():
        points = [{"coeff": coeff, **build_point(measured[row], before, own)} for coeff, row in rows.items()]
        series.append({"label": label, "points": points})
    return {
        "name": "figure2",
        "title": figure["title"],
        "x_title": f"{own['forget']}: points of accuracy forgotten",
        "y_title": f"accuracy kept, {own['utility']}",
        "series": series,
        "claims": [*chain.from_iterable(claims.judge_curves(claim, lines, before, own) for claim in figure["claims"])],
    }


def build_point(row: MeasuredRow, before: MeasuredRow, own: Spec) -> dict[str, Any]:
    """A point of the figure: what is forgotten, what is kept; or why there is none."""
    if row.why:
        return {"kappa": None, "x": None, "y": None, "why": row.why}
    draws = Draws()
    known, left = (claims.resample_kind(one, own, "forget", draws) for one in (before, row))
    kept = claims.estimate_cells(row, own["columns"])[own["utility"]]
    return {"kappa": mean_kappa(row), "x": claims.format_interval(draws.estimate(known - left)), "y": kept}


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


# ---- what it takes


def paper_needs(what: str, plan: Experiment) -> tuple[dict[str, Any], list[str]]:
    """What the runs need, in numbers and in lines; makes and fetches nothing."""
    rows = plan_rows(read_paper(what), plan)
    count, place = len(plan.seeds), plan.place
    if isinstance(place, Testbeds):
        beds, each = (1, "some minutes") if place.world == "atlas" else (count, "some seconds")
        return {"testbeds": beds, "runs": len(rows) * count}, [
            f"{count_words(beds, 'testbed')}, a few minutes each where none was built before, and at "
            f"most {len(rows) * count} runs of {each}; nothing is fetched"
        ]
    return estimate_needs(plan, place, rows)


def estimate_needs(plan: Experiment, place: OneModel, rows: Sequence[PlannedRow]) -> tuple[dict[str, Any], list[str]]:
    """What the rows' runs take, in numbers and in lines for a person; nothing is fetched.

    Texts have the lengths that the configs state; a model that is not here has its published dimensions.
    """
    spec, folder = place.spec, find_model(place.name, place.spec)
    gb, duration = format_gb, estimate.format_duration
    size, asked = estimate.count_parameters(folder), spec["asked"]
    scoring = 2 * size * asked["tokens"]  # FLOPs for one model
    counts, methods, lines = Counter(row.method for row in rows), dict[str, Any](), list[str]()
    speed: Any = None  # FLOPs a second, measured once
    for method, regime in {row.method: row.regime for row in rows}.items():
        job = plan.plan_job(PlannedRow(method, method, regime), 0)
        planned = plan_run(load_config(job.config, (*job.overrides, f"model={folder}")))
        if speed is None and not planned.here:
            speed = estimate.speed_elsewhere(planned)
        found = estimate.estimate_run(planned, estimate.blank_topics(planned, spec["documents"]), speed)
        speed, runs = found["flops_a_second"], counts[method] * len(plan.seeds)
        methods[method] = found | {"runs": runs}
        # adapters are counted as if all that they stand beside were trained
        most = "at most " if getattr(planned.config.method, "lora_rank", 0) else ""
        memory = f"{most}{gb(found['memory_private'])} of memory beside {gb(found['bytes_read'])} of the model's files"
        work = f"{found['flops'] / 1e15:.3g} PFLOP, here {duration(found['seconds'])}"
        lines.append(f"runs    {runs} of {method}: {memory}, {work}")
    runs = sum(one["runs"] for one in methods.values())
    total = sum(one["runs"] * one["flops"] for one in methods.values()) + (runs + 1) * scoring  # and the original
    source = "is here" if planned.here else f"hf download {place.name} (planned from its published dimensions)"
    lines = [
        f"model   {place.name}, {gb(2 * size)}: {source}",
        *(f"data    {name}: {how}" for name, how in spec["sources"].items()),
        *lines,
        f"scores  {asked['questions']:,} questions a run: {scoring / 1e15:.3g} PFLOP, here {duration(scoring / speed)}",
        f"in all  {runs} runs, {total / 1e15:.3g} PFLOP: here {duration(total / speed)}; "
        f"{duration(total / FAST)} where {FAST / 1e12:.0f} TFLOP a second are reached",
    ]
    model = {"name": place.name, "there": planned.here, "bytes": 2 * size}
    return {"model": model, "sources": spec["sources"], "methods": methods, "evaluation_flops": scoring}, lines


def find_model(name: str, spec: Spec) -> Path:
    """The model's folder; where it is not here, one with its config.json alone."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    with suppress(Exception):  # not in the cache; the client raises many kinds
        folder = Path(snapshot_download(name, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    if name != spec["name"]:
        raise SrmuError(
            f"model {name} is not here, and dimensions are known of {spec['name']} only: fetch it "
            f"with hf download {name}, or name its folder"
        )
    return experiment.find_preset(spec["shape"]).parent
