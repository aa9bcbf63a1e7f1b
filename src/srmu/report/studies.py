"""The parts of a page about many runs: a sweep, an automatic choice, a reproduction of a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from srmu.evals.statistics import Estimate, accuracy_interval
from srmu.report.format import (
    capitalise,
    draw_mark,
    error_bars,
    hover_text,
    metric_words,
    name_words,
    number_cell,
    percent_cell,
)
from srmu.report.html import (
    GREY,
    Beside,
    Cell,
    ColumnHead,
    Figure,
    Panels,
    Section,
    Table,
    TableLine,
    Value,
    format_number,
    label_marker,
    label_stroke,
    make_axis,
    name_axis,
)
from srmu.report.results import strip_paths

FRONT, BEHIND = "on the front", "behind the front"
Trial = Mapping[str, Any]


def cell_estimate(cell: Mapping[str, Any]) -> Estimate:
    """A number of a reproduction, with its interval where it has one."""
    return Estimate(cell["value"], cell.get("low", nan), cell.get("high", nan))


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


def sweep_sections(found: Mapping[str, Any]) -> list[Section]:
    """A sweep's front, what mattered, its trials and its space."""
    objectives = found["objectives"]
    done = [trial for trial in found["trials"] if trial["state"] == "complete"]
    sections = [_front(found, done) if len(objectives) > 1 else _history(found, done)]
    if found["importance"]:
        sections.append(_mattered(found["importance"]))
    sections.append(
        trial_section(found["trials"], list(objectives), found["front"], labels_of(found))
    )
    space = [TableLine([key, _range(values)]) for key, values in found["space"].items()]
    facts = [
        TableLine(["sampler", found["sampler"]]),
        TableLine(["seeds", ", ".join(map(str, found["seeds"]))]),
        *(TableLine([metric_words(metric), way]) for metric, way in objectives.items()),
    ]
    sections.append(
        Section("The search", [], [Table("Space", ["Key", "Values"], space, words=True),
                                   Table("How it was searched", [], facts, words=True)])
    )  # fmt: skip
    return sections


def labels_of(found: Mapping[str, Any]) -> list[str]:
    """What a click shows and hides: the methods, where the space has several, else the front."""
    methods = dict.fromkeys(
        str(trial["params"]["method.name"])
        for trial in found["trials"]
        if "method.name" in trial["params"]
    )
    if len(methods) > 1:
        return list(methods)
    return [FRONT, BEHIND] if len(found["objectives"]) > 1 else []


def _label(trial: Trial, labels: Sequence[str], front: Sequence[int]) -> str:
    if FRONT in labels:
        return FRONT if trial["number"] in front else BEHIND
    return str(trial["params"].get("method.name", "")) if labels else ""


def _hover(trial: Trial, metrics: Sequence[str]) -> str:
    params = [f"{key} {format_setting(value)}" for key, value in trial["params"].items()]
    numbers = [f"{metric_words(name)} {trial_estimate(trial, name)}" for name in metrics]
    name = f"trial {trial['number']}" if "number" in trial else "trial"
    return hover_text(name, *numbers, *params)


def _format(values: Sequence[float]) -> dict[str, str]:
    """An axis in per cent where all numbers on it are accuracies."""
    return {"tickformat": ".0%"} if all(0 <= value <= 1 for value in values) else {}


