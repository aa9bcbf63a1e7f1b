"""Pages of analyses, and the parts of pages about many runs: a sweep, and an automatic choice."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from srmu.evals.figures import Analysis, Panel
from srmu.evals.statistics import Estimate, accuracy_interval
from srmu.report.figures import GREY, Row, Series, bar_look, draw_figure, label_look, make_look, mark_value
from srmu.report.format import format_value, name_words, read_estimate, write_words
from srmu.report.html import LABEL, Block, Page, Section, Table
from srmu.report.results import strip_paths

FRONT, BEHIND = "on the front", "behind the front"
PERCENT = {"tickformat": ".0%"}
BETTER = {"minimize": "lower is better", "maximize": "higher is better"}
HALVES = {
    "val": "Chosen\non the half for choices",
    "test": "Chosen\non the other half",
    "defaults": "Fixed defaults\non the other half",
}
Trial = Mapping[str, Any]
Study = Mapping[str, Any]  # what the study's JSON file says


# ---- analyses


def write_analysis(analysis: Analysis, out: Path) -> Path:
    """Write an analysis as one HTML file that needs nothing from elsewhere."""
    parts = [Section(panel.title, [], [draw_panel(panel)]) for panel in analysis.panels]
    return Page(analysis.title, analysis.sentences, parts).write(out)


def draw_panel(panel: Panel) -> Block:
    """A panel's picture beside its table."""
    series = []
    for i, (name, values) in enumerate(panel.series.items()):
        look = bar_look(i) if panel.kind == "bars" else label_look(i, mode="lines+markers")
        rows = [{panel.x_title: x, panel.y_title: y} for x, y in zip(panel.x, values, strict=True)]
        series.append(Series(name, rows, look))
    columns = {panel.x_title: panel.x, **panel.series}
    lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    figure = draw_figure("", series, panel.x_title, panel.y_title, subject=panel.title)
    return Block([figure], Table(panel.y_title, lines))


# ---- sweeps


def sweep_sections(study: Study) -> list[Section]:
    """A sweep's front or history, what mattered, and its trials."""
    sections = [search_section(study)]
    if study["importance"]:
        order = sorted(study["importance"].items(), key=lambda item: -item[1])
        share = "share of the variation"
        series = [Series("importance", [{"key": key, share: value} for key, value in order], bar_look(0))]
        figure = draw_figure("", series, share, "key", x_axis={"range": [0, 1.02], **PERCENT})
        table = Table("Share of the variation, per cent", [{"Key": k, "Share": format_value(v, "%")} for k, v in order])
        sections.append(Section("What mattered", write_words("keys"), [Block([figure], table)]))
    sections.append(trial_section(study["trials"], [*study["objectives"]], study["front"]))
    return sections


def complete_trials(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial["state"] == "complete"]


def trial_estimate(trial: Trial, metric: str) -> Estimate:
    """A trial's number with the interval over its questions and seeds, where those are known."""
    value = trial["values"][metric]
    seeds = trial.get("replicates", {}).get(metric) or [value]
    n, errors = trial.get("n", {}).get(metric), trial.get("errors", {}).get(metric)
    if n and not metric.startswith("attack.") and all(0 <= one <= 1 for one in seeds):
        return Estimate(value, *accuracy_interval(seeds, round(n)))
    if errors and all(errors):  # seeds share their questions: their errors do not average out
        half = 1.96 * sum(errors) / len(errors)
        return Estimate(value, value - half, value + half)
    return Estimate(value)


def trial_row(trial: Trial, metrics: Sequence[str]) -> dict[str, Any]:
    """A trial's settings and numbers, as figures and tables show them."""
    settings = {k: strip_paths(v) if isinstance(v, str) else v for k, v in trial["params"].items()}
    return settings | {name_words(metric): trial_estimate(trial, metric) for metric in metrics}


def trial_series(trials: Sequence[Trial], metrics: Sequence[str], front: Sequence[int]) -> list[Series]:
    """Complete trials as marks: those on the front filled, the others hollow."""
    rows: dict[str, list[Row]] = {BEHIND: [], FRONT: []}
    for trial in trials:
        label = FRONT if trial["number"] in front else BEHIND
        rows[label].append({"trial": trial["number"], **trial_row(trial, metrics)})
    looks = {FRONT: label_look(0, size=11), BEHIND: label_look(1, size=8, hollow=True)}
    return [Series(label, some, looks[label], label) for label, some in rows.items() if some]


def objective_axis(study: Study, metric: str) -> dict[str, Any]:
    """The axis of an objective, in per cent where all numbers on it are accuracies."""
    values = [trial["values"][metric] for trial in complete_trials(study["trials"])]
    title = f"{name_words(metric)} ({BETTER[study['objectives'][metric]]})"
    return {"title": title} | (PERCENT if all(0 <= value <= 1 for value in values) else {})


