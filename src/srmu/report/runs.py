"""The parts of a page about runs: what was forgotten and kept, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from srmu.evals.statistics import Estimate
from srmu.methods.importance import FLAT
from srmu.report.attacks import Recovery
from srmu.report.figures import GREY, Figure, Series, draw_figure, label_look, make_look, mark_value
from srmu.report.format import capitalise, count_words, metric_words, name_words
from srmu.report.html import Beside, Cell, Panels, Section, Table, TableLine, Value, make_cell, share_cell
from srmu.report.results import (
    GroupRow,
    RunGroup,
    estimate_columns,
    importance_maps,
    read_results,
    record_facts,
    run_settings,
    training_curves,
)

CHANCE = 0.25  # of four options
GROUPS = ("mmlu", "wmdp")  # tasks with subjects; others are found by their names
BRANCHES = 3  # a task with so many others that continue its name is a group too
LARGEST = 256  # dimensions of an importance map that its table lists
STANDS_OUT = 3.0  # standard deviations above the mean
CURVE_TITLES = {
    "forget": "Forget loss",
    "retain": "Retain loss, log scale",
    "forget_cos": "Forget cosine",
    "retain_cos": "Retain cosine",
}
Numbers = Mapping[str, Estimate]


# ---- forgetting against utility


def tradeoff_section(
    rows: Sequence[GroupRow],
    labels: Sequence[str],
    columns: Sequence[str],
    forget: Sequence[str],
    recoveries: Sequence[Recovery | None],
) -> Section:
    """The plot of the first forget metric against the last column, and the table of all."""
    kept = [
        one.low if one.has_interval else one.value
        for row in rows
        for numbers in (row.before, row.after)
        if (one := numbers.get(columns[-1]))
    ]
    bottom = int(min([1.0, *kept]) * 10) / 10 - 0.04
    chance = next((one.chance for one in recoveries if one), CHANCE)
    pictures, tables = [], []
    for group in dict.fromkeys(row.group for row in rows):
        pairs = [pair for pair in zip(rows, recoveries, strict=True) if pair[0].group == group]
        members = [row for row, _ in pairs]
        pictures.append(draw_tradeoff(group, members, labels, columns, bottom, chance))
        tables.append(results_table(group, pairs, columns, forget))
    notes = [
        "Each mark is one method, each bar a 95 % interval. Further left, fewer questions on the "
        "knowledge to forget are answered; further up, more of the rest is kept."
    ]
    if any(recoveries):
        notes.append(
            "K* is the share of the original knowledge that the best attack found: 1 where all "
            "of it came back, 0 where none did."
        )
    return Section("Forgetting against utility", notes, [Panels(pictures, small=False), *tables])


def distinct_originals(rows: Sequence[GroupRow]) -> list[Numbers]:
    """The distinct models that the rows started from."""
    originals: list[Numbers] = []
    for row in rows:
        if row.before and row.before not in originals:
            originals.append(row.before)
    return originals


def draw_tradeoff(
    group: str, rows: Sequence[GroupRow], labels: Sequence[str], columns: Sequence[str], bottom: float, chance: float
) -> Figure:
    """A mark for each method and each original model."""
    ring = make_look(GREY, "circle-open", size=12)
    models = [("Original model", numbers, ring, "") for numbers in distinct_originals(rows)]
    for row in rows:
        look = label_look(labels.index(row.label), size=11)
        models.append((row.label, row.after, look, row.label))
    series = [
        Series(name, [{metric_words(c): numbers.get(c) for c in columns}], look, label)
        for name, numbers, look, label in models
        if columns[0] in numbers and columns[-1] in numbers
    ]
    x, y = metric_words(columns[0]), metric_words(columns[-1])
    figure = draw_figure(
        group, series, x, y,
        x_axis={"title": f"{x}, accuracy", "range": [0, 1.04], "tickformat": ".0%", "dtick": 0.25},
        y_axis={"title": f"{y}, accuracy", "range": [bottom, 1 + (1 - bottom) * 0.06],
                "tickformat": ".0%"},
    )  # fmt: skip
    mark_value(figure, "chance", x=chance)
    figure.plot.add_annotation(
        x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="top", xshift=3,
        showarrow=False, text="\N{NORTH WEST ARROW} better",
    )  # fmt: skip
    return figure


def results_table(
    group: str, pairs: Sequence[tuple[GroupRow, Recovery | None]], columns: Sequence[str], forget: Sequence[str]
) -> Table:
    """The numbers of a setting's methods, with K* where any of them was attacked."""
    heads = ["Method"]
    for name in columns:
        better = "lower" if name in forget else "higher"
        heads.append(f"{capitalise(metric_words(name))}\n{better} is better")
    attacked = any(recovery for _, recovery in pairs)
    if attacked:
        heads += ["K*\nlower is better", "Strongest attack"]
    blank = [""] * (1 + 2 * attacked)
    before = [
        TableLine(["Before: original model", *map(numbers.get, columns), *blank])
        for numbers in distinct_originals([row for row, _ in pairs])
    ]
    lines = []
    for row, recovery in pairs:
        cells: list[Value] = [row.label, *map(row.after.get, columns)]
        if recovery:
            cells += [share_cell(recovery.worst), name_words(recovery.strongest)]
        elif attacked:
            cells += [None, "not attacked"]
        lines.append(TableLine([*cells, row.seeds], row.label))
    title = "Mean over seeds with 95 % interval; accuracies in per cent"
    return Table(f"{group}. {title}" if group else title, [*heads, "Seeds"], lines, before)


