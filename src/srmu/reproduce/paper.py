"""The paper's tables and its figure again, on testbeds or on the paper's own model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from srmu.engine.files import format_gb, require_place
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.report.format import NOT_RUN, count_words
from srmu.report.results import strip_paths
from srmu.reproduce import claims, experiment
from srmu.reproduce.curves import (
    BEFORE,
    Rows,
    Spec,
    build_figure,
    mean_kappa,
    original_row,
    plan_figure,
    relearn_points,
)
from srmu.reproduce.experiment import REGIMES, Experiment, MeasuredRow, OneModel, PlannedRow, Testbeds
from srmu.runs import estimate
from srmu.runs.config import load_config
from srmu.runs.plan import load_tokenizer, load_topics, plan_run
from srmu.testbed.atlas import list_regions

WORLDS = {"closed": "testbed", "atlas": "atlas"}  # what configs/reproduce.yaml calls them
FAST = 100e12  # FLOPs a second that one may expect of a data-centre GPU in bfloat16


def read_paper(what: str, own: str = "testbed") -> Spec:
    """What is run and asked at a place, with the tables and figures that a name stands for."""
    preset = experiment.read_preset("reproduce.yaml")
    spec = {"tables": preset["tables"], "figures": preset["figures"], **preset[own]}
    tables = {name: table for name, table in spec["tables"].items() if what in ("all", name.split("-")[0])}
    figures = {name: figure for name, figure in spec["figures"].items() if what in ("all", *figure["asked"])}
    return {**spec, "tables": tables, "figures": figures}


def plan_paper(
    out: Path,
    model: str = "",
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    world: str = "closed",
    regions: Sequence[str] = (),
) -> Experiment:
    """The experiment on testbeds of a world, or on the model that is named; SrmuError for what cannot be.

    On the atlas that model is asked what it knows. `regions` are those of the atlas; default: those of
    configs/reproduce.yaml.
    """
    if world not in WORLDS:
        raise SrmuError(f"--world {world}: the paper's tables are made of {' and '.join(WORLDS)}")
    if regions and world != "atlas":
        raise SrmuError("--regions belongs to --world atlas")
    for region in regions:
        list_regions(region)
    require_place(out)
    asked, model = (model, "") if world == "atlas" else ("", model)
    own = read_paper("all", "zephyr" if model else WORLDS[world])
    place: Testbeds | OneModel = OneModel(model, own) if model else Testbeds(out)
    if own.get("regions"):
        beds = {**own, "regions": [*dict.fromkeys(regions or own["regions"])]}
        cases = {case: bed for regime in REGIMES for case, bed in list_cases(regime, beds)}
        place = Testbeds(out, cases, "{regime}", world, oracle=False, model=asked)
    if model:
        settings = {label: tuple(one.get("set", ())) for label, one in own["methods"].items()}
    else:
        settings = experiment.read_settings(own["methods"])
    count = range(seeds or (1 if model else 3))  # on a model as in the paper: each run takes long
    return Experiment(out, place, settings, (*count,), tuple(own["tasks"]), overrides=tuple(overrides))


def choose_spec(what: str, plan: Experiment) -> Spec:
    """What is run and asked where an experiment is made."""
    if isinstance(plan.place, OneModel):
        return read_paper(what, "zephyr")
    regions = [bed["region"] for bed in plan.place.regimes.values() if "region" in bed]
    return {**read_paper(what, WORLDS[plan.place.world]), "regions": [*dict.fromkeys(regions)]}


def list_cases(regime: str, own: Spec) -> list[tuple[str, Mapping[str, Any]]]:
    """The testbeds of a regime by what an experiment calls it there: one, or one a region."""
    beds = [{"testbed": region, "region": region} for region in own.get("regions", ())] or [{}]
    return [(f"{regime} {bed.get('region', '')}".strip(), {**REGIMES[regime], **bed}) for bed in beds]


def reproduce_paper(
    what: str, plan: Experiment, *, command: str, watch: Watch = ignore_progress, make: bool = True
) -> dict[str, Any]:
    """Make the runs that are missing, and give the tables and figures: what `reproduce.json` holds.

    What is in the experiment's folder already is used again; without `make` nothing else is.
    """
    spec, place = choose_spec(what, plan), plan.place
    if isinstance(place, OneModel) and make:
        check_sources(plan, place)
    measure = partial(measure_rows, spec=spec, watch=watch, make=make)
    rows = measure(plan_rows(spec, plan), plan)
    if not make:
        spec = leave_out_unmade(spec, plan, rows, command)
    figures = [
        {**build_figure(name, figure, spec, rows), "relearned": relearn_points(figure, plan, measure)}
        for name, figure in spec["figures"].items()
    ]
    return {
        "kind": "reproduction",
        "paper": "arXiv 2512.16297",
        "model": strip_paths(place.name) if isinstance(place, OneModel) else WORLDS[place.world],
        "command": command,
        "seeds": [*plan.seeds],
        "regions": [*spec.get("regions", ())],
        "tables": [build_table(name, table, spec, plan, rows) for name, table in spec["tables"].items()],
        "figures": figures,
    }


def leave_out_unmade(spec: Spec, plan: Experiment, rows: Rows, command: str) -> Spec:
    """The tables and figures of which something was run; SrmuError where nothing was."""
    tables = {k: v for k, v in spec["tables"].items() if any(rows[row].runs for row in plan_table(v, plan))}
    series = {k: chain.from_iterable(p.values() for p in plan_figure(v).values()) for k, v in spec["figures"].items()}
    figures = {k: spec["figures"][k] for k, points in series.items() if any(rows[row].runs for row in points)}
    if not tables and not figures:
        raise SrmuError(experiment.say_nothing_run(plan.out, command))
    return {**spec, "tables": tables, "figures": figures}


def measure_rows(rows: Iterable[PlannedRow], plan: Experiment, *, spec: Spec, watch: Watch, make: bool) -> Rows:
    """Each row with the runs of all its testbeds, those that are missing made with `make`."""
    cases = {row: split_row(row, spec) for row in rows}
    measured = experiment.run_experiment(plan, chain.from_iterable(cases.values()), watch, make=make)
    return {row: join_rows(row.label, [measured[case] for case in own]) for row, own in cases.items()}


def split_row(row: PlannedRow, own: Spec) -> list[PlannedRow]:
    """A row's parts, one a testbed of its regime; of a row that is run once the first."""
    cases = [row._replace(regime=case) for case, _ in list_cases(row.regime, own)]
    return cases[:1] if row.once else cases


