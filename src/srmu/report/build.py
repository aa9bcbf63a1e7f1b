"""Runs, a sweep, an automatic choice or a reproduction as one page that opens anywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srmu.errors import SrmuError
from srmu.evals.compare import choose_metrics, metrics_of
from srmu.evals.results import read_attacks, read_benchmarks
from srmu.evals.settings import method_label, run_setting, setting_words
from srmu.report import studies
from srmu.report.attacks import Recovery, attack_section, measure_recovery
from srmu.report.benchmarks import benchmark_sections
from srmu.report.format import count_words, metric_words, name_words
from srmu.report.html import Page, Section, share_cell
from srmu.report.results import (
    GroupRow,
    RunGroup,
    aggregate_columns,
    has_results,
    read_results,
    read_run_file,
    strip_paths,
)
from srmu.report.runs import (
    importance_section,
    other_section,
    record_sections,
    subject_section,
    tradeoff_section,
    training_section,
)
from srmu.runs.run import Run

MEAN = "mean utility"  # the column that the vertical axis of the trade-off plot shows
LISTED = 4  # folders in the command that a page shows
STUDIES = {"sweep.json": "sweep", "reproduce.json": "reproduction", "auto.json": "auto"}
SUPPRESSED = (
    "A low score says that the knowledge is suppressed: the model no longer answers. It does not "
    "say that the knowledge is gone from the weights."
)
NO_ATTACK = (
    "No attack was run here, and suppressed knowledge has often been brought back by a few steps "
    "of further training: suppressed, not attacked."
)


def write_report(paths: Sequence[Path], out: Path, *, forget: Sequence[str] = (), utility: Sequence[str] = ()) -> Path:
    """Write the page on the runs in the folders `paths`, or on the one study that they name.

    `forget` and `utility` name metrics of `results.json`; by default those that the attacks asked,
    else those of the testbed or WMDP, and the other tasks that the runs were to be evaluated on.
    SrmuError where there is nothing to show, which leaves `out` as it was.
    """
    for path in paths:
        if not path.is_dir():
            raise SrmuError(f"{path} is not a folder; name that of a run, or one that holds runs")
    folders = [path.resolve().name for path in paths]
    typed = folders if len(folders) <= LISTED else [*folders[:LISTED], "\N{HORIZONTAL ELLIPSIS}"]
    command = " ".join(["srmu report", *typed, "-o", out.name])
    named = [(path, name) for path in paths for name in STUDIES if (path / name).is_file()]
    if not named:
        entries, notes = list_entries(paths)
        forget, utility = find_metrics(entries, forget, utility)
        return make_runs_page(entries, "", forget, utility, command, notes).write(out)
    (path, name), *_ = named
    if len(paths) > 1:
        raise SrmuError(f"{path} holds a {STUDIES[name]}, which has a report of its own: name it alone")
    study = read_run_file(path / name)
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


def write_runs_page(
    entries: Sequence[RunGroup],
    out: Path,
    *,
    title: str,
    forget_metrics: Sequence[str],
    utility_metrics: Sequence[str],
    command: str,
) -> Path:
    """Write the report on `entries` to the file `out`.

    The trade-off plot shows the first forget metric against the mean of the utility metrics, so
    these must be accuracies. `title`, `command` and the labels are printed as they are: keep
    paths to private data out of them.
    """
    return make_runs_page(entries, title, forget_metrics, utility_metrics, command).write(out)


# ---- what there is to report


def list_entries(paths: Sequence[Path]) -> tuple[list[RunGroup], list[str]]:
    """The runs in these folders, those together that differ in their seed or testbed alone.

    And notes on runs that were left out.
    """
    folders: dict[Path, Path] = {}
    unmeasured = 0
    for path in paths:
        runs = [path] if (path / "record.json").is_file() else list_runs(path)
        if not runs:
            if (path / "config.yaml").is_file():
                Run.open(path)  # says how to finish it
            raise SrmuError(
                f"{path} holds no run, sweep or reproduction: srmu unlearn, srmu sweep and srmu reproduce make them"
            )
        measured = [run for run in runs if has_results(run)]
        measured = measured or [run for run in runs if read_benchmarks(run)]
        if not measured:
            raise SrmuError(f"{runs[0]} has no results; run `srmu eval {runs[0]}` first")
        unmeasured += len(runs) - len(measured)
        folders |= {run.resolve(): run for run in measured}
    left_out = f"{count_words(unmeasured, 'run')} without results left out: srmu eval measures a run."
    entries = group_runs([Run.open(folder) for folder in folders.values()])
    return entries, [left_out] if unmeasured else []


def list_runs(folder: Path) -> list[Path]:
    """The finished runs one or two levels below a folder."""
    records = [*folder.glob("*/record.json"), *folder.glob("*/*/record.json")]
    return sorted(path.parent for path in records)


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """An entry for each method and strength; strengths of one method are in its label."""
    kinds = {run.folder: setting_words(run.config) for run in runs}
    points: dict[Hashable, list[Run]] = {}
    for run in runs:
        points.setdefault(run_setting(run.config), []).append(run)
    named: dict[str, list[tuple[Mapping[str, Any], list[Run]]]] = {}
    for same in points.values():
        name = re.sub(r"\.jsonl?\b", "", method_label(kinds[same[0].folder], kinds.values()))
        named.setdefault(name, []).append((dict(run_setting(same[0].config)), same))
    entries = []
    for name, strengths in sorted(named.items()):
        apart = [
            key for key, value in strengths[0][0].items() if any(other.get(key) != value for other, _ in strengths)
        ]
        for options, same in sorted(strengths, key=lambda one: [one[0].get(k) or 0 for k in apart]):
            numbers = [f"{key.rpartition('.')[2]}={options.get(key)}" for key in apart]
            label = ", ".join([name, *numbers])
            entries.append(RunGroup(label, "", tuple(run.folder for run in same)))
    return entries


def find_metrics(
    entries: Sequence[RunGroup], forget: Sequence[str], utility: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The metrics of what is to be forgotten and kept; none of runs with benchmarks alone."""
    runs = [run for entry in entries for run in entry.runs]
    if not any(has_results(run) for run in runs):
        return [], []
    known = list(dict.fromkeys(name for run in runs for name in read_results(run)["after"]))
    for name in (*forget, *utility):
        if name not in known:
            raise SrmuError(f"no run has the result {name}; there are {', '.join(known)}")
    asked = [metrics_of(one) for run in runs if (one := read_attacks(run))]
    if asked:
        joined = " + ".join(name.removesuffix("/acc") for name in asked[0][0]) + "/acc"
        forget = forget or [name for name in asked[0][0] if name in known] or [joined]
        utility = utility or [name for name in asked[0][1] if name in known]
    tasks = [task for run in runs for task in Run.open(run).config.eval]
    return choose_metrics(known, forget, utility, tasks)


