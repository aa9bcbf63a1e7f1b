"""The parts of a page about runs: what was forgotten and kept, what came back, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from srmu.evals.results import Metrics
from srmu.evals.statistics import Estimate
from srmu.methods.importance import FLAT
from srmu.report.attacks import Recovery
from srmu.report.format import (
    capitalise,
    describe_numbers,
    draw_level,
    draw_mark,
    hover_text,
    metric_words,
    name_words,
    number_cell,
    share_cell,
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
    label_marker,
    label_stroke,
    make_axis,
    make_cell,
)
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


# ---- forgetting against utility


def tradeoff_section(
    rows: Sequence[GroupRow],
    labels: Sequence[str],
    columns: Sequence[str],
    forget: Sequence[str],
    found: Sequence[Recovery | None],
) -> Section:
    """The plot of the first forget metric against the last column, and the table of all."""
    axes = columns[0], columns[-1]
    groups: dict[str, list[GroupRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    lowest = [
        one.low if one.has_interval else one.value
        for row in rows
        for numbers in (row.before, row.after)
        if (one := numbers.get(axes[1]))
    ]
    bottom = int(min([1.0, *lowest]) * 10) / 10 - 0.04
    chance = next((one.chance for one in found if one), CHANCE)
    pictures = [
        _front(group, members, labels, axes, bottom, chance) for group, members in groups.items()
    ]
    attacks = {id(row): one for row, one in zip(rows, found, strict=True) if one}
    tables = [
        _results(group, members, columns, forget, attacks) for group, members in groups.items()
    ]
    notes = [
        "Each mark is one method, each bar a 95 % interval. Further left, fewer questions on the "
        "knowledge to forget are answered; further up, more of the rest is kept.",
    ]
    if attacks:
        notes.append(
            "K* is the share of the original knowledge that the best attack found: 1 where all "
            "of it came back, 0 where none did."
        )
    return Section("Forgetting against utility", notes, [Panels(pictures, small=False), *tables])


def distinct_originals(rows: Sequence[GroupRow]) -> list[Mapping[str, Estimate]]:
    """The distinct models that the rows started from."""
    found: list[Mapping[str, Estimate]] = []
    for row in rows:
        if row.before and row.before not in found:
            found.append(row.before)
    return found


def _front(
    group: str,
    rows: Sequence[GroupRow],
    labels: Sequence[str],
    axes: tuple[str, str],
    bottom: float,
    chance: float,
) -> Figure:
    ring = {"symbol": "circle-open", "color": GREY, "size": 12, "line": {"width": 2}}
    shown = [("Original model", numbers, "", ring) for numbers in distinct_originals(rows)]
    for row in rows:
        look = label_marker(labels.index(row.label), size=11)
        shown.append((row.label, row.after, row.label, look))
    traces = [
        draw_mark(
            numbers[axes[0]], numbers[axes[1]], hover_text(name, *_lines(numbers)), label, look
        )
        for name, numbers, label, look in shown
        if axes[0] in numbers and axes[1] in numbers
    ]
    words = "; ".join(describe_numbers(name, numbers) for name, numbers, _, _ in shown)
    layout = draw_level(chance, "chance")
    layout["annotations"].append(
        {"x": 0, "y": 1, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top",
         "xshift": 3, "showarrow": False, "text": "\N{NORTH WEST ARROW} better"}
    )  # fmt: skip
    layout["xaxis"] = make_axis(
        f"{metric_words(axes[0])}, accuracy", range=[0, 1.04], tickformat=".0%", dtick=0.25
    )
    layout["yaxis"] = make_axis(
        f"{metric_words(axes[1])}, accuracy",
        range=[bottom, 1 + (1 - bottom) * 0.06],
        tickformat=".0%",
    )
    x, y = map(metric_words, axes)
    what = f"Scatter plot of {x} against {y}, per cent. {words}."
    return Figure(group, what, traces, layout)


def _lines(numbers: Mapping[str, Estimate]) -> list[str]:
    return [f"{metric_words(name)} {one}" for name, one in numbers.items()]


def _results(
    group: str,
    rows: Sequence[GroupRow],
    columns: Sequence[str],
    forget: Sequence[str],
    attacks: Mapping[int, Recovery],
) -> Table:
    attacked = any(id(row) in attacks for row in rows)
    heads: list[ColumnHead | str] = ["Method"]
    for name in columns:
        heads.append(
            ColumnHead(
                capitalise(metric_words(name)),
                f"{'lower' if name in forget else 'higher'} is better",
            )
        )
    if attacked:
        heads += [ColumnHead("K*", "lower is better"), "Strongest attack"]
    before = [
        TableLine(["Before: original model", *(number_cell(numbers.get(name)) for name in columns)]
             + [""] * (1 + 2 * attacked))
        for numbers in distinct_originals(rows)
    ]  # fmt: skip
    lines = []
    for row in rows:
        cells: list[Any] = [row.label, *(number_cell(row.after.get(name)) for name in columns)]
        if attacked:
            one = attacks.get(id(row))
            cells += (
                [share_cell(one.worst), name_words(one.strongest)]
                if one
                else [None, "not attacked"]
            )
        lines.append(TableLine([*cells, row.seeds], row.label))
    title = "Mean over seeds with 95 % interval; accuracies in per cent"
    return Table(f"{group}. {title}" if group else title, [*heads, "Seeds"], lines, before)


# ---- training curves


def training_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section | None:
    """The curves of metrics.jsonl; None where no run has one."""
    panels = []
    ends: list[TableLine] = []
    drawn = [(entry, training_curves(entry.runs)) for entry in entries]
    for group in dict.fromkeys(entry.group for entry in entries):
        members = [(entry, found) for entry, found in drawn if entry.group == group and found]
        figures = []
        for key, title in CURVE_TITLES.items():
            traces = [
                {
                    "x": found[key][0], "y": found[key][1], "mode": "lines", "meta": entry.label,
                    "hovertemplate": f"<b>{escape(entry.label)}</b><br>step %{{x}}: %{{y:.3g}}",
                    "line": label_stroke(labels.index(entry.label), width=1.75),
                }
                for entry, found in members
                if key in found
            ]  # fmt: skip
            if traces:
                scale = {"type": "log", "dtick": 1, "exponentformat": "power"}
                layout = {
                    "xaxis": make_axis("step", nticks=5),
                    "yaxis": scale if key == "retain" else {"nticks": 5},
                }
                ends_of = [
                    f"{entry.label} from {found[key][1][0]:.3g} to {found[key][1][-1]:.3g}"
                    for entry, found in members
                    if key in found
                ]
                where = f" in {group}" if group else ""
                words = f"{title} by training step{where}: {', '.join(ends_of)}"
                figures.append(Figure(title, words, traces, layout))
        if figures:
            panels.append(Panels(figures, group))
        for entry, found in members:
            name = f"{entry.label} · {group}" if group else entry.label
            ends.append(
                TableLine([name, *(_ends(found.get(key)) for key in CURVE_TITLES)], entry.label)
            )
    if not panels:
        return None
    notes = [
        "Averages over seeds, by training step. Forget cosine is the alignment of activations on "
        "the forget text with the direction they are steered to; retain cosine compares "
        "activations on the retain text with those of the original model. Methods steer to "
        "different targets, so compare the shapes of their losses rather than the heights.",
    ]
    heads: list[ColumnHead | str] = [
        "Method",
        *(ColumnHead(title, "first to last") for title in CURVE_TITLES.values()),
    ]
    table = Table("Where the curves start and end", heads, ends)
    return Section("Training curves", notes, [*panels, table])


def _ends(curve: tuple[list[int], list[float]] | None) -> Cell | None:
    if curve is None:
        return None
    return Cell(f"{curve[1][0]:.4g} \N{RIGHTWARDS ARROW} {curve[1][-1]:.4g}", "", curve[1][-1])


# ---- importance maps


def importance_section(entries: Sequence[RunGroup], labels: Sequence[str]) -> Section | None:
    """The importance maps, sortable and with outliers named; None where no method has one."""
    blocks = [_map(one, labels) for one in importance_maps(entries)]
    if not blocks:
        return None
    notes = [
        "The map gives each dimension of the activations a weight between 0 and 1 for the "
        "knowledge to forget, relative to the text to keep. Shown is the first seed, from the "
        "largest weight to the smallest. The dashed line is a uniform map of the same mean: the "
        "closer the curve is to it, the less the map selects. Shuffling a map changes which "
        "dimensions it picks, and leaves this curve as it is.",
    ]
    return Section("Importance maps", notes, blocks)


def _map(found: Mapping[str, Any], labels: Sequence[str]) -> Beside:
    sizes, order = found["sizes"], found["order"]
    count = len(sizes)
    mean = sum(sizes) / count
    sd = (sum((size - mean) ** 2 for size in sizes) / count) ** 0.5
    notes = []
    if sd < FLAT:
        notes.append("Nearly flat: it weighs almost all dimensions alike, and so selects nothing.")
    else:
        notes.append("Not flat: it weighs some dimensions more than others.")
    notes[0] += f" Mean {mean:.3f}, standard deviation {sd:.3f}"
    if facts := found["facts"]:
        above = 100 * facts["share_above_half"]
        notes[0] += f", {above:.1f} % of the dimensions above 0.5, Gini {facts['gini']:.3f}"
    notes[0] += "."
    out = [d for d, size in zip(order, sizes, strict=True) if size > mean + STANDS_OUT * sd]
    if out:
        listed = ", ".join(map(str, out[:12])) + (
            f" and {len(out) - 12} more" if len(out) > 12 else ""
        )
        many = "dimensions stand" if len(out) > 1 else "dimension stands"
        notes.append(
            f"{len(out)} {many} out, more than three standard deviations above the mean: {listed}."
        )
    else:
        notes.append("No dimension is more than three standard deviations above the mean.")
    traces = [
        {"x": [1, count], "y": [mean, mean], "mode": "lines", "hoverinfo": "skip",
         "line": {"color": GREY, "dash": "dash", "width": 1.25}},
        {"x": list(range(1, count + 1)), "y": sizes, "mode": "lines", "text": order,
         "hovertemplate": "dimension %{text}<br>rank %{x}: %{y:.3f}",
         "line": label_stroke(labels.index(found["labels"][0]), width=2, dash="solid")},
    ]  # fmt: skip
    layout = {
        "xaxis": make_axis("dimensions, from most to least important"),
        "yaxis": make_axis("importance", range=[0, 1.02]),
        "annotations": [{"x": 1, "xref": "paper", "xanchor": "right", "y": mean, "text": "uniform",
                         "yanchor": "bottom", "showarrow": False}],
    }  # fmt: skip
    words = (
        f"Sorted importance of {count} dimensions, from {sizes[0]} down to {sizes[-1]}; a uniform "
        f"map of the same mean is at {mean:.3f}"
    )
    caption = "Importance by dimension" if count <= LARGEST else f"The largest {LARGEST}"
    lines = [
        TableLine([Cell(str(d), "", d), Cell(f"{size:.3f}", "", size)])
        for d, size in zip(order[:LARGEST], sizes, strict=False)
    ]
    heading = ", ".join(found["labels"])
    parts = [heading, *([found["group"]] if found["group"] else []), f"topic {found['topic']}"]
    return Beside(
        " · ".join(parts),
        Figure("", words, traces, layout),
        Table(caption, ["Dimension", "Importance"], lines, tall=True),
        notes,
        found["labels"],
    )


# ---- subjects, and what else was measured


def group_subjects(metrics: Sequence[str]) -> dict[str, list[str]]:
    """Groups such as MMLU's, each with the accuracies whose names continue its own."""
    tasks = [metric for metric in metrics if metric.endswith("/acc")]
    stems = dict.fromkeys([*GROUPS, *(task.removesuffix("/acc") for task in tasks)])
    found = {stem: [task for task in tasks if task.startswith(f"{stem}_")] for stem in stems}
    return {stem: members for stem, members in found.items() if len(members) >= BRANCHES}


