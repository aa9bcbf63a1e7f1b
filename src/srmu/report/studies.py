"""The pages about many runs: a sweep, an automatic choice, a reproduction of a paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from srmu.evals.figures import Panel
from srmu.evals.statistics import Estimate, accuracy_interval
from srmu.report.analyses import draw_panel
from srmu.report.figures import GREY, Figure, Series, bar_look, draw_figure, label_look, make_look, mark_value
from srmu.report.format import capitalise, metric_words, name_words
from srmu.report.html import Beside, Block, Cell, Section, Table, TableLine, percent_cell
from srmu.report.results import strip_paths

FRONT, BEHIND = "on the front", "behind the front"
PERCENT = {"tickformat": ".0%"}
BETTER = {"minimize": "lower is better", "maximize": "higher is better"}
Trial = Mapping[str, Any]
Study = Mapping[str, Any]  # what the study's JSON file says


def read_estimate(entry: Mapping[str, Any]) -> Estimate:
    """A number of a reproduction, with its interval where it has one."""
    return Estimate(entry["value"], entry.get("low", nan), entry.get("high", nan))


def format_setting(value: Any) -> str:
    """A value of a search space as a person would write it."""
    return f"{value:.4g}" if isinstance(value, float) else strip_paths(str(value))


# ---- sweeps


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


def sweep_sections(study: Study) -> list[Section]:
    """A sweep's front or history, what mattered, its trials and its space."""
    sections = [front_section(study) if len(study["objectives"]) > 1 else history_section(study)]
    if study["importance"]:
        sections.append(key_section(study["importance"]))
    metrics, labels = [*study["objectives"]], sweep_labels(study)
    sections.append(trial_section(study["trials"], metrics, study["front"], labels))
    space = [TableLine([key, format_range(values)]) for key, values in study["space"].items()]
    facts = {"sampler": study["sampler"], "seeds": ", ".join(map(str, study["seeds"]))}
    facts |= {metric_words(metric): way for metric, way in study["objectives"].items()}
    tables = [
        Table("Space", ["Key", "Values"], space, words=True),
        Table("How it was searched", [], [*map(TableLine, facts.items())], words=True),
    ]
    return [*sections, Section("The search", [], tables)]


def sweep_labels(study: Study) -> list[str]:
    """What a click shows and hides: the methods, where the space has several, else the front."""
    methods = dict.fromkeys(
        str(trial["params"]["method.name"]) for trial in study["trials"] if "method.name" in trial["params"]
    )
    if len(methods) > 1:
        return [*methods]
    return [FRONT, BEHIND] if len(study["objectives"]) > 1 else []


def trial_label(trial: Trial, labels: Sequence[str], front: Sequence[int]) -> str:
    if FRONT in labels:
        return FRONT if trial["number"] in front else BEHIND
    return str(trial["params"].get("method.name", "")) if labels else ""


def trial_row(trial: Trial, metrics: Sequence[str]) -> dict[str, Any]:
    """A trial as a row of a figure's table."""
    numbers: dict[str, Any] = {metric_words(m): trial_estimate(trial, m) for m in metrics}
    return (
        {"trial": trial.get("number")}
        | numbers
        | {key: format_setting(value) for key, value in trial["params"].items()}
    )


def complete_trials(study: Study) -> list[Trial]:
    return [trial for trial in study["trials"] if trial["state"] == "complete"]


def objective_axis(study: Study, metric: str) -> dict[str, Any]:
    """The axis of an objective, in per cent where all numbers on it are accuracies."""
    values = [trial["values"][metric] for trial in complete_trials(study)]
    title = f"{metric_words(metric)} ({BETTER[study['objectives'][metric]]})"
    return {"title": title} | (PERCENT if all(0 <= value <= 1 for value in values) else {})


