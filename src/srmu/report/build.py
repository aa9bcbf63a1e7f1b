"""Runs, a sweep, an automatic choice or a reproduction as one page that opens anywhere."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srmu.errors import SrmuError
from srmu.evals.benchmarks.score import FILE
from srmu.evals.compare import method_label, metrics_of, run_setting, setting_words
from srmu.report import runs as sections
from srmu.report import studies
from srmu.report.attacks import Recovery, attack_section, measure_recovery
from srmu.report.benchmarks import benchmark_sections
from srmu.report.format import metric_words, name_words, share_cell
from srmu.report.html import Page, Section
from srmu.report.results import (
    GroupRow,
    RunGroup,
    aggregate_columns,
    has_file,
    read_results,
    read_run_file,
    strip_paths,
)
from srmu.runs.run import Run

MEAN = "mean utility"  # the column that the vertical axis of the trade-off plot shows

FORGET = ("organism_hazard", "wmdp", "forget_texts")  # how tasks on what is to go are named
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


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    forget: Sequence[str] = (),
    utility: Sequence[str] = (),
) -> Path:
    """Write the page on the runs in the folders `paths`, or on the one study that they name.

    `forget` and `utility` name metrics of `results.json`; by default those that the attacks asked,
    else those of the testbed or WMDP, and the other tasks that the runs were to be evaluated on.
    SrmuError where there is nothing to show, which leaves `out` as it was.
    """
    for path in paths:
        if not path.is_dir():
            raise SrmuError(f"{path} is not a folder; name that of a run, or one that holds runs")
    named = [(path, name) for path in paths for name in STUDIES if (path / name).is_file()]
    folders = [path.resolve().name for path in paths]
    typed = folders if len(folders) <= LISTED else [*folders[:LISTED], "\N{HORIZONTAL ELLIPSIS}"]
    command = " ".join(["srmu report", *typed, "-o", out.name])
    if not named:
        entries, notes = entries_of(paths)
        if not any(has_file(run, "results.json") for entry in entries for run in entry.runs):
            return page_of_suites(entries, command, notes).write(out)
        forget, utility = choose_metrics(entries, forget, utility)
        return page_of_runs(entries, "", forget, utility, command, notes).write(out)
    if len(paths) > 1:
        raise SrmuError(
            f"{named[0][0]} holds a {STUDIES[named[0][1]]}, which has a report of its own: name "
            "it alone"
        )
    (path, name), *_ = named
    return page_of_study(path, name, command, forget, utility).write(out)


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
    return page_of_runs(entries, title, forget_metrics, utility_metrics, command).write(out)


# ---- what there is to report


def entries_of(paths: Sequence[Path]) -> tuple[list[RunGroup], list[str]]:
    """The runs in these folders, those that differ in their seed or testbed together.

    And what to know of those that were left out.
    """
    folders: dict[Path, Path] = {}
    unmeasured = []
    for path in paths:
        found = [path] if (path / "record.json").is_file() else runs_in(path)
        if not found:
            raise SrmuError(
                f"{path} holds no run, sweep or reproduction: srmu unlearn, srmu sweep and srmu "
                "reproduce make them"
            )
        measured = [run for run in found if has_file(run, "results.json")]
        measured = measured or [run for run in found if has_file(run, FILE)]
        if not measured:
            raise SrmuError(f"{found[0]} has no results; run `srmu eval {found[0]}` first")
        unmeasured += [run for run in found if run not in measured]
        folders |= {run.resolve(): run for run in measured}
    runs = [Run.open(folder) for folder in folders.values()]
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
            key
            for key, value in strengths[0][0].items()
            if any(other.get(key) != value for other, _ in strengths)
        ]
        for options, same in sorted(strengths, key=lambda one: [one[0].get(k) or 0 for k in apart]):
            numbers = [f"{key.rpartition('.')[2]}={options.get(key)}" for key in apart]
            whole = ", ".join([name, *numbers])
            entries.append(RunGroup(whole, "", tuple(run.folder for run in same)))
    notes = []
    if unmeasured:
        some = "1 run has" if len(unmeasured) == 1 else f"{len(unmeasured)} runs have"
        notes.append(f"{some} no results yet and is not shown: srmu eval measures a run.")
    return entries, notes


def runs_in(folder: Path) -> list[Path]:
    """The finished runs one or two levels below a folder."""
    found = [*folder.glob("*/record.json"), *folder.glob("*/*/record.json")]
    return sorted(path.parent for path in found)


def choose_metrics(
    entries: Sequence[RunGroup], forget: Sequence[str], utility: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The metrics of what is to be forgotten and of what is to be kept."""
    runs = [run for entry in entries for run in entry.runs]
    known = list(dict.fromkeys(name for run in runs for name in read_results(run)["after"]))
    for name in (*forget, *utility):
        if name not in known:
            raise SrmuError(f"no run has the result {name}; there are {', '.join(known)}")
    tasks = [task for run in runs for task in Run.open(run).config.eval]
    asked = [
        metrics_of(attacks) for run in runs if (attacks := read_run_file(run / "attacks.json"))
    ]
    if asked:
        joined = " + ".join(name.removesuffix("/acc") for name in asked[0][0]) + "/acc"
        forget = forget or [name for name in asked[0][0] if name in known] or [joined]
        utility = utility or [name for name in asked[0][1] if name in known]
    # of a task's other halves none is in the plot
    whole = [name for name in known if re.search(r"(?<!_val)(?<!_held)/acc$", name)]
    forget = forget or [name for name in whole if name.startswith(FORGET)]
    left = [name for name in whole if name not in forget]
    utility = utility or [name for name in left if name.removesuffix("/acc") in tasks] or left
    for which, option in ((forget, "--metrics"), (utility, "--utility-metrics")):
        if not which:
            what = "should fall" if option == "--metrics" else "should stay"
            raise SrmuError(
                f"{option}: name the metrics that {what}, a,b; there are {', '.join(known)}"
            )
    return list(forget), list(utility)