def join_rows(label: str, rows: Sequence[MeasuredRow]) -> MeasuredRow:
    """One row of the runs of several testbeds, whose questions are not the same; those not run are left out."""
    made = [row for row in rows if row.why != NOT_RUN] or rows[:1]
    if len(rows) == 1 or any(row.why for row in made):
        return next((row for row in made if row.why), made[0])
    runs = tuple(chain.from_iterable(row.runs for row in made))
    asked = tuple(number for number, row in enumerate(rows) for _ in row.runs)
    return MeasuredRow(label, runs, asked, missing=sum(row.missing for row in rows))


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
    series = [points for figure in spec["figures"].values() for points in plan_figure(figure).values()]
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


def build_table(name: str, table: Spec, own: Spec, plan: Experiment, measured: Rows) -> dict[str, Any]:
    """A table with the paper's numbers beside ours, and its claims."""
    planned = {row.label: measured[row] for row in plan_table(table, plan)}
    lines = {BEFORE: original_row([*planned.values()]), **planned}
    paper = {label: add_mean(values) for label, values in table["rows"].items()}
    rows = []
    for label in dict.fromkeys([*table["rows"], *lines]):
        row: dict[str, Any] = {"label": label, "cells": {}, "kappa": None, "paper": paper.get(label, {})}
        line = lines.get(label) or MeasuredRow(label, (), (), why=NOT_RUN)
        if line.why:
            row["why"] = line.why
        else:
            row["cells"] = claims.estimate_cells(line, own["columns"])
            row["kappa"] = mean_kappa(line) if line.when == "after" else None
        rows.append(row)
    return {
        "name": name,
        **{key: table[key] for key in ("title", "note", "paper_columns")},
        "missing": sum(line.missing for line in planned.values()),
        "columns": [*own["columns"]],
        "rows": rows,
        "claims": [claims.judge_row(claim, lines, own, paper) for claim in table["claims"]],
    }


def add_mean(row: Mapping[str, float]) -> dict[str, float]:
    """The paper's percentages as fractions, with the mean of bio and cyber that it calls WMDP."""
    shares = {key: value / 100 for key, value in row.items()}
    if {"bio", "cyber"} <= shares.keys():
        shares["WMDP"] = (shares["bio"] + shares["cyber"]) / 2
    return shares


# ---- what it takes


def paper_needs(what: str, plan: Experiment) -> tuple[dict[str, Any], list[str]]:
    """What the runs need, in numbers and in lines; makes and fetches nothing."""
    spec, place = choose_spec(what, plan), plan.place
    rows = plan_rows(spec, plan)
    if isinstance(place, Testbeds):
        parts = [part for row in rows for part in split_row(row, spec)]
        runs = [(part, seed) for part in parts for seed in experiment.list_seeds(plan, part)]
        beds = len({place.locate(part.regime, seed) for part, seed in runs})
        each = "a minute or more" if place.world == "atlas" else "some seconds"
        return {"testbeds": beds, "runs": len(runs)}, [
            f"{count_words(beds, 'testbed')}, a few minutes each where none was built before, and at "
            f"most {len(runs)} runs of {each}; nothing is fetched"
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
