"""The parts of a page about runs: what was forgotten and kept, and how it was made."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from srmu.evals.statistics import Estimate
from srmu.methods.importance import FLAT, FLAT_WORDS, describe_importance
from srmu.report import results
from srmu.report.attacks import Recovery
from srmu.report.figures import GREY, Row, Series, draw_figure, label_look, make_look, mark_value
from srmu.report.format import count_words, drop_empty, format_share, name_words, write_words
from srmu.report.html import LABEL, Block, Section, Table
from srmu.report.results import GroupRow, RunGroup

CHANCE = 0.25  # of four options
LARGEST = 256  # dimensions of an importance map that its table lists
STANDS_OUT = 3.0  # standard deviations above the mean
CURVES = {  # keys of metrics.jsonl
    "forget": "Forget loss",
    "retain": "Retain loss, log scale",
    "forget_cos": "Forget cosine",
    "retain_cos": "Retain cosine",
}


# ---- forgetting against utility


def tradeoff_section(
    rows: Sequence[GroupRow],
    labels: Sequence[str],
    columns: Sequence[str],
    forget: Sequence[str],
    recoveries: Sequence[Recovery | None],
) -> Section:
    """The plot of the first forget metric against the last column, and the table of all, for each group."""
    x, y = name_words(columns[0]), name_words(columns[-1])
    known = [numbers[columns[-1]] for row in rows for numbers in (row.before, row.after) if columns[-1] in numbers]
    lowest = min(1.0, *(one.low if one.has_interval else one.value for one in known))
    bottom = int(lowest * 10) / 10 - 0.04
    x_axis = {"title": f"{x}, accuracy", "range": [0, 1.04], "tickformat": ".0%", "dtick": 0.25}
    y_axis = {"title": f"{y}, accuracy", "range": [bottom, 1 + (1 - bottom) * 0.06], "tickformat": ".0%"}
    heads = {c: f"{name_words(c)}\n{'lower' if c in forget else 'higher'} is better" for c in columns}
    pictures, tables = [], []
    for group in dict.fromkeys(row.group for row in rows):
        pairs = [pair for pair in zip(rows, recoveries, strict=True) if pair[0].group == group]
        lines = results_rows(pairs, heads)
        first = sum(not line[LABEL] for line in lines)
        title = "Mean over seeds with 95 % interval; accuracies in per cent"
        tables.append(Block(table=Table(f"{group}. {title}" if group else title, lines, first)))
        ring = make_look(GREY, "circle-open", size=12)
        series = []
        for line in lines:
            label = line[LABEL]
            look = label_look(labels.index(label), size=11) if label else ring
            marks = {name_words(column): line[head] for column, head in heads.items()}
            if marks[x] is not None and marks[y] is not None:
                # one alone has no button that names it
                series.append(Series(line["Method"], [marks], look, label if len(labels) > 1 else ""))
        figure = draw_figure(group, series, x, y, x_axis=x_axis, y_axis=y_axis)
        mark_value(figure, "chance", x=next((one.chance for one in recoveries if one), CHANCE))
        figure.plot.add_annotation(
            x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="top", xshift=3,
            showarrow=False, text="\N{NORTH WEST ARROW} better",
        )  # fmt: skip
        pictures.append(figure)
    notes = write_words("tradeoff", attacked=any(recoveries))
    return Section("Forgetting against utility", notes, [Block(pictures), *tables])


def results_rows(pairs: Sequence[tuple[GroupRow, Recovery | None]], heads: Mapping[str, str]) -> Sequence[Row]:
    """The models that a setting's methods started from, then the methods, with K* or that they were not attacked."""
    befores: list[Mapping[str, Estimate]] = []
    for row, _ in pairs:
        if row.before and row.before not in befores:
            befores.append(row.before)
    models = [("", "Before: original model", numbers, "", "", "") for numbers in befores]
    for row, one in pairs:
        attacked = (format_share(one.worst), one.strongest) if one else ("", "not attacked")
        models.append((row.label, row.label, row.after, *attacked, str(len(row.runs))))
    lines = [
        {LABEL: label, "Method": name}
        | {head: numbers.get(column) for column, head in heads.items()}
        | {"K*\nlower is better": share, "Strongest attack": strongest, "Seeds": seeds}
        for label, name, numbers, share, strongest, seeds in models
    ]
    return drop_empty(lines)


# ---- training curves