def trial_series(study: Study, hollow: bool) -> list[Series]:
    """The trials as marks, a series a label and whether it is on the front."""
    labels, front = sweep_labels(study), study["front"]
    groups: dict[tuple[bool, str], list[Trial]] = {}
    for trial in complete_trials(study):
        inside = trial["number"] in front or not hollow
        groups.setdefault((inside, trial_label(trial, labels, front)), []).append(trial)
    return [
        Series(
            label or "trials",
            [trial_row(trial, [*study["objectives"]]) for trial in trials],
            label_look(labels.index(label) if label else 0, size=11 if inside else 8,
                       hollow=not inside),
            label,
        )
        for (inside, label), trials in sorted(groups.items())
    ]  # fmt: skip


def front_section(study: Study) -> Section:
    """The trials at the first two objectives, with the Pareto front joined."""
    # what should be low goes along, what should be high goes up
    x, y = sorted(study["objectives"], key=lambda name: study["objectives"][name] != "minimize")[:2]
    done = complete_trials(study)
    best = [trial for trial in done if trial["number"] in study["front"]]
    line = [
        {metric_words(name): trial["values"][name] for name in (x, y)}
        for trial in sorted(best, key=lambda trial: trial["values"][x])
    ]
    look = make_look(GREY, dash="dot", mode="lines", width=1.25)
    figure = draw_figure(
        "", [Series("Pareto front", line, look), *trial_series(study, True)],
        metric_words(x), metric_words(y),
        x_axis=objective_axis(study, x), y_axis=objective_axis(study, y), subject="The trials",
    )  # fmt: skip
    note = (
        f"Each mark is one trial, with 95 % intervals; {len(best)} of {len(done)} are on the "
        "Pareto front (filled, joined by the dotted line): no other trial is as good in every "
        "objective and better in one. The front is of the means: where intervals overlap, another "
        "draw of seeds may choose its neighbours."
    )
    return Section("The front", [note], [figure])


def history_section(study: Study) -> Section:
    """The trials of a sweep with one objective, in their order."""
    ((metric, way),) = study["objectives"].items()
    y, best, line = metric_words(metric), None, []
    for trial in complete_trials(study):
        value = trial["values"][metric]
        best = value if best is None else (min if way == "minimize" else max)(best, value)
        line.append({"trial": trial["number"], y: best})
    look = make_look(GREY, mode="lines", width=1.25)
    look = {**look, "line": {**look["line"], "shape": "hv"}}
    series = [Series("best so far", line, look), *trial_series(study, False)]
    figure = draw_figure("", series, "trial", y, y_axis=objective_axis(study, metric))
    notes = ["Each mark is one trial, with its 95 % interval; the line is the best so far."]
    return Section("The search, trial by trial", notes, [figure])


def key_section(importance: Mapping[str, float]) -> Section:
    """How much each key explains."""
    order = sorted(importance.items(), key=lambda item: -item[1])
    share = "share of the variation"
    rows = [{"key": key, share: value} for key, value in order]
    figure = draw_figure(
        "", [Series("importance", rows, bar_look(0))], share, "key",
        x_axis={"range": [0, 1.02], **PERCENT},
    )  # fmt: skip
    lines = [TableLine([key, percent_cell(value)]) for key, value in order]
    table = Table("Share of the variation, per cent", ["Key", "Share"], lines)
    notes = ["How much of the variation between trials each key explains."]
    return Section("What mattered", notes, [Beside("", figure, table)])


def format_range(values: Any) -> str:
    """The values of a key of the space."""
    if not isinstance(values, Mapping):
        return ", ".join(map(format_setting, values))
    tail = ", log scale" if values.get("log") else ""
    if step := values.get("step"):
        tail = f", in steps of {format_setting(step)}"
    return f"{format_setting(values['low'])} to {format_setting(values['high'])}{tail}"


