"""The parts of a page about runs: what was forgotten and kept, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from srmu.evals.statistics import Estimate
from srmu.methods.importance import FLAT
from srmu.report import results
from srmu.report.attacks import Recovery
from srmu.report.figures import GREY, Figure, Row, Series, draw_figure, label_look, make_look, mark_value
from srmu.report.format import count_words, format_share, name_words, write_words
from srmu.report.html import LABEL, Block, Section, Table
from srmu.report.results import GroupRow, RunGroup

CHANCE = 0.25  # of four options
GROUPS = ("mmlu", "wmdp")  # tasks with subjects; others are found by their names
BRANCHES = 3  # a task with so many others that continue its name is a group too
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
    """The plot of the first forget metric against the last column, and the table of all."""
    kept = [one for row in rows for numbers in (row.before, row.after) if (one := numbers.get(columns[-1]))]
    lowest = min(1.0, *(one.low if one.has_interval else one.value for one in kept))
    chance = next((one.chance for one in recoveries if one), CHANCE)
    pictures, tables = [], []
    for group in dict.fromkeys(row.group for row in rows):
        pairs = [pair for pair in zip(rows, recoveries, strict=True) if pair[0].group == group]
        originals: list[Mapping[str, Estimate]] = []  # the distinct models that the rows started from
        for row, _ in pairs:
            if row.before and row.before not in originals:
                originals.append(row.before)
        ring = make_look(GREY, "circle-open", size=12)
        models = [("Original model", numbers, ring, "") for numbers in originals]
        models += [(r.label, r.after, label_look(labels.index(r.label), size=11), r.label) for r, _ in pairs]
        series = [
            Series(name, [{name_words(c): numbers.get(c) for c in columns}], look, label)
            for name, numbers, look, label in models
            if columns[0] in numbers and columns[-1] in numbers
        ]
        pictures.append(draw_tradeoff(group, series, columns, int(lowest * 10) / 10 - 0.04, chance))
        tables.append(Block(table=results_table(group, pairs, originals, columns, forget)))
    notes = write_words("tradeoff", attacked=any(recoveries))
    return Section("Forgetting against utility", notes, [Block(pictures), *tables])


def draw_tradeoff(group: str, series: Sequence[Series], columns: Sequence[str], bottom: float, chance: float) -> Figure:
    """A mark for each method and each original model."""
    x, y = name_words(columns[0]), name_words(columns[-1])
    x_axis = {"title": f"{x}, accuracy", "range": [0, 1.04], "tickformat": ".0%", "dtick": 0.25}
    y_axis = {"title": f"{y}, accuracy", "range": [bottom, 1 + (1 - bottom) * 0.06], "tickformat": ".0%"}
    figure = draw_figure(group, series, x, y, x_axis=x_axis, y_axis=y_axis)
    mark_value(figure, "chance", x=chance)
    figure.plot.add_annotation(
        x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="top", xshift=3,
        showarrow=False, text="\N{NORTH WEST ARROW} better",
    )  # fmt: skip
    return figure


def results_table(
    group: str,
    pairs: Sequence[tuple[GroupRow, Recovery | None]],
    originals: Sequence[Mapping[str, Estimate]],
    columns: Sequence[str],
    forget: Sequence[str],
) -> Table:
    """The numbers of a setting's methods, with K* where any of them was attacked."""
    heads = {name: f"{name_words(name)}\n{'lower' if name in forget else 'higher'} is better" for name in columns}
    attacked = any(recovery for _, recovery in pairs)

    def make_row(name: str, numbers: Mapping[str, Estimate], found: Sequence[str], seeds: int | str) -> Row:
        recovered = dict(zip(("K*\nlower is better", "Strongest attack"), found, strict=True)) if attacked else {}
        return {"Method": name} | {heads[c]: numbers.get(c) for c in columns} | recovered | {"Seeds": seeds}

    rows = [make_row("Before: original model", numbers, ("", ""), "") for numbers in originals]
    for row, one in pairs:
        found = (format_share(one.worst), name_words(one.strongest)) if one else ("", "not attacked")
        rows.append({LABEL: row.label, **make_row(row.label, row.after, found, row.seeds)})
    title = "Mean over seeds with 95 % interval; accuracies in per cent"
    return Table(f"{group}. {title}" if group else title, rows, first=len(originals))


# ---- training curves


def training_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section | None:
    """The curves of metrics.jsonl; None where no run has one."""
    curves = [(entry, results.training_curves(entry.runs, [*CURVES])) for entry in entries]
    curves = [(entry, known) for entry, known in curves if not known.empty]
    if not curves:
        return None
    blocks = []
    for group in dict.fromkeys(entry.group for entry, _ in curves):
        figures = []
        for key, title in CURVES.items():
            series = [
                Series(
                    entry.label,
                    [{"step": step, "value": value} for step, value in known[key].dropna().items()],
                    label_look(labels.index(entry.label), mode="lines", width=1.75),
                    entry.label,
                )
                for entry, known in curves
                if entry.group == group and key in known
            ]
            log = {"type": "log", "dtick": 1, "exponentformat": "power"}
            y_axis = {"title": None, **(log if key == "retain" else {"nticks": 5})}
            if series:
                figures.append(draw_figure(title, series, "step", "value", x_axis={"nticks": 5}, y_axis=y_axis))
        blocks.append(Block(figures, title=group))
    rows: list[Row] = []
    for entry, known in curves:
        ends = {title: known[key].dropna() if key in known else [] for key, title in CURVES.items()}
        texts = {
            f"{title}\nfirst to last": f"{curve.iloc[0]:.4g} \N{RIGHTWARDS ARROW} {curve.iloc[-1]:.4g}"
            if len(curve) else None
            for title, curve in ends.items()
        }  # fmt: skip
        rows.append({LABEL: entry.label, "Method": entry.name, **texts})
    blocks.append(Block(table=Table("Where the curves start and end", rows)))
    return Section("Training curves", write_words("training"), blocks)