def training_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section:
    """The curves of metrics.jsonl, and where they start and end."""
    curves = [(entry, known) for entry in entries if (known := results.training_curves(entry.runs, [*CURVES]))]
    blocks = []
    for group in dict.fromkeys(entry.group for entry, _ in curves):
        figures = []
        for key, title in CURVES.items():
            series = []
            for entry, known in curves:
                if entry.group == group and key in known:
                    look = label_look(labels.index(entry.label), mode="lines", width=1.75)
                    marks = [{"step": step, "value": value} for step, value in known[key].items()]
                    series.append(Series(entry.label, marks, look, entry.label))
            scale = {"type": "log", "dtick": 1, "exponentformat": "power"} if key == "retain" else {"nticks": 5}
            y_axis = {"title": None, **scale}
            if series:
                figures.append(draw_figure(title, series, "step", "value", x_axis={"nticks": 5}, y_axis=y_axis))
        blocks.append(Block(figures, title=group))
    rows: list[Row] = []
    for entry, known in curves:
        ends = {key: "{:.4g} \N{RIGHTWARDS ARROW} {:.4g}".format(*curve.iloc[[0, -1]]) for key, curve in known.items()}
        cells = {f"{title}\nfirst to last": ends.get(key) for key, title in CURVES.items()}
        rows.append({LABEL: entry.label, "Method": entry.name, **cells})
    blocks += [Block(table=Table("Where the curves start and end", rows))] if rows else []
    return Section("Training curves", write_words("training"), blocks)


# ---- importance maps


def importance_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section:
    """The importance maps, sortable and with outliers named."""
    maps = results.importance_maps(entries)
    topics = {topic for _, topic, _ in maps}
    blocks = [draw_map(*key, owners, labels, len(topics) > 1) for key, owners in maps.items()]
    return Section("Importance maps", write_words("importance"), blocks)


def draw_map(
    group: str, topic: str, values: Sequence[float], owners: Sequence[str], labels: Sequence[str], several: bool
) -> Block:
    """The sorted weights of a map of the methods `owners` beside a table of the largest, and which stand out."""
    facts = describe_importance(torch.tensor(values))
    sizes = pd.Series(values).sort_values(ascending=False, kind="stable")
    marks = [
        {"rank": rank, "importance": round(size, 4), "dimension": str(dimension)}
        for rank, (dimension, size) in enumerate(sizes.items(), 1)
    ]
    series = [Series("importance", marks, label_look(labels.index(owners[0]), mode="lines"))]
    x_axis, y_axis = {"title": "dimensions, from most to least important"}, {"range": [0, 1.02]}
    subject = f"{len(sizes)} dimensions; a uniform map of the same mean is at {facts['mean']:.3f}"
    figure = draw_figure("", series, "rank", "importance", x_axis=x_axis, y_axis=y_axis, subject=subject)
    mark_value(figure, "uniform", y=facts["mean"])
    lines = [{"Dimension": mark["dimension"], "Importance": f"{mark['importance']:.3f}"} for mark in marks[:LARGEST]]
    caption = "Importance by dimension" if len(sizes) <= LARGEST else f"The largest {LARGEST}"
    stand_out = [*sizes[sizes > facts["mean"] + STANDS_OUT * facts["sd"]].index]
    words = write_words("map", facts=facts, flat=FLAT_WORDS if facts["sd"] < FLAT else "", stand_out=stand_out)
    title = " \N{MIDDLE DOT} ".join(filter(None, [", ".join(owners), group, f"topic {topic}" * several]))
    return Block([figure], Table(caption, lines), title, words, owners)


# ---- what else was measured


def other_section(entries: Sequence[RunGroup], known: Sequence[str]) -> Section:
    """What was measured beyond the columns that the first table has, such as each subject of MMLU."""
    lines = []
    for entry in entries:
        row = results.aggregate_runs(entry)
        own = f", {entry.label}" if len(entries) > 1 else ""
        for name in [name for name in row.after if name not in known]:
            numbers = {"Before": row.before.get(name), "After": row.after[name]}
            lines.append({LABEL: entry.label, "Metric": name_words(name) + own, **numbers})
    table = Table("Means over seeds; accuracies in per cent", lines)
    return Section("Other measurements", [], [Block(table=table)] if lines else [])


# ---- how it was made


def record_section(entries: Sequence[RunGroup]) -> Section:
    """The settings and the record of each entry's runs; where runs differ, the value of each; defaults are folded."""
    blocks = []
    for entry in entries:
        facts: dict[str, dict[str, None]] = {}
        for name, value in (pair for folder in entry.runs for pair in results.list_run_facts(folder).items()):
            if value is not None:
                facts.setdefault(name, {})[results.format_fact(value)] = None
        defaults = results.list_defaults(entry.runs[0])
        parts: dict[bool, list[Row]] = {False: [], True: []}  # by whether it is a default
        for name, values in facts.items():
            row = {"Fact": name_words(name).replace(".", " \N{MIDDLE DOT} "), "Value": "; ".join(values)}
            parts[[*values] == [defaults.get(name)]].append(row)
        whose = f"{entry.name} \N{MIDDLE DOT} {count_words(len(entry.runs), 'run')}"
        fold = whose if len(entries) > 1 else ""
        usual = f"{count_words(len(parts[True]), 'setting')} of {entry.name} as by default"
        for title, line, rows in ((f"Settings of {whose}", fold, parts[False]), (usual, usual, parts[True])):
            if rows:
                blocks.append(Block(table=Table(title, rows, words=True, fold=line, label=entry.label)))
    return Section("Settings and record", [], blocks)