def trial_section(
    trials: Sequence[Trial], metrics: Sequence[str], front: Sequence[int] = (), labels: Sequence[str] = ()
) -> Section:
    """The table of the trials, in every state; without a front, of shares."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial["params"]))
    lines = []
    for i, trial in enumerate(trials):
        number = trial.get("number", i)
        state = trial["state"] + (f": {strip_paths(trial['why'])}" if trial.get("why") else "")
        if number in front:
            state = FRONT if len(metrics) > 1 else "the best"
        values = [trial["params"].get(key) for key in keys]
        cells: list[Any] = [format_setting(v) if isinstance(v, str) else v for v in values]
        for metric in metrics:
            known = trial["state"] == "complete" and metric in trial["values"]
            estimate = trial_estimate(trial, metric) if known else None
            cells.append(percent_cell(estimate.value) if estimate and not front else estimate)
        label = trial_label({"number": number, **trial}, labels, front)
        lines.append(TableLine([Cell(str(number), "", number), *cells, state], label))
    heads = ["Trial", *keys, *(capitalise(metric_words(name)) for name in metrics), "State"]
    states = Counter(trial["state"] for trial in trials)
    count = ", ".join(f"{many} {state}" for state, many in states.items())
    return Section("Trials", [], [Table(f"{len(trials)} trials: {count}", heads, lines)])


# ---- the automatic choice


def auto_sections(study: Study) -> list[Section]:
    """Every choice in a sentence, the layer scan, the search for the strength, the comparison."""
    choices = [TableLine([name_words(one["step"]), strip_paths(one["sentence"])]) for one in study["choices"]]
    table = Table("Each choice and its reason", ["Step", "Why"], choices, words=True)
    sections = [Section("Choices", [], [table])]
    if study.get("scan"):
        sections.append(scan_section(study["scan"]))
    if done := [trial for trial in study.get("trials", []) if trial["state"] == "complete"]:
        sections.append(strength_section(done, study["budget"]))
        sections.append(trial_section(study["trials"], ["forgetting", "utility_loss"]))
    if final := study.get("final"):
        whose = {"val": "Chosen\non the half to choose on",
                 "test": "Chosen\non the half kept back",
                 "defaults": "Fixed defaults\non the half kept back"}  # fmt: skip
        lines = [
            TableLine([name_words(key), *(read_estimate(final[name][key]) for name in whose)])
            for key in ("forgetting", "utility_loss")
        ]
        table = Table("Per cent, with 95 % intervals", ["Measure", *whose.values()], lines)
        sections.append(Section("Against the fixed defaults", [], [table]))
    return sections


def scan_section(scan: Mapping[str, Any]) -> Section:
    """What a run at each layer forgets, and what it costs."""
    layers = scan["layers"]
    series = {name_words(key): [round(100 * one[key], 2) for one in layers] for key in ("forgetting", "utility_loss")}
    x = [one["layer"] for one in layers]
    beside = draw_panel(Panel("Layer scan", "layer", "change of accuracy, points", x, series))
    mark_value(beside.figure, "chosen", x=scan["best"])
    beside.figure.plot.update_xaxes(dtick=1 if len(x) <= 16 else 4)
    notes = [
        "What a run at each layer forgets, and what it costs: the further apart, the better. "
        f"Layer {scan['best']} was chosen."
    ]
    return Section("Layer scan", notes, [beside])


def strength_section(done: Sequence[Trial], budget: float) -> Section:
    """Forgetting against utility loss, a mark a strength."""
    looks = {"within the budget": label_look(0, size=11), "above the budget": make_look(GREY, "circle-open", size=9)}
    series = [
        Series(name, [trial_row(trial, ["forgetting", "utility_loss"]) for trial in done
                      if (trial["values"]["utility_loss"] <= budget) is inside], look)
        for (name, look), inside in zip(looks.items(), (True, False), strict=True)
    ]  # fmt: skip
    figure = draw_figure(
        "", series, "utility loss", "forgetting",
        x_axis={"title": "utility loss (lower is better)", "tickformat": ".1%"},
        y_axis={"title": "forgetting (higher is better)", **PERCENT},
    )  # fmt: skip
    mark_value(figure, f"budget {budget:.1%}", x=budget)
    notes = ["Each mark is one strength; filled where it keeps within the budget."]
    return Section("Search for the strength", notes, [figure])


# ---- reproductions


def reproduction_sections(study: Study) -> list[Section]:
    """The paper's tables and figures beside ours, and whether its claims hold."""
    labels = reproduction_labels(study)
    sections = []
    for one in study["tables"]:
        notes = [strip_paths(one["note"])] if one.get("note") else []
        sections.append(Section(one["title"], notes, [paper_table(one), *claim_tables(one["claims"])]))
    for one in study["figures"]:
        figure = draw_reproduction(one, labels)
        blocks: list[Block] = [figure, point_table(one), *claim_tables(one["claims"])]
        sections.append(Section(one["title"], [], blocks))
    return sections