def _front(found: Mapping[str, Any], done: Sequence[Trial]) -> Section:
    # what should be low goes along, what should be high goes up
    (x, x_way), (y, y_way) = sorted(
        found["objectives"].items(), key=lambda item: item[1] != "minimize"
    )[:2]
    labels, front = labels_of(found), found["front"]
    best = sorted((t for t in done if t["number"] in front), key=lambda t: t["values"][x])
    traces: list[dict[str, Any]] = [
        {
            "x": [trial["values"][x] for trial in best],
            "y": [trial["values"][y] for trial in best],
            "mode": "lines", "line": {"color": GREY, "width": 1.25, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]  # fmt: skip
    for trial in sorted(done, key=lambda one: one["number"] in front):
        label = _label(trial, labels, front)
        i = labels.index(label)
        if trial["number"] in front:
            look = label_marker(i, size=12)
        else:
            look = label_marker(i, size=8, line={"width": 1.5})
            look["symbol"] += "-open"
        numbers = trial_estimate(trial, x), trial_estimate(trial, y)
        traces.append(draw_mark(*numbers, _hover(trial, list(found["objectives"])), label, look))
    layout = {
        "xaxis": make_axis(
            f"{metric_words(x)} ({_better(x_way)})", **_format([t["values"][x] for t in done])
        ),
        "yaxis": make_axis(
            f"{metric_words(y)} ({_better(y_way)})", **_format([t["values"][y] for t in done])
        ),
    }
    words = "; ".join(
        f"trial {t['number']}: {metric_words(x)} {trial_estimate(t, x)}, "
        f"{metric_words(y)} {trial_estimate(t, y)}"
        for t in best
    )
    picture = Figure(
        "", f"Scatter plot of {len(done)} trials. On the Pareto front: {words}.", traces, layout
    )
    notes = [
        f"Each mark is one trial, with 95 % intervals; {len(best)} of {len(done)} are on the "
        "Pareto front (filled, joined by the dotted line): no other trial is as good in every "
        "objective and better in one. The front is of the means: where intervals overlap, another "
        "draw of seeds may choose its neighbours.",
    ]
    return Section("The front", notes, [picture])


def _better(way: str) -> str:
    return "lower is better" if way == "minimize" else "higher is better"


def _history(found: Mapping[str, Any], done: Sequence[Trial]) -> Section:
    ((metric, way),) = found["objectives"].items()
    labels, front = labels_of(found), found["front"]
    choose = min if way == "minimize" else max
    best = [choose(t["values"][metric] for t in done[: i + 1]) for i in range(len(done))]
    traces: list[dict[str, Any]] = [
        {
            "x": [trial["number"] for trial in done], "y": best, "mode": "lines",
            "line": {"color": GREY, "width": 1.25, "shape": "hv"}, "hoverinfo": "skip",
        }
    ]  # fmt: skip
    for trial in done:
        label = _label(trial, labels, front)
        look = label_marker(labels.index(label) if label else 0, size=9)
        number_ = Estimate(trial["number"])
        traces.append(
            draw_mark(number_, trial_estimate(trial, metric), _hover(trial, [metric]), label, look)
        )
    layout = {
        "xaxis": make_axis("trial"),
        "yaxis": make_axis(
            f"{metric_words(metric)} ({_better(way)})",
            **_format([t["values"][metric] for t in done]),
        ),
    }
    words = f"{metric_words(metric)} of {len(done)} trials, the best {choose(best, default=0):.4g}"
    notes = ["Each mark is one trial, with its 95 % interval; the line is the best so far."]
    return Section("The search, trial by trial", notes, [Figure("", words, traces, layout)])


def _mattered(importance: Mapping[str, float]) -> Section:
    order = sorted(importance, key=lambda key: -importance[key])
    bar = {
        "type": "bar", "orientation": "h", "y": order, "x": [importance[key] for key in order],
        "marker": {"color": label_marker(0)["color"], "opacity": 0.85},
        "hovertemplate": "%{y} %{x:.0%}",
    }  # fmt: skip
    words = ", ".join(f"{key} {importance[key]:.0%}" for key in order)
    layout = {
        "xaxis": make_axis("share of the variation", range=[0, 1.02], tickformat=".0%"),
        "yaxis": name_axis(order), "bargap": 0.4,
    }  # fmt: skip
    lines = [TableLine([key, Cell(f"{100 * importance[key]:.0f} %", "", importance[key])])
             for key in order]  # fmt: skip
    return Section(
        "What mattered",
        ["How much of the variation between trials each key explains."],
        [Beside("", Figure("", f"Importance of each key: {words}.", [bar], layout, len(order)),
                Table("Share of the variation", ["Key", "Share"], lines))],
    )  # fmt: skip


def _range(values: Any) -> str:
    if not isinstance(values, Mapping):
        return ", ".join(map(format_setting, values))
    step = values.get("step")
    tail = (
        f", in steps of {format_setting(step)}"
        if step
        else ", log scale"
        if values.get("log")
        else ""
    )
    return f"{format_setting(values['low'])} to {format_setting(values['high'])}{tail}"


def trial_section(
    rows: Sequence[Trial],
    metrics: Sequence[str],
    front: Sequence[int] = (),
    labels: Sequence[str] = (),
) -> Section:
    """The table of the trials, whatever became of them; without a front, of shares."""
    keys = list(dict.fromkeys(key for trial in rows for key in trial["params"]))
    lines = []
    for i, trial in enumerate(rows):
        index = trial.get("number", i)
        state = trial["state"]
        if trial.get("why"):
            state += f": {strip_paths(trial['why'])}"
        if index in front:
            state = FRONT if len(metrics) > 1 else "the best"
        cells: list[Value] = [Cell(str(index), "", index)]
        for value in (trial["params"].get(key) for key in keys):
            cells.append(format_setting(value) if isinstance(value, str) else value)
        for metric in metrics:
            known = trial["state"] == "complete" and metric in trial["values"]
            found = trial_estimate(trial, metric) if known else None
            cells.append(percent_cell(found.value) if found and not front else number_cell(found))
        lines.append(TableLine([*cells, state], _label({"number": i, **trial}, labels, front)))
    heads = ["Trial", *keys, *(capitalise(metric_words(name)) for name in metrics), "State"]
    count: dict[str, int] = {}
    for trial in rows:
        count[trial["state"]] = count.get(trial["state"], 0) + 1
    states = ", ".join(f"{many} {state}" for state, many in count.items())
    table = Table(f"{len(rows)} trials: {states}", heads, lines, tall=len(rows) > 20)
    return Section("Trials", [], [table])


# ---- the automatic choice


def auto_sections(found: Mapping[str, Any]) -> list[Section]:
    """Every choice in a sentence, the layer scan, the search for the strength, the comparison."""
    choices = [
        TableLine([name_words(one["step"]), strip_paths(one["sentence"])])
        for one in found["choices"]
    ]
    table = Table("Each choice and its reason", ["Step", "Why"], choices, words=True)
    sections = [Section("Choices", [], [table])]
    if found.get("scan"):
        sections.append(_scan(found["scan"]))
    tried = found.get("trials", [])
    if done := [trial for trial in tried if trial["state"] == "complete"]:
        sections.append(_strengths(done, found["budget"]))
        sections.append(trial_section(tried, ["forgetting", "utility_loss"]))
    if final := found.get("final"):
        whose = {"val": ColumnHead("Chosen", "on the half to choose on"),
                 "test": ColumnHead("Chosen", "on the half kept back"),
                 "defaults": ColumnHead("Fixed defaults", "on the half kept back")}  # fmt: skip
        lines = [
            TableLine(
                [name_words(key), *(number_cell(cell_estimate(final[name][key])) for name in whose)]
            )
            for key in ("forgetting", "utility_loss")
        ]
        table = Table("Per cent, with 95 % intervals", ["Measure", *whose.values()], lines)
        sections.append(Section("Against the fixed defaults", [], [table]))
    return sections


def _scan(scan: Mapping[str, Any]) -> Section:
    layers = scan["layers"]
    x = [one["layer"] for one in layers]
    traces = []
    for i, key in enumerate(("forgetting", "utility_loss")):
        traces.append(
            {
                "x": x, "y": [one[key] for one in layers], "mode": "lines+markers",
                "name": name_words(key), "line": label_stroke(i, width=2),
                "marker": label_marker(i, size=8),
                "hovertemplate": f"layer %{{x}}<br>{name_words(key)} %{{y:.1%}}",
            }
        )  # fmt: skip
    layout = {
        "xaxis": make_axis("layer", dtick=1 if len(x) <= 16 else 4), "showlegend": True,
        "yaxis": make_axis("change of accuracy", tickformat=".0%"),
        "shapes": [{"type": "line", "x0": scan["best"], "x1": scan["best"], "yref": "paper",
                    "y0": 0, "y1": 1, "layer": "below",
                    "line": {"dash": "dot", "width": 1.25, "color": GREY}}],
        "annotations": [{"x": scan["best"], "y": 1, "yref": "paper", "yanchor": "top",
                         "xanchor": "left", "xshift": 3, "text": "chosen", "showarrow": False}],
    }  # fmt: skip
    words = "; ".join(
        f"layer {one['layer']}: forgetting {one['forgetting']:.1%}, "
        f"utility loss {one['utility_loss']:.1%}"
        for one in layers
    )
    lines = [
        TableLine([
            Cell(f"{one['layer']}{', chosen' if one['layer'] == scan['best'] else ''}", "",
                 one["layer"]),
            Cell(f"{100 * one['forgetting']:.1f}", "", one["forgetting"]),
            Cell(f"{100 * one['utility_loss']:.1f}", "", one["utility_loss"]),
        ])
        for one in layers
    ]  # fmt: skip
    return Section(
        "Layer scan",
        ["What a run at each layer forgets, and what it costs: the further apart, the "
         "better."],
        [Beside("", Figure("", f"Scan of the layers. {words}.", traces, layout),
                Table("By layer, per cent", ["Layer", "Forgetting", "Utility loss"], lines))],
    )  # fmt: skip


def _strengths(done: Sequence[Trial], budget: float) -> Section:
    x, y = "utility_loss", "forgetting"
    traces = []
    for trial in done:
        inside = trial["values"][x] <= budget
        look = (
            label_marker(0, size=11)
            if inside
            else {"color": GREY, "symbol": "circle-open", "size": 9, "line": {"width": 1.5}}
        )
        numbers = trial_estimate(trial, x), trial_estimate(trial, y)
        traces.append(draw_mark(*numbers, _hover(trial, [y, x]), "", look))
    layout = {
        "xaxis": make_axis("utility loss (lower is better)", tickformat=".1%"),
        "yaxis": make_axis("forgetting (higher is better)", tickformat=".0%"),
        "shapes": [{"type": "line", "x0": budget, "x1": budget, "yref": "paper", "y0": 0, "y1": 1,
                    "layer": "below", "line": {"dash": "dot", "width": 1.25, "color": GREY}}],
        "annotations": [{"x": budget, "y": 0, "yref": "paper", "yanchor": "bottom", "text":
                         f"budget {budget:.1%}", "xanchor": "left", "xshift": 3,
                         "showarrow": False}],
    }  # fmt: skip
    words = f"Forgetting against utility loss of {len(done)} trials; the budget is {budget:.1%}"
    notes = ["Each mark is one strength; filled where it keeps within the budget."]
    return Section("Search for the strength", notes, [Figure("", words, traces, layout)])


# ---- reproductions


def reproduction_sections(found: Mapping[str, Any]) -> list[Section]:
    """The paper's tables and figures beside ours, with what became of its claims."""
    labels = lines_of(found)
    sections = [
        Section(one["title"], [strip_paths(one["note"])] if one.get("note") else [],
                [_reproduced(one), *_claims(one["claims"])])
        for one in found["tables"]
    ]  # fmt: skip
    for one in found["figures"]:
        panels, table = _drawn(one, labels)
        sections.append(Section(one["title"], [], [panels, table, *_claims(one["claims"])]))
    return sections


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """What a click shows and hides: the rows of the tables and the lines of the figures."""
    rows = [row["label"] for table in found["tables"] for row in table["rows"]]
    return list(
        dict.fromkeys([*rows, *(s["label"] for f in found["figures"] for s in f["series"])])
    )


def _reproduced(table: Mapping[str, Any]) -> Table:
    theirs = table.get("paper_columns", [])
    heads: list[ColumnHead | str] = ["Method"]
    heads += [ColumnHead(name, "here") for name in table["columns"]]
    heads += [ColumnHead(name, "the paper") for name in theirs]
    lines = []
    for row in table["rows"]:
        cells: list[Value] = [f"{row['label']}, {row['why']}" if row.get("why") else row["label"]]
        cells += [number_cell(cell_estimate(row["cells"][name])) if name in row["cells"] else None
                  for name in table["columns"]]  # fmt: skip
        cells += [percent_cell(row.get("paper", {}).get(name)) for name in theirs]
        lines.append(TableLine(cells, row["label"]))
    return Table("Per cent, with 95 % intervals; beside the paper's numbers", heads, lines)


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not claims:
        return []
    lines = []
    for one in claims:
        gap = one["difference"] or {}
        shown_gap = "{value:+.1%} ({low:+.1%} to {high:+.1%})".format(**gap) if gap else ""
        words = one["sentence"].removeprefix(f"{one['claim']}: ")
        texts = [one["claim"], one["source"], one["verdict"], shown_gap.replace("%", ""), words]
        lines.append(TableLine(texts))
    heads = ["Claim", "Source", "Verdict here", "Difference, points", "In words"]
    return [Table("The paper's claims", heads, lines, words=True)]


def _drawn(figure: Mapping[str, Any], labels: Sequence[str]) -> tuple[Panels, Table]:
    traces, lines, ends = [], [], []
    for series in figure["series"]:
        label, i = series["label"], labels.index(series["label"])
        points = [point for point in series["points"] if point["x"] and point["y"]]
        xs, ys = ([cell_estimate(point[key]) for point in points] for key in ("x", "y"))
        traces.append(
            {
                "x": [one.value for one in xs], "y": [one.value for one in ys], "meta": label,
                "error_x": error_bars(xs), "error_y": error_bars(ys), "mode": "lines+markers",
                "line": label_stroke(i, width=1.75), "marker": label_marker(i, size=8),
                "hoverinfo": "text", "text": [
                    hover_text(label, f"coeff {format_setting(point['coeff'])}",
                          f"kappa {format_number(point['kappa'])}",
                          f"{figure['x_title']} {x}", f"{figure['y_title']} {y}")
                    for point, x, y in zip(points, xs, ys, strict=True)
                ],
            }
        )  # fmt: skip
        lines += [
            TableLine(
                [label, point["coeff"], point["kappa"], number_cell(x), number_cell(y)], label
            )
            for point, x, y in zip(points, xs, ys, strict=True)
        ]
        ends.append(
            f"{label}: {len(points)} points, {figure['y_title']} "
            f"{min(one.value for one in ys):.1%} to {max(one.value for one in ys):.1%}"
            if points
            else f"{label}: not measured"
        )
    layout = {
        "xaxis": make_axis(figure["x_title"], tickformat=".0%"),
        "yaxis": make_axis(figure["y_title"], tickformat=".0%"),
    }
    words = (
        f"{figure['title']}: {figure['y_title']} against {figure['x_title']}. {'; '.join(ends)}."
    )
    heads: list[ColumnHead | str] = [
        "Method",
        "Coeff",
        "Kappa",
        figure["x_title"],
        figure["y_title"],
    ]
    table = Table("The points of the figure, per cent", heads, lines, tall=len(lines) > 20)
    return Panels([Figure("", words, traces, layout)], small=False), table