# ---- pages on runs


def make_runs_page(
    entries: Sequence[RunGroup],
    title: str,
    forget: Sequence[str],
    utility: Sequence[str],
    command: str,
    notes: Sequence[str] = (),
) -> Page:
    """The page on runs: one, or several to compare; without metrics one on their benchmarks."""
    labels = list(dict.fromkeys(entry.label for entry in entries))
    recoveries = [measure_recovery(entry) for entry in entries]
    columns = {metric: [metric] for metric in (*forget, *utility)}
    if len(utility) > 1:
        columns[MEAN] = list(utility)
    parts = make_sections(entries, labels, recoveries, list(columns))
    several = len(entries) > 1
    if columns:
        rows = aggregate_columns(entries, columns)
        parts.insert(0, tradeoff_section(rows, labels, list(columns), forget, recoveries))
        first = describe_comparison(rows, forget)
        own = f"{labels[0]}: what was forgotten, and what came back"
        if not several:
            first = describe_method(rows[0], forget[0], list(columns)[-1])
    else:
        first = (
            "Benchmarks of unlearning, each as its paper prints it, of the original model and of "
            "what unlearning left of it."
        )
        own = f"{labels[0]}: benchmarks"
    title = title or ("Ways of unlearning side by side" if several else own)
    return Page(title, [first, describe_attempts(recoveries), *notes], parts, command, labels)


def make_sections(
    entries: Sequence[RunGroup], labels: Sequence[str], recoveries: Sequence[Recovery | None], known: Sequence[str]
) -> list[Section]:
    """What there is to say of runs beyond the trade-off; only what they have data on."""
    parts = [
        *benchmark_sections(entries, labels),
        attack_section(entries, labels, recoveries),
        training_section(entries, labels),
        importance_section(entries, labels),
        subject_section(entries),
        other_section(entries, known),
        *record_sections(entries),
    ]
    return [part for part in parts if part]


def describe_method(row: GroupRow, forget: str, kept: str) -> str:
    """What one method did, in a sentence."""
    parts = []
    for name in (forget, kept):
        if name in row.after:
            before = f"from {row.before[name].value:.1%} " if name in row.before else ""
            parts.append(f"{metric_words(name)} went {before}to {row.after[name].value:.1%}")
    over = f"over {row.seeds} seeds" if row.seeds > 1 else "in one run"
    return (
        f"{row.label}, {over}: {' and '.join(parts)}. A good result brings the first down to "
        "chance, which is 25 % with four options, and leaves the second where it was."
    )


def describe_comparison(rows: Sequence[GroupRow], forget: Sequence[str]) -> str:
    """What a comparison shows, in sentences."""
    groups = list(dict.fromkeys(row.group for row in rows))
    ways = count_words(len({row.label for row in rows}), "way")
    seeds = " or ".join(map(str, sorted({row.seeds for row in rows})))
    inside = f" in {len(groups)} settings ({', '.join(groups)})" if len(groups) > 1 else ""
    return (
        f"This page compares {ways} of making a language model "
        f"unlearn chosen knowledge{inside}. The same questions were asked before and after. A good "
        f"result brings the score on the knowledge to forget "
        f"({', '.join(map(metric_words, forget))}) "
        "down to chance, which is 25 % with four options, and leaves every other score where it "
        f"was. Numbers are means over {seeds} seed{'' if seeds == '1' else 's'} with 95 % "
        "intervals; where two intervals overlap widely, this comparison does not tell the methods "
        "apart."
    )