def reproduction_labels(study: Study) -> list[str]:
    """What a click shows and hides: the rows of the tables and the lines of the figures."""
    rows = [row["label"] for table in study["tables"] for row in table["rows"]]
    lines = [series["label"] for figure in study["figures"] for series in figure["series"]]
    return list(dict.fromkeys([*rows, *lines]))


def paper_table(table: Study) -> Table:
    """A table of the paper, its numbers beside ours."""
    ours, theirs = table["columns"], table.get("paper_columns", [])
    heads = ["Method", *(f"{name}\nhere" for name in ours)]
    heads += [f"{name}\nthe paper" for name in theirs]
    lines = []
    for row in table["rows"]:
        name = f"{row['label']}, {row['why']}" if row.get("why") else row["label"]
        here = [read_estimate(row["cells"][c]) if c in row["cells"] else None for c in ours]
        paper = [percent_cell(row.get("paper", {}).get(c)) for c in theirs]
        lines.append(TableLine([name, *here, *paper], row["label"]))
    return Table("Per cent, with 95 % intervals; beside the paper's numbers", heads, lines)


def claim_tables(claims: Sequence[Study]) -> list[Table]:
    """The paper's claims in a table; none where it claims nothing."""
    lines = []
    for one in claims:
        gap = "{value:+.1%} ({low:+.1%} to {high:+.1%})" if one["difference"] else ""
        gap = gap.format(**one["difference"] or {}).replace("%", "")
        words = one["sentence"].removeprefix(f"{one['claim']}: ")
        lines.append(TableLine([one["claim"], one["source"], one["verdict"], gap, words]))
    heads = ["Claim", "Source", "Verdict here", "Difference, points", "In words"]
    return [Table("The paper's claims", heads, lines, words=True)] if claims else []


def figure_rows(figure: Study, series: Study) -> list[dict[str, Any]]:
    """The points of a series that were measured."""
    return [
        {
            "coeff": float(point["coeff"]),
            "kappa": point["kappa"],
            figure["x_title"]: read_estimate(point["x"]),
            figure["y_title"]: read_estimate(point["y"]),
        }
        for point in series["points"]
        if point["x"] and point["y"]
    ]


def draw_reproduction(figure: Study, labels: Sequence[str], title: str = "") -> Figure:
    """What is kept against what is forgotten, a line a method."""
    series = [
        Series(one["label"], figure_rows(figure, one),
               label_look(labels.index(one["label"]), mode="lines+markers", width=1.75),
               one["label"])
        for one in figure["series"]
    ]  # fmt: skip
    return draw_figure(
        title, series, figure["x_title"], figure["y_title"], x_axis=PERCENT, y_axis=PERCENT,
        subject="" if title else figure["title"],
    )  # fmt: skip


def point_table(figure: Study) -> Table:
    """The points of a figure."""
    lines = [
        TableLine([one["label"], *row.values()], one["label"])
        for one in figure["series"]
        for row in figure_rows(figure, one)
    ]
    heads = ["Method", "Coeff", "Kappa", figure["x_title"], figure["y_title"]]
    return Table("The points of the figure, per cent", heads, lines)