# ---- importance maps


def importance_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section | None:
    """The importance maps, sortable and with outliers named; None where no method has one."""
    blocks = [draw_map(one, labels) for one in results.importance_maps(entries)]
    return Section("Importance maps", write_words("importance"), blocks) if blocks else None


def draw_map(one: Mapping[str, Any], labels: Sequence[str]) -> Block:
    """The sorted weights of a map beside a table of the largest, and which stand out."""
    order = (-one["values"]).argsort(kind="stable")
    sizes = one["values"][order].round(4)
    mean, sd = sizes.mean(), sizes.std()
    rows = [
        {"rank": rank, "importance": float(size), "dimension": str(dimension)}
        for rank, (dimension, size) in enumerate(zip(order, sizes, strict=True), 1)
    ]
    figure = draw_figure(
        "",
        [Series("importance", rows, label_look(labels.index(one["labels"][0]), mode="lines"))],
        "rank",
        "importance",
        x_axis={"title": "dimensions, from most to least important"},
        y_axis={"range": [0, 1.02]},
        subject=f"{len(sizes)} dimensions; a uniform map of the same mean is at {mean:.3f}",
    )
    mark_value(figure, "uniform", y=mean)
    lines = [{"Dimension": row["dimension"], "Importance": f"{row['importance']:.3f}"} for row in rows[:LARGEST]]
    caption = "Importance by dimension" if len(sizes) <= LARGEST else f"The largest {LARGEST}"
    heading = filter(None, [", ".join(one["labels"]), one["group"], f"topic {one['topic']}"])
    stand_out = order[sizes > mean + STANDS_OUT * sd].tolist()
    words = write_words("map", mean=mean, sd=sd, flat=sd < FLAT, facts=one["facts"], stand_out=stand_out)
    title = " \N{MIDDLE DOT} ".join(heading)
    return Block([figure], Table(caption, lines), title, words, one["labels"])


# ---- subjects, and what else was measured


def measurement_sections(entries: Sequence[RunGroup], known: Sequence[str]) -> list[Section]:
    """Each group's subjects, the largest loss first; then what is neither there nor `known`."""
    several = len(entries) > 1
    blocks, others = [], []
    for entry in entries:
        row = results.aggregate_runs(entry)
        tasks = [name for name in row.after if name.endswith("/acc")]
        stems = dict.fromkeys([*GROUPS, *(task.removesuffix("/acc") for task in tasks)])
        groups = {stem: [task for task in tasks if task.startswith(f"{stem}_")] for stem in stems}
        groups = {stem: members for stem, members in groups.items() if len(members) >= BRANCHES}
        for stem, members in groups.items():
            changes = {m: row.after[m].value - row.before[m].value for m in members if m in row.before}
            lines: list[Row] = [
                {
                    LABEL: entry.label,
                    "Subject": name_words(name.removeprefix(f"{stem}_")),
                    "Before": row.before.get(name),
                    "After": row.after[name],
                    "Change\npoints": f"{100 * changes[name]:+.1f}" if name in changes else None,
                }
                for name in sorted(members, key=lambda name: changes.get(name, 0.0))
            ]
            title = ", ".join(filter(None, [name_words(stem), entry.label if several else "", entry.group]))
            blocks.append(Block(table=Table(title, lines)))
        grouped = [name for members in groups.values() for name in members]
        for name in row.after:
            if name not in known and name not in grouped:
                metric = name_words(name) + (f", {entry.label}" if several else "")
                others.append(
                    {LABEL: entry.label, "Metric": metric, "Before": row.before.get(name), "After": row.after[name]}
                )
    notes = ["Accuracies in per cent with 95 % intervals, the largest loss first."]
    sections = [Section("Accuracy by subject", notes, blocks)] if blocks else []
    if others:
        table = Table("Means over seeds; accuracies in per cent", others)
        sections.append(Section("Other measurements", [], [Block(table=table)]))
    return sections


# ---- how it was made


def record_sections(entries: Sequence[RunGroup]) -> list[Section]:
    """The settings and the record of each entry's runs; where runs differ, the value of each."""
    sections = []
    for title, read_facts in {"Settings": results.run_settings, "The record": results.record_facts}.items():
        blocks = []
        for entry in entries:
            facts: dict[str, list[str]] = {}
            for folder in entry.runs:
                for name, value in read_facts(folder).items():
                    if value is not None:
                        facts.setdefault(name, []).append(results.format_fact(value))
            rows = [
                {title: name_words(name).replace(".", " \N{MIDDLE DOT} "), "Value": "; ".join(dict.fromkeys(values))}
                for name, values in facts.items()
            ]
            name = f"{entry.name} \N{MIDDLE DOT} {count_words(len(entry.runs), 'run')}"
            fold = name if len(entries) > 1 else ""
            if rows:
                blocks.append(Block(table=Table(f"{title} of {name}", rows, words=True, fold=fold, label=entry.label)))
        if blocks:
            sections.append(Section(title, [], blocks))
    return sections