# ---- training curves


def training_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section | None:
    """The curves of metrics.jsonl; None where no run has one."""
    panels, lines = [], []
    curves = [(entry, training_curves(entry.runs)) for entry in entries]
    curves = [(entry, known) for entry, known in curves if known]
    for group in dict.fromkeys(entry.group for entry, _ in curves):
        members = [(entry, known) for entry, known in curves if entry.group == group]
        figures = []
        for key, title in CURVE_TITLES.items():
            series = [
                Series(
                    entry.label,
                    [{"step": x, "value": y} for x, y in zip(*known[key], strict=True)],
                    label_look(labels.index(entry.label), mode="lines", width=1.75),
                    entry.label,
                )
                for entry, known in members
                if key in known
            ]
            log = {"type": "log", "dtick": 1, "exponentformat": "power"}
            y_axis = {"title": None, **(log if key == "retain" else {"nticks": 5})}
            if series:
                figures.append(draw_figure(title, series, "step", "value", x_axis={"nticks": 5}, y_axis=y_axis))
        panels.append(Panels(figures, group))
        for entry, known in members:
            name = f"{entry.label} · {group}" if group else entry.label
            ends: list[Value] = []
            for key in CURVE_TITLES:
                first, last = (known[key][1][i] if key in known else None for i in (0, -1))
                text = f"{first:.4g} \N{RIGHTWARDS ARROW} {last:.4g}" if key in known else ""
                ends.append(Cell(text, "", last) if text else None)
            lines.append(TableLine([name, *ends], entry.label))
    if not panels:
        return None
    notes = [
        "Averages over seeds, by training step. Forget cosine is the alignment of activations on "
        "the forget text with the direction they are steered to; retain cosine compares "
        "activations on the retain text with those of the original model. Methods steer to "
        "different targets, so compare the shapes of their losses rather than the heights."
    ]
    heads = ["Method", *(f"{title}\nfirst to last" for title in CURVE_TITLES.values())]
    table = Table("Where the curves start and end", heads, lines)
    return Section("Training curves", notes, [*panels, table])


# ---- importance maps


def importance_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section | None:
    """The importance maps, sortable and with outliers named; None where no method has one."""
    blocks = [draw_map(one, labels) for one in importance_maps(entries)]
    if not blocks:
        return None
    notes = [
        "The map gives each dimension of the activations a weight between 0 and 1 for the "
        "knowledge to forget, relative to the text to keep. Shown is the first seed, from the "
        "largest weight to the smallest. The dotted line is a uniform map of the same mean: the "
        "closer the curve is to it, the less the map selects. Shuffling a map changes which "
        "dimensions it picks, and leaves this curve as it is."
    ]
    return Section("Importance maps", notes, blocks)


def draw_map(one: Mapping[str, Any], labels: Sequence[str]) -> Beside:
    """The sorted weights of a map beside a table of the largest."""
    sizes, order = one["sizes"], one["order"]
    mean = sum(sizes) / len(sizes)
    look = label_look(labels.index(one["labels"][0]), mode="lines")
    rows = [
        {"rank": rank, "importance": size, "dimension": str(dimension)}
        for rank, (dimension, size) in enumerate(zip(order, sizes, strict=True), 1)
    ]
    title = "dimensions, from most to least important"
    figure = draw_figure(
        "", [Series("importance", rows, look)], "rank", "importance",
        x_axis={"title": title}, y_axis={"range": [0, 1.02]},
        subject=f"{len(sizes)} dimensions; a uniform map of the same mean is at {mean:.3f}",
    )  # fmt: skip
    mark_value(figure, "uniform", y=mean)
    lines = [
        TableLine([int(row["dimension"]), Cell(f"{row['importance']:.3f}", "", row["importance"])])
        for row in rows[:LARGEST]
    ]
    caption = "Importance by dimension" if len(sizes) <= LARGEST else f"The largest {LARGEST}"
    heading = [", ".join(one["labels"]), one["group"], f"topic {one['topic']}"]
    table = Table(caption, ["Dimension", "Importance"], lines)
    notes = describe_map(sizes, order, one["facts"])
    return Beside(" · ".join(filter(None, heading)), figure, table, notes, one["labels"])


