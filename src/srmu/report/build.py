"""Runs, a sweep, an automatic choice or a reproduction as one page that opens anywhere."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from srmu.attacks import ATTACKS
from srmu.engine.files import read_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, suggest_path
from srmu.evals.compare import choose_metrics, leave_out_repetition, measure_change, metrics_of, spell_metrics
from srmu.evals.peers import PeerResults, find_peers
from srmu.evals.results import PLAIN, UNATTACKED, load_results, read_attacks
from srmu.report import markdown, results, runs, studies
from srmu.report.attacks import Recovery, attack_section, estimate_recovery
from srmu.report.benchmarks import benchmark_sections
from srmu.report.format import count_words, describe_copies, format_share, name_words, write_words
from srmu.report.html import Page, Section
from srmu.report.maps import map_section, read_maps
from srmu.report.results import GroupRow, RunGroup
from srmu.report.samples import Samples, sample_section
from srmu.runs.config import read_tree
from srmu.runs.record import CONFIG, RECORD
from srmu.runs.run import Run
from srmu.runs.setting import drop_copies, method_label, run_setting, setting_words

STUDIES = ("sweep.json", "reproduce.json", "auto.json")
MEAN = "mean utility"  # the column that the vertical axis of the trade-off plot shows


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    forget: Sequence[str] = (),
    utility: Sequence[str] = (),
    budget: float | None = None,
    samples: Samples | None = None,
    watch: Watch = ignore_progress,
) -> Path:
    """Write the page on the runs in the folders `paths`, or on the one study that they name.

    Files that open-unlearning wrote, or their folders, stand in the tables of benchmarks.

    `forget` and `utility` name metrics of `results.json`; by default those that the attacks asked,
    else those of the testbed or WMDP, and the other tasks that the runs were to be evaluated on.
    `budget` is the most utility that was to be lost, which the page then holds one method against. `samples` shows what
    the models write, for which they are loaded; with "forget" after forget texts, too, which are then on the page.
    SrmuError where there is nothing to show, which leaves `out` as it was.
    """
    folders, peers = find_peers(paths)
    for path in folders:
        if not path.is_dir():
            advice = suggest_path(path) or "; name that of a run, or one that holds runs"
            raise SrmuError(f"{path} is not a folder{advice}")
    options = [
        f"--{option} {value}" for option, value in (("budget", budget), ("samples", samples)) if value is not None
    ]
    command = " ".join(["srmu report", *(path.resolve().name for path in paths), "-o", out.name, *options])
    named = [(path, name) for path in folders for name in STUDIES if (path / name).is_file()]
    if not named:
        entries, notes = list_entries(folders)
        if not entries and options:
            raise SrmuError(f"{options[0]} is for runs; name one beside {paths[0]}")
        if budget is not None and len(entries) > 1:
            raise SrmuError("--budget is for one method; to compare several: srmu compare RUN RUN --budget 1%")
        forget, utility = find_metrics(entries, forget, utility)
        page = make_runs_page(entries, forget, utility, command, notes=notes, budget=budget, peers=peers)
        if samples:
            page = replace(
                page, sections=[*page.sections[:1], sample_section(entries, samples, watch), *page.sections[1:]]
            )
        return page.write(out)
    (path, name), *_ = named
    for option, given in (("budget", budget), ("samples", samples)):
        if given is not None:
            raise SrmuError(f"--{option} is for runs; {path} holds {name}")
    if len(paths) > 1:
        raise SrmuError(f"{path} holds {name}, which has a report of its own: name it alone")
    study = read_json(path / name)
    try:
        if name == "sweep.json":
            page = make_sweep_page(path, study, command)
        elif name == "reproduce.json":
            page = make_reproduction_page(study, command)
        else:
            page = make_auto_page(path, study, command, forget, utility)
    except (KeyError, TypeError) as error:
        raise SrmuError(f"{path / name} is damaged: no {error}; make it again") from None
    return page.write(out)


# ---- what there is to report


def list_entries(paths: Sequence[Path]) -> tuple[list[RunGroup], list[str]]:
    """The runs in these folders, those together that differ in their seed or testbed alone.

    Where some were measured, these alone, and of copies the first, with a note on the others.
    """
    folders: dict[Path, Path] = {}
    measured: dict[Path, Path] = {}
    for path in paths:
        records = [*path.glob("*/record.json"), *path.glob("*/*/record.json")]
        made = [path] if (path / "record.json").is_file() else sorted(record.parent for record in records)
        if not made:
            if (path / "config.yaml").is_file():
                Run.open(path)  # says how to finish it
            raise SrmuError(
                f"{path} holds no run, sweep or reproduction: srmu unlearn, srmu sweep and srmu reproduce make them"
            )
        measured |= {run.resolve(): run for run in made if load_results(run)["rows"]}
        folders |= {run.resolve(): run for run in made}
    unmeasured = len(folders) - len(measured)
    left_out = f"{count_words(unmeasured, 'run')} without results left out: srmu eval measures a run."
    named = [Run.open(folder) for folder in (measured or folders).values()]
    opened = drop_copies(named)
    notes = [left_out] if measured and unmeasured else []
    return group_runs(opened), [*notes, *describe_copies(len(named) - len(opened))]


def group_runs(made: Sequence[Run]) -> list[RunGroup]:
    """An entry for each method and strength; strengths of one method are in its label."""
    kinds = [setting_words(run.config) for run in made]
    named: dict[str, dict[tuple[tuple[str, Any], ...], list[Path]]] = {}  # by a method's name and its setting
    for run, kind in zip(made, kinds, strict=True):
        name = re.sub(r"\.jsonl?\b", "", method_label(kind, kinds))
        named.setdefault(name, {}).setdefault(run_setting(run.config), []).append(run.folder)
    entries = []
    for name, points in sorted(named.items()):
        strengths = [(dict(setting), folders) for setting, folders in points.items()]
        first = strengths[0][0]
        apart = [key for key in first if any(other.get(key) != first[key] for other, _ in strengths)]
        for options, folders in sorted(strengths, key=lambda one: [one[0].get(key) or 0 for key in apart]):
            label = ", ".join([name, *(f"{key.rpartition('.')[2]}={options.get(key)}" for key in apart)])
            entries.append(RunGroup(label, "", tuple(folders)))
    return entries


def find_metrics(
    entries: Sequence[RunGroup], forget: Sequence[str], utility: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The metrics of what is to be forgotten and kept; none of runs with benchmarks alone."""
    folders = [run for entry in entries for run in entry.runs]
    known = leave_out_repetition(dict.fromkeys(name for run in folders for name in results.read_results(run)["after"]))
    if not known:
        return (), ()
    forget, utility = spell_metrics(forget, known), spell_metrics(utility, known)
    for name in (*forget, *utility):
        if name not in known:
            raise SrmuError(f"no run has the result {name}; there are {', '.join(known)}")
    asked = [metrics_of(one) for run in folders if (one := read_attacks(run))]
    if asked:
        joined = " + ".join(name.removesuffix("/acc") for name in asked[0][0]) + "/acc"
        forget = forget or [name for name in asked[0][0] if name in known] or [joined]
        utility = utility or [name for name in asked[0][1] if name in known]
    tasks = [task for run in folders for task in Run.open(run).config.eval]
    return choose_metrics(known, forget, utility, tasks)