def search_section(study: Study) -> Section:
    """The trials at the first two objectives with the front joined; of one objective in their order."""
    objectives, done = study["objectives"], complete_trials(study["trials"])
    look = make_look(GREY, dash="dot", mode="lines", width=1.25)
    if len(objectives) > 1:
        # what should be low goes along, what should be high goes up
        x, y = sorted(objectives, key=lambda name: objectives[name] != "minimize")[:2]
        best = sorted((t["values"][x], t["values"][y]) for t in done if t["number"] in study["front"])
        title, name, axes = "The front", "Pareto front", {"x_axis": objective_axis(study, x)}
        notes = write_words("front", best=len(best), done=len(done))
    else:
        x, (y,) = "trial", objectives
        values = accumulate((t["values"][y] for t in done), min if objectives[y] == "minimize" else max)
        best = [*zip((t["number"] for t in done), values, strict=True)]
        title, name, axes = "The search, trial by trial", "best so far", {}
        notes = write_words("history")
        look = {**look, "line": {**look["line"], "shape": "hv"}}
    line = Series(name, [{name_words(x): across, name_words(y): up} for across, up in best], look)
    series = [line, *trial_series(done, [*objectives], study["front"])]
    axes["y_axis"] = objective_axis(study, y)
    figure = draw_figure("", series, name_words(x), name_words(y), subject="The trials", **axes)
    return Section(title, notes, [Block([figure])])


def trial_section(trials: Sequence[Trial], metrics: Sequence[str], front: Sequence[int] = ()) -> Section:
    """The table of the trials, in every state; without a front, of shares."""
    keys = [*dict.fromkeys(key for trial in trials for key in trial["params"]), *map(name_words, metrics)]
    rows: list[Row] = []
    for trial in trials:
        state = trial["state"] + (f": {strip_paths(trial['why'])}" if trial.get("why") else "")
        label = FRONT if trial["number"] in front else BEHIND
        known = [m for m in metrics if m in trial["values"]] if trial["state"] == "complete" else []
        cells = dict.fromkeys(keys) | trial_row(trial, known)
        if not front:
            cells |= {name_words(metric): format_value(trial["values"][metric], "%") for metric in known}
        rows.append({LABEL: label, "Trial": str(trial["number"]), **cells, "State": label if label == FRONT else state})
    count = ", ".join(f"{many} {state}" for state, many in Counter(trial["state"] for trial in trials).items())
    return Section("Trials", [], [Block(table=Table(f"{len(trials)} trials: {count}", rows))])


# ---- the automatic choice


def auto_sections(study: Study) -> list[Section]:
    """Every choice in a sentence, the layer scan, the search for the strength, the comparison."""
    choices = [{"Step": name_words(one["step"]), "Why": strip_paths(one["sentence"])} for one in study["choices"]]
    sections = [Section("Choices", [], [Block(table=Table("Each choice and its reason", choices, words=True))])]
    both = ("forgetting", "utility_loss")
    if scan := study.get("scan"):
        layers = [one["layer"] for one in scan["layers"]]
        series = {name_words(key): [round(100 * one[key], 2) for one in scan["layers"]] for key in both}
        block = draw_panel(Panel("Layer scan", "layer", "change of accuracy, points", layers, series))
        mark_value(block.figures[0], "chosen", x=scan["best"])
        block.figures[0].plot.update_xaxes(dtick=1 if len(layers) <= 16 else 4)
        sections.append(Section("Layer scan", write_words("scan", best=scan["best"]), [block]))
    if done := complete_trials(study.get("trials", [])):
        sections.append(strength_section(done, study["budget"]))
        sections.append(trial_section(study["trials"], both))
    if final := study.get("final"):
        rows = [
            {"Measure": name_words(key)} | {head: read_estimate(final[half][key]) for half, head in HALVES.items()}
            for key in both
        ]
        table = Table("Per cent, with 95 % intervals", rows)
        sections.append(Section("Against the fixed defaults", [], [Block(table=table)]))
    return sections


def strength_section(done: Sequence[Trial], budget: float) -> Section:
    """Forgetting against utility loss, a mark a strength."""
    within = [trial["number"] for trial in done if trial["values"]["utility_loss"] <= budget]
    names = {FRONT: "within the budget", BEHIND: "above the budget"}  # a legend of its own, no labels of the page
    marks = trial_series(done, ["forgetting", "utility_loss"], within)
    series = [one._replace(name=names[one.label], label="") for one in marks]
    x_axis = {"title": "utility loss (lower is better)", "tickformat": ".1%"}
    y_axis = {"title": "forgetting (higher is better)", **PERCENT}
    figure = draw_figure("", series, "utility loss", "forgetting", x_axis=x_axis, y_axis=y_axis)
    mark_value(figure, f"budget {budget:.1%}", x=budget)
    return Section("Search for the strength", write_words("strength"), [Block([figure])])