def subject_section(entries: Sequence[RunGroup]) -> Section | None:
    """Each group's subjects before and after, the largest loss first; None where there is none."""
    blocks = []
    for entry in entries:
        both = [read_results(folder) for folder in entry.runs]
        names_ = list(dict.fromkeys(name for one in both for name in one["after"]))
        for group, members in group_subjects(names_).items():
            before, after = _changes(both, members)
            lines = []
            for name in members:
                if name not in after:
                    continue
                change = None
                if name in before:
                    difference = after[name].value - before[name].value
                    change = Cell(f"{100 * difference:+.1f}", "", difference)
                shown = metric_words(name.removeprefix(f"{group}_"))
                cells = [shown, number_cell(before.get(name)), number_cell(after[name]), change]
                lines.append(TableLine(cells, entry.label))
            lines.sort(key=loss_of)
            heads: list[ColumnHead | str] = [
                "Subject",
                "Before",
                "After",
                ColumnHead("Change", "points"),
            ]
            title = (
                f"{metric_words(group)}, {entry.label}" if len(entries) > 1 else metric_words(group)
            )
            if entry.group:
                title += f", {entry.group}"
            blocks.append(Table(title, heads, lines, tall=len(lines) > 20))
    notes = ["Accuracies in per cent with 95 % intervals, the largest loss first."]
    return Section("Accuracy by subject", notes, blocks) if blocks else None