# ---- pages on runs


def make_runs_page(
    entries: Sequence[RunGroup],
    forget: Sequence[str],
    utility: Sequence[str],
    command: str,
    title: str = "",
    notes: Sequence[str] = (),
    budget: float | None = None,
    peers: Sequence[PeerResults] = (),
) -> Page:
    """The page on runs: one, or several to compare; without metrics one on their benchmarks, or on what was attempted.

    `peers` are models that another tool measured, for the tables of benchmarks.

    The trade-off plot shows the first forget metric against the mean of the utility metrics, so
    these must be accuracies. `title`, `command` and the labels are printed as they are: keep
    paths to private data out of them.
    """
    labels = list(dict.fromkeys([*(entry.label for entry in entries), *(one.name for one in peers)]))
    recoveries = [estimate_recovery(entry) for entry in entries]
    columns = {metric: [metric] for metric in (*forget, *utility)}
    if len(utility) > 1:
        columns[MEAN] = list(utility)
    parts = make_sections(entries, labels, recoveries, list(columns), peers)
    folders = [run for entry in entries for run in entry.runs]
    measured = bool(peers) or any(load_results(run)["rows"] for run in folders)
    came_back = ", and what came back" if any(recoveries) else ""
    own = f"{labels[0]}: what was forgotten{came_back}" if columns else f"{labels[0]}: benchmarks"
    if columns:
        rows = results.aggregate_columns(entries, columns)
        parts.insert(0, runs.tradeoff_section(rows, labels, list(columns), forget, recoveries))
        words = (
            write_words(
                "comparison",
                groups=[*dict.fromkeys(row.group for row in rows)],
                ways=count_words(len(labels), "way"),
                seeds=sorted({len(row.runs) for row in rows}),
                forget=[*map(name_words, forget)],
            )
            if len(entries) > 1
            else describe_method(rows[0], forget, utility, recoveries[0], budget)
        )
    elif measured:
        words = write_words("benchmarks")
    else:
        own = f"{labels[0]}: attempted; effect not measured"
        said = [text for run in folders for text in results.read_effect(run)]
        words = write_words("attempted", runs=count_words(len(folders), "run"), said=said)
    if maps := read_maps(entries):
        parts.insert(0, map_section(maps))
        words += write_words("map_headline", maps=maps)
    title = title or ("Ways of unlearning side by side" if len(entries) + len(peers) > 1 else own)
    attempts = describe_attempts(recoveries) if measured else []
    headline = [*words, *results.explain_degeneration(entries), *attempts, *notes]
    return Page(title, headline, parts, command, labels)