def describe_attempts(recoveries: Sequence[Recovery | None], whose: str = "methods") -> str:
    """What was done to bring the knowledge back, and what that says."""
    attacked = sorted((one for one in recoveries if one), key=lambda one: one.worst.value)
    if not attacked:
        return f"{SUPPRESSED} {NO_ATTACK}"
    tried = len({name for one in attacked for name in one.attacks} - {"forced_choice"})
    tiers = ", ".join(dict.fromkeys(one.tier for one in recoveries if one))
    text = f"{tried} attacks (tier: {tiers}) tried to bring it back. "
    least, most = share_cell(attacked[0].worst), share_cell(attacked[-1].worst)
    if len(attacked) == 1:
        text += (
            f"The strongest, {name_words(attacked[0].strongest)}, found "
            f"{attacked[0].worst.value:.0%} of the original knowledge (K* = {most.text}, 95 % "
            f"interval {most.span})."
        )
    else:
        text += (
            "K*, the share of the original knowledge that the best attack found, lies between "
            f"{least.text} and {most.text}."
        )
    if len(attacked) < len(recoveries):
        missing = len(recoveries) - len(attacked)
        text += f" {missing} of {len(recoveries)} {whose} were not attacked."
    return f"{text} {SUPPRESSED}"


# ---- pages on studies


def make_sweep_page(folder: Path, study: studies.Study, command: str) -> Page:
    """The page on a sweep, with the runs on its front that are still there."""
    done = studies.complete_trials(study)
    if not done:
        raise SrmuError(f"{folder} has no finished trial yet; go on with `srmu sweep`")
    ways = {"minimize": "lowest", "maximize": "highest"}
    wanted = " and the ".join(f"{ways[way]} {metric_words(metric)}" for metric, way in study["objectives"].items())
    entries = [
        RunGroup(f"trial {trial['number']}", "", tuple(folder / run for run in trial["runs"]))
        for trial in done
        if trial["number"] in study["front"] and trial["runs"]
        if all((folder / run / "config.yaml").is_file() for run in trial["runs"])
    ]
    recoveries = [measure_recovery(entry) for entry in entries]
    others = [None] * (len(study["front"]) - len(entries))
    headline = [
        f"{len(done)} of {len(study['trials'])} trials, each over "
        f"{count_words(len(study['seeds']), 'seed')}, in search of the {wanted}; "
        f"{len(study['front'])} of them no other trial beats.",
        describe_attempts([*recoveries, *others], "trials on the front"),
    ]
    labels = [entry.label for entry in entries]
    parts = studies.sweep_sections(study)
    parts += make_sections(entries, labels, recoveries, list(study["objectives"]))
    shown = [*studies.sweep_labels(study), *labels]
    return Page(f"Sweep {study['name']}", headline, parts, command, shown)


def make_reproduction_page(study: studies.Study, command: str) -> Page:
    """The page on a reproduction of the paper."""
    claims = [one for part in (*study["tables"], *study["figures"]) for one in part["claims"]]
    verdicts = Counter(one["verdict"] for one in claims)
    model = name_words(str(study["model"])).rpartition("/")[2]
    first = (
        f"The paper's experiments repeated on {model} over "
        f"{count_words(len(study['seeds']), 'seed')}, beside the paper's own numbers."
    )
    if claims:
        count = ", ".join(f"{verdict}: {many}" for verdict, many in verdicts.items())
        first += f" Of {len(claims)} claims, {count}."
    headline = [
        first,
        "Another model and other knowledge than the paper's give other numbers; what can hold or "
        "not is the order of the methods. A low score says that knowledge is suppressed, not that "
        "it is gone; no attack was run here: suppressed, not attacked.",
    ]
    parts = studies.reproduction_sections(study)
    command = strip_paths(study.get("command") or command)
    labels = studies.reproduction_labels(study)
    return Page("The paper's tables, repeated", headline, parts, command, labels)


def make_auto_page(
    folder: Path, study: studies.Study, command: str, forget: Sequence[str], utility: Sequence[str]
) -> Page:
    """The page on an automatic choice, and on the run that it came to."""
    parts = studies.auto_sections(study)
    headline = [
        f"Layer and strength were chosen to forget most at a loss of at most {study['budget']:.1%} of the utility."
    ]
    if not study.get("run"):
        headline.append("Nothing was chosen: the last step below says why, or where it stopped.")
        return Page("Chosen automatically", headline, parts, command)
    entries, _ = list_entries([folder / study["run"]])
    page = make_runs_page(entries, "", *find_metrics(entries, forget, utility), command)
    parts += page.sections
    return Page("Chosen automatically", [*headline, *page.headline], parts, command)