def describe_map(sizes: Sequence[float], order: Sequence[int], facts: Mapping[str, float] | None) -> list[str]:
    """Whether a map is flat, and which dimensions stand out."""
    mean = sum(sizes) / len(sizes)
    sd = (sum((size - mean) ** 2 for size in sizes) / len(sizes)) ** 0.5
    flat = "Not flat: it weighs some dimensions more than others."
    if sd < FLAT:
        flat = "Nearly flat: it weighs almost all dimensions alike, and so selects nothing."
    flat += f" Mean {mean:.3f}, standard deviation {sd:.3f}"
    if facts:
        above = 100 * facts["share_above_half"]
        flat += f", {above:.1f} % of the dimensions above 0.5, Gini {facts['gini']:.3f}"
    out = [d for d, size in zip(order, sizes, strict=True) if size > mean + STANDS_OUT * sd]
    stands = "No dimension is more than three standard deviations above the mean."
    if out:
        listed = ", ".join(map(str, out[:12]))
        listed += f" and {len(out) - 12} more" if len(out) > 12 else ""
        verb = "stand" if len(out) > 1 else "stands"
        stands = (
            f"{count_words(len(out), 'dimension')} {verb} out, more than three standard deviations "
            f"above the mean: {listed}."
        )
    return [f"{flat}.", stands]


# ---- subjects, and what else was measured


def group_subjects(metrics: Sequence[str]) -> dict[str, list[str]]:
    """Groups such as MMLU's, each with the accuracies whose names continue its own."""
    tasks = [metric for metric in metrics if metric.endswith("/acc")]
    stems = dict.fromkeys([*GROUPS, *(task.removesuffix("/acc") for task in tasks)])
    groups = {stem: [task for task in tasks if task.startswith(f"{stem}_")] for stem in stems}
    return {stem: members for stem, members in groups.items() if len(members) >= BRANCHES}


def measure_all(entry: RunGroup) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """All that was measured before and after, a mean over an entry's seeds."""
    both = [read_results(folder) for folder in entry.runs]
    names = {name: [name] for one in both for name in one["after"]}
    before, after = (estimate_columns([one[when] for one in both], names)
                     for when in ("before", "after"))  # fmt: skip
    return before, after


def subject_section(entries: Sequence[RunGroup]) -> Section | None:
    """Each group's subjects before and after, the largest loss first; None where there is none."""
    blocks = []
    heads = ["Subject", "Before", "After", "Change\npoints"]
    for entry in entries:
        before, after = measure_all(entry)
        for group, members in group_subjects([*after]).items():
            lines = []
            for name in members:
                change = None
                if name in before:
                    gap = after[name].value - before[name].value
                    change = Cell(f"{100 * gap:+.1f}", "", gap)
                subject = metric_words(name.removeprefix(f"{group}_"))
                cells = [subject, before.get(name), after[name], change]
                lines.append(TableLine(cells, entry.label))
            lines.sort(key=lambda line: make_cell(line.cells[-1]).sort or 0.0)
            own = entry.label if len(entries) > 1 else ""
            title = ", ".join(filter(None, [metric_words(group), own, entry.group]))
            blocks.append(Table(title, heads, lines))
    notes = ["Accuracies in per cent with 95 % intervals, the largest loss first."]
    return Section("Accuracy by subject", notes, blocks) if blocks else None


def other_section(entries: Sequence[RunGroup], known: Sequence[str]) -> Section | None:
    """What was measured beyond the columns that the first table has."""
    lines = []
    for entry in entries:
        before, after = measure_all(entry)
        grouped = [name for members in group_subjects([*after]).values() for name in members]
        own = f", {entry.label}" if len(entries) > 1 else ""
        for name in after:
            if name not in known and name not in grouped:
                cells = [metric_words(name) + own, before.get(name), after[name]]
                lines.append(TableLine(cells, entry.label))
    if not lines:
        return None
    table = Table("Means over seeds; accuracies in per cent", ["Metric", "Before", "After"], lines)
    return Section("Other measurements", [], [table])


# ---- how it was made


def record_sections(entries: Sequence[RunGroup]) -> list[Section]:
    """The settings and the record of each entry's runs."""
    sections = []
    for title, read_facts in {"Settings": run_settings, "The record": record_facts}.items():
        blocks = []
        for entry in entries:
            lines = [
                TableLine([name_words(name).replace(".", " · "), *values])
                for name, values in read_facts(entry.runs).items()
            ]
            runs = count_words(len(entry.runs), "run")
            name = " · ".join(filter(None, [entry.label, entry.group, runs]))
            fold = name if len(entries) > 1 else ""
            caption = f"{title} of {name}"
            if lines:
                blocks.append(Table(caption, [], lines, words=True, fold=fold, label=entry.label))
        if blocks:
            sections.append(Section(title, [], blocks))
    return sections