# ---- pages


def page_of_runs(
    entries: Sequence[RunGroup],
    title: str,
    forget: Sequence[str],
    utility: Sequence[str],
    command: str,
    notes: Sequence[str] = (),
) -> Page:
    """The page on runs: one, or several to compare."""
    columns = {metric: [metric] for metric in (*forget, *utility)}
    if len(utility) > 1:
        columns[MEAN] = list(utility)
    labels = list(dict.fromkeys(entry.label for entry in entries))
    measured = aggregate_columns(entries, columns)
    found = [measure_recovery(entry) for entry in entries]
    parts = [
        sections.tradeoff_section(measured, labels, list(columns), forget, found),
        *parts_of_runs(entries, labels, found, list(columns)),
    ]
    if len(entries) > 1:
        headline = [describe_comparison(measured, forget)]
    else:
        title = title or f"{entries[0].label}: what was forgotten, and what came back"
        headline = [describe_method(measured[0], forget[0], list(columns)[-1])]
    headline.append(describe_attempts(found))
    return Page(
        title or "Ways of unlearning side by side",
        [*headline, *notes],
        parts,
        command,
        labels,
    )


def page_of_suites(entries: Sequence[RunGroup], command: str, notes: Sequence[str] = ()) -> Page:
    """The page on runs that were measured on benchmarks only."""
    labels = list(dict.fromkeys(entry.label for entry in entries))
    found = [measure_recovery(entry) for entry in entries]
    headline = [
        "Benchmarks of unlearning, each as its paper prints it, of the original model and of what "
        "unlearning left of it.",
        describe_attempts(found),
    ]
    title = entries[0].label if len(entries) == 1 else "Ways of unlearning side by side"
    parts = parts_of_runs(entries, labels, found, [])
    return Page(f"{title}: benchmarks", [*headline, *notes], parts, command, labels)


def parts_of_runs(
    entries: Sequence[RunGroup],
    labels: Sequence[str],
    found: Sequence[Recovery | None],
    known: Sequence[str],
) -> list[Section]:
    """What there is to say of runs beyond the trade-off; only what they have data on."""
    parts = [
        *benchmark_sections(entries, labels),
        attack_section(entries, labels, found),
        sections.training_section(entries, labels),
        sections.importance_section(entries, labels),
        sections.subject_section(entries),
        sections.other_section(entries, known),
        *sections.record_sections(entries),
    ]
    return [part for part in parts if part]


def describe_method(row: GroupRow, forget: str, kept: str) -> str:
    """What one method did, in a sentence."""
    parts = []
    for name in (forget, kept):
        if name in row.after:
            before = f"from {row.before[name].mean:.1%} " if name in row.before else ""
            parts.append(f"{metric_words(name)} went {before}to {row.after[name].mean:.1%}")
    over = f"over {row.seeds} seeds" if row.seeds > 1 else "in one run"
    return (
        f"{row.label}, {over}: {' and '.join(parts)}. A good result brings the first down to "
        "chance, which is 25 % with four options, and leaves the second where it was."
    )


def describe_comparison(found: Sequence[GroupRow], forget: Sequence[str]) -> str:
    """What a comparison shows, in sentences."""
    groups = list(dict.fromkeys(row.group for row in found))
    labels = len({row.label for row in found})
    seeds = " or ".join(map(str, sorted({row.seeds for row in found})))
    inside = f" in {len(groups)} settings ({', '.join(groups)})" if len(groups) > 1 else ""
    return (
        f"This page compares {labels} way{'s' if labels > 1 else ''} of making a language model "
        f"unlearn chosen knowledge{inside}. The same questions were asked before and after. A good "
        f"result brings the score on the knowledge to forget "
        f"({', '.join(map(metric_words, forget))}) "
        "down to chance, which is 25 % with four options, and leaves every other score where it "
        f"was. Numbers are means over {seeds} seed{'' if seeds == '1' else 's'} with 95 % "
        "intervals; where two intervals overlap widely, this comparison does not tell the methods "
        "apart."
    )