def make_sections(
    entries: Sequence[RunGroup],
    labels: Sequence[str],
    recoveries: Sequence[Recovery | None],
    known: Sequence[str],
    peers: Sequence[PeerResults] = (),
) -> list[Section]:
    """What there is to say of runs beyond the trade-off; only what they have data on."""
    parts = [
        *benchmark_sections(entries, labels, peers),
        attack_section(entries, labels, recoveries),
        runs.training_section(entries, labels),
        runs.importance_section(entries, labels),
        runs.other_section(entries, known),
        runs.record_section(entries),
    ]
    return [part for part in parts if part.blocks]


def describe_method(
    row: GroupRow, forget: Sequence[str], utility: Sequence[str], recovery: Recovery | None, budget: float | None
) -> list[str]:
    """What one method was to do, what is still answered, what was lost, and whether that is within the budget."""
    seeds = [(read_tree(folder / CONFIG)["model"], results.read_results(folder)) for folder in row.runs]
    asked = [own[when].get(name, {}) for _, own in seeds for when in own for name in (*forget, *utility)]
    left, lost = measure_change(seeds, forget, utility) if all(one.get("n") for one in asked) else (None, None)
    return write_words(
        "method",
        label=row.name,
        runs="in one run" if len(seeds) == 1 else f"over {len(seeds)} seeds",
        purpose=read_json(row.runs[0] / RECORD, {}).get("purpose", {}),
        forget=[*map(name_words, forget)],
        kept=[(name_words(name), row.before.get(name), row.after[name]) for name in utility],
        left=left or row.after[forget[0]],
        before=row.before.get(forget[0]),
        lost=lost,
        chance=recovery.chance if recovery else runs.CHANCE,
        budget=budget,
    )


def describe_attempts(recoveries: Sequence[Recovery | None], whose: str = "methods") -> list[str]:
    """What was done to bring the knowledge back, and what that says; of one method also what was not tried."""
    attacked = sorted((one for one in recoveries if one), key=lambda one: one.worst.value)
    alone = attacked[0] if attacked and len(recoveries) == 1 else None
    return write_words(
        "attempts",
        plain=name_words(PLAIN),
        known=len(ATTACKS) - len(UNATTACKED),
        not_tried=alone.not_tried if alone else (),
        prices=alone.prices if alone else (),
        tried=len({name for one in attacked for name in one.tried} - {*map(name_words, UNATTACKED)}),
        tiers=[*dict.fromkeys(one.tier for one in recoveries if one)],
        found=[(one.strongest, one.worst.value, format_share(one.worst)) for one in attacked],
        all=len(recoveries),
        whose=whose,
    )


# ---- pages on studies


def make_sweep_page(folder: Path, study: studies.Study, command: str) -> Page:
    """The page on a sweep, with the runs on its front that are still there."""
    done = studies.complete_trials(study["trials"])
    if not done:
        raise SrmuError(f"{folder} has no finished trial yet; go on with `srmu sweep`")
    entries = [
        RunGroup(f"trial {trial['number']}", "", tuple(folder / run for run in trial["runs"]))
        for trial in done
        if trial["number"] in study["front"] and trial["runs"]
        if all((folder / run / "config.yaml").is_file() for run in trial["runs"])
    ]
    recoveries = [estimate_recovery(entry) for entry in entries]
    others = [None] * (len(study["front"]) - len(entries))
    wanted = {name_words(metric): way for metric, way in study["objectives"].items()}
    seeds = count_words(len(study["seeds"]), "seed")
    headline = write_words("sweep", study=study, done=len(done), seeds=seeds, wanted=wanted)
    headline += describe_attempts([*recoveries, *others], "trials on the front")
    labels = [entry.label for entry in entries]
    parts = studies.sweep_sections(study)
    parts += make_sections(entries, labels, recoveries, list(study["objectives"]))
    return Page(f"Sweep {study['name']}", headline, parts, command, [studies.FRONT, studies.BEHIND, *labels])


def make_reproduction_page(study: studies.Study, command: str) -> Page:
    """The page on a reproduction of the paper: the tables and figures that the docs have, too."""
    parts = [*markdown.reproduction_sections(study).values()]
    claims = [one for part in (*study["tables"], *study["figures"]) for one in part["claims"]]
    headline = write_words(
        "repeated",
        model=str(study["model"]).rpartition("/")[2],
        seeds=count_words(len(study["seeds"]), "seed"),
        verdicts=Counter(one["verdict"] for one in claims),
        regions=study["regions"],
        relearned=any(one["relearned"] for one in study["figures"]),
    )
    command = results.strip_paths(study.get("command") or command)
    return Page("The tables of the SRMU paper, reproduced", headline, parts, command, markdown.study_labels(study))


def make_auto_page(
    folder: Path, study: studies.Study, command: str, forget: Sequence[str], utility: Sequence[str]
) -> Page:
    """The page on an automatic choice, and on the run that it came to."""
    parts = studies.auto_sections(study)
    headline = write_words("auto", budget=study["budget"], chosen=bool(study.get("run")))
    if not study.get("run"):
        return Page("Layer and strength found by srmu auto", headline, parts, command)
    entries, _ = list_entries([folder / study["run"]])
    page = make_runs_page(entries, *find_metrics(entries, forget, utility), command, budget=study["budget"])
    return Page("Layer and strength found by srmu auto", [*headline, *page.headline], [*parts, *page.sections], command)
