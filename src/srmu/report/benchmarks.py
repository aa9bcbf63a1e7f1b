"""The benchmarks in a report: for each suite its paper's table, and a figure of two columns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from srmu.evals import benchmarks as suites
from srmu.evals.benchmarks.base import Benchmark, Metrics, TableColumn
from srmu.evals.benchmarks.score import format_metric
from srmu.evals.results import read_benchmarks
from srmu.evals.statistics import Estimate
from srmu.report.format import draw_mark, hover_text
from srmu.report.html import (
    GREY,
    Cell,
    Figure,
    Panels,
    Section,
    Table,
    TableLine,
    label_marker,
    make_axis,
)
from srmu.report.html import ColumnHead as Head
from srmu.report.results import RunGroup

HINTS = {"high": "higher is better", "low": "lower is better", "zero": "0 is best"}
ARROWS = {"high": "\N{UPWARDS ARROW}", "low": "\N{DOWNWARDS ARROW}", "zero": "0"}
RINGS = {"Original model": "circle-open", "Oracle": "diamond-open"}
Shown = tuple[str, str, list[Metrics]]  # what a row is called, whose label it has, seeds


def benchmark_sections(entries: Sequence[RunGroup], labels: Sequence[str]) -> list[Section]:
    """A section for each suite that any of the runs was measured on."""
    measured = [(entry, [read_benchmarks(folder) for folder in entry.runs]) for entry in entries]
    names = dict.fromkeys(name for _, seeds in measured for one in seeds for name in one)
    return [benchmark_section(name, measured, labels) for name in names]


def benchmark_section(
    name: str, measured: Sequence[tuple[RunGroup, list[dict[str, Any]]]], labels: Sequence[str]
) -> Section:
    suite, part = suites.find_benchmark(name)
    shown: list[Shown] = []
    for when, title in zip(("before", "oracle"), RINGS, strict=True):
        known: list[Metrics] = []
        for _, seeds in measured:
            of_it = [one[name][when] for one in seeds if when in one.get(name, {})]
            known += [metrics for metrics in of_it if metrics not in known]
        shown += [(title, "", [metrics]) for metrics in known]
    for entry, seeds in measured:
        after = [one[name]["after"] for one in seeds if name in one]
        if after:
            label = f"{entry.label}, {entry.group}" if entry.group else entry.label
            shown.append((label, entry.label, after))
    heads: list[Head | str] = ["Model", *(Head(c.title, HINTS[c.better]) for c in suite.columns)]
    lines = [
        TableLine([title, *(value_cell(column, seeds) for column in suite.columns)], label)
        for title, label, seeds in shown
    ]
    first = [line for line in lines if not line.label]
    caption = f"{suite.title}{f', {part}' if part else ''}: as in {suite.paper}"
    table = Table(caption, heads, [line for line in lines if line.label], first)
    notes = [
        "Means over seeds; in small type one standard error, over seeds where there are several, "
        "else over questions. The definition of each number is in docs/benchmarks.md.",
    ]
    picture = (
        [Panels([benchmark_figure(suite, shown, labels)], small=False)] if suite.axes[0] else []
    )
    return Section(f"Benchmark: {suite.title}", notes, [*picture, table])


def value_cell(column: TableColumn, seeds: Sequence[Metrics]) -> Cell | None:
    """A column's mean over seeds, with its standard error; None where it was left out."""
    found = [metrics for metrics in seeds if column.metric in metrics]
    if not found:
        return None
    one = estimate_column(column, found)
    text = format_metric(column, {column.metric: {"value": one.value / column.scale, "n": 0}})
    span = "" if not one.has_interval else f"\N{PLUS-MINUS SIGN}{one.high - one.value:.2g}"
    return Cell(text, span, one.value)


def estimate_column(column: TableColumn, seeds: Sequence[Metrics]) -> Estimate:
    """The mean over seeds in the column's scale, between one standard error below and above."""
    entries = [metrics[column.metric] for metrics in seeds]
    values = [column.scale * entry["value"] for entry in entries]
    middle, count = fmean(values), len(values)
    if count > 1:
        error = stdev(values) / count**0.5
    elif "stderr" in entries[0]:
        error = column.scale * entries[0]["stderr"]
    else:
        return Estimate(middle)
    return Estimate(middle, middle - error, middle + error)


def benchmark_figure(suite: Benchmark, shown: Sequence[Shown], labels: Sequence[str]) -> Figure:
    """Each model's mark at two columns of the table."""
    across, up = (next(c for c in suite.columns if c.title == title) for title in suite.axes)
    ring = {"color": GREY, "size": 12, "line": {"width": 2}}
    traces, words, names = [], [], []
    for title, label, seeds in shown:
        if not all(c.metric in metrics for c in (across, up) for metrics in seeds):
            continue
        x, y = (estimate_column(column, seeds) for column in (across, up))
        text = [f"{c.title} {one.value:.3g}" for c, one in ((across, x), (up, y))]
        look = (
            label_marker(labels.index(label), size=11) if label else ring | {"symbol": RINGS[title]}
        )
        if not label:
            names.append(
                {"x": x.value, "y": y.value, "text": title, "showarrow": False, "yshift": 15}
            )
        traces.append(draw_mark(x, y, hover_text(title, *text), label, look))
        words.append(f"{title}: {', '.join(text)}")
    layout: dict[str, Any] = {
        name: make_axis(f"{column.title} {ARROWS[column.better]}")
        for name, column in (("xaxis", across), ("yaxis", up))
    }
    layout["annotations"] = names
    said = f"Scatter plot of {across.title} against {up.title}. {'; '.join(words)}."
    return Figure(suite.title, said, traces, layout)