def describe_attempts(found: Sequence[Recovery | None], of: str = "methods") -> str:
    """What was done to bring the knowledge back, and what that says."""
    some = [one for one in found if one]
    if not some:
        return f"{SUPPRESSED} {NO_ATTACK}"
    tried = len({name for one in some for name in one.attacks} - {"forced_choice"})
    tiers = ", ".join(dict.fromkeys(one.tier for one in some))
    text = f"{tried} attacks (tier: {tiers}) tried to bring it back. "
    if len(some) == 1:
        (one,) = some
        worst = share_cell(one.worst)
        text += (
            f"The strongest, {name_words(one.strongest)}, found {one.worst.mean:.0%} of the "
            f"original knowledge (K* = {worst.text}, 95 % interval {worst.span})."
        )
    else:
        least, most = (pick(some, key=lambda one: one.worst.mean).worst for pick in (min, max))
        text += (
            "K*, the share of the original knowledge that the best attack found, lies between "
            f"{share_cell(least).text} and {share_cell(most).text}."
        )
    if len(some) < len(found):
        text += f" {len(found) - len(some)} of {len(found)} {of} were not attacked."
    return f"{text} {SUPPRESSED}"


def page_of_study(
    folder: Path, name: str, command: str, forget: Sequence[str], utility: Sequence[str]
) -> Page:
    """The page on a sweep, a reproduction or an automatic choice."""
    found = read_run_file(folder / name)
    try:
        if name == "sweep.json":
            return sweep_page(folder, found, command)
        if name == "reproduce.json":
            return reproduction_page(found, command)
        return auto_page(folder, found, command, forget, utility)
    except (KeyError, TypeError) as error:
        raise SrmuError(f"{folder / name} is damaged: no {error}; make it again") from None


def sweep_page(folder: Path, found: Mapping[str, Any], command: str) -> Page:
    done = [trial for trial in found["trials"] if trial["state"] == "complete"]
    if not done:
        raise SrmuError(f"{folder} has no finished trial yet; go on with `srmu sweep`")
    ways = {"minimize": "lowest", "maximize": "highest"}
    wanted = " and the ".join(
        f"{ways[way]} {metric_words(m)}" for m, way in found["objectives"].items()
    )
    seeds = len(found["seeds"])
    headline = [
        f"{len(done)} of {len(found['trials'])} trials, each over "
        f"{seeds} seed{'s' if seeds > 1 else ''}, in search of the {wanted}; "
        f"{len(found['front'])} of them no other trial beats.",
    ]
    entries = [
        RunGroup(f"trial {trial['number']}", "", tuple(folder / run for run in trial["runs"]))
        for trial in done
        if trial["number"] in found["front"] and trial["runs"]
        if all((folder / run / "config.yaml").is_file() for run in trial["runs"])
    ]
    recoveries = [measure_recovery(entry) for entry in entries]
    others = [None] * (len(found["front"]) - len(entries))
    headline.append(describe_attempts([*recoveries, *others], "trials on the front"))
    labels = [entry.label for entry in entries]
    parts = studies.sweep_sections(found)
    if entries:
        parts += parts_of_runs(entries, labels, recoveries, list(found["objectives"]))
    shown = [*studies.labels_of(found), *labels]
    return Page(f"Sweep {found['name']}", headline, parts, command, shown)


def reproduction_page(found: Mapping[str, Any], command: str) -> Page:
    claims = [one for part in (*found["tables"], *found["figures"]) for one in part["claims"]]
    verdicts = [one["verdict"] for one in claims]
    count = ", ".join(
        f"{verdict}: {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts)
    )
    model = name_words(str(found["model"])).rpartition("/")[2]
    seeds = len(found["seeds"])
    first = (
        f"The paper's experiments repeated on {model} over {seeds} seed{'s' if seeds > 1 else ''}, "
        "beside the paper's own numbers."
    )
    headline = [
        f"{first} Of {len(claims)} claims, {count}." if claims else first,
        "Another model and other knowledge than the paper's give other numbers; what can hold or "
        "not is the order of the methods. A low score says that knowledge is suppressed, not that "
        "it is gone; no attack was run here: suppressed, not attacked.",
    ]
    parts = studies.reproduction_sections(found)
    command = strip_paths(found.get("command") or command)
    return Page("The paper's tables, repeated", headline, parts, command, studies.lines_of(found))


def auto_page(
    folder: Path,
    found: Mapping[str, Any],
    command: str,
    forget: Sequence[str],
    utility: Sequence[str],
) -> Page:
    parts = studies.auto_sections(found)
    headline = [
        "Layer and strength were chosen to forget most at a loss of at most "
        f"{found['budget']:.1%} of the utility."
    ]
    if not found.get("run"):
        headline.append("Nothing was chosen: the last step below says why, or where it stopped.")
        return Page("Chosen automatically", headline, parts, command)
    entries, _ = entries_of([folder / found["run"]])
    forget, utility = choose_metrics(entries, forget, utility)
    runs = page_of_runs(entries, "", forget, utility, command)
    headline += runs.headline
    return Page("Chosen automatically", headline, [*parts, *runs.sections], command)