def loss_of(line: TableLine) -> float:
    """What the line of a subject is sorted by: its change, 0 where that is not known."""
    return make_cell(line.cells[-1]).sort or 0.0


def _changes(
    both: Sequence[Mapping[str, Metrics]], metrics: Sequence[str]
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    columns = {name: [name] for name in metrics}
    before, after = (
        estimate_columns([one[when] for one in both], columns) for when in ("before", "after")
    )
    return before, after


def other_section(entries: Sequence[RunGroup], known: Sequence[str]) -> Section | None:
    """What was measured beyond the columns that the first table has."""
    lines = []
    for entry in entries:
        both = [read_results(folder) for folder in entry.runs]
        found = list(dict.fromkeys(name for one in both for name in one["after"]))
        grouped = {name for members in group_subjects(found).values() for name in members}
        rest = [name for name in found if name not in known and name not in grouped]
        before, after = _changes(both, rest)
        for name in rest:
            shown = (
                f"{metric_words(name)}, {entry.label}" if len(entries) > 1 else metric_words(name)
            )
            cells = [shown, number_cell(before.get(name)), number_cell(after.get(name))]
            lines.append(TableLine(cells, entry.label))
    if not lines:
        return None
    table = Table("Means over seeds; accuracies in per cent", ["Metric", "Before", "After"], lines)
    return Section("Other measurements", [], [table])


# ---- how it was made


def record_sections(entries: Sequence[RunGroup]) -> list[Section]:
    """The settings and the record of each entry's runs."""
    parts = {"Settings": run_settings, "The record": record_facts}
    sections = []
    for title, facts in parts.items():
        blocks = []
        for entry in entries:
            found = facts(entry.runs)
            lines = [
                TableLine([name.replace("_", " ").replace(".", " · "), *values])
                for name, values in found.items()
            ]
            count = len(entry.runs)
            runs = f"{count} runs" if count > 1 else "1 run"
            name = " · ".join(filter(None, [entry.label, entry.group, runs]))
            fold = name if len(entries) > 1 else ""
            if lines:
                blocks.append(
                    Table(f"{title} of {name}", [], lines, words=True, fold=fold, label=entry.label)
                )
        if blocks:
            sections.append(Section(title, [], blocks))
    return sections
