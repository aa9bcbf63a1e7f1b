"""The benchmarks in a report: for each suite its paper's table, and a figure of two columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from srmu.evals.benchmarks import find_benchmark
from srmu.evals.benchmarks.base import Benchmark, Metrics, TableColumn
from srmu.evals.benchmarks.score import format_metric
from srmu.evals.results import read_benchmarks
from srmu.evals.statistics import Estimate
from srmu.report.figures import GREY, Figure, Series, draw_figure, label_look, make_look
from srmu.report.html import Block, Cell, Section, Table, TableLine
from srmu.report.results import RunGroup

HINTS = {"high": "higher is better", "low": "lower is better", "zero": "0 is best"}
ARROWS = {"high": "\N{UPWARDS ARROW}", "low": "\N{DOWNWARDS ARROW}", "zero": "0"}
RINGS = {"Original model": "circle-open", "Oracle": "diamond-open"}
Model = tuple[str, str, list[Metrics]]  # what a row is called, whose label it has, seeds


def benchmark_sections(entries: Sequence[RunGroup], labels: Sequence[str]) -> list[Section]:
    """A section for each suite that any of the runs was measured on."""
    measured = [(entry, [read_benchmarks(folder) for folder in entry.runs]) for entry in entries]
    names = dict.fromkeys(name for _, seeds in measured for one in seeds for name in one)
    return [benchmark_section(name, measured, labels) for name in names]


def benchmark_section(
    name: str, measured: Sequence[tuple[RunGroup, Sequence[Mapping[str, Any]]]], labels: Sequence[str]
) -> Section:
    """The table of a suite, and its figure where the suite names two columns to draw."""
    suite, part = find_benchmark(name)
    models: list[Model] = []
    for when, title in zip(("before", "oracle"), RINGS, strict=True):
        distinct: list[Metrics] = []
        for _, seeds in measured:
            for metrics in (one.get(name, {}).get(when) for one in seeds):
                if metrics and metrics not in distinct:
                    distinct.append(metrics)
        models += [(title, "", [metrics]) for metrics in distinct]
    for entry, seeds in measured:
        if after := [one[name]["after"] for one in seeds if name in one]:
            title = ", ".join(filter(None, [entry.label, entry.group]))
            models.append((title, entry.label, after))
    lines = [
        TableLine([title, *(value_cell(column, seeds) for column in suite.columns)], label)
        for title, label, seeds in models
    ]
    heads = ["Model", *(f"{c.title}\n{HINTS[c.better]}" for c in suite.columns)]
    caption = f"{suite.title}{f', {part}' if part else ''}: as in {suite.paper}"
    first, rest = ([line for line in lines if bool(line.label) is own] for own in (False, True))
    notes = [
        "Means over seeds; in small type one standard error, over seeds where there are several, "
        "else over questions. The definition of each number is in docs/benchmarks.md."
    ]
    blocks: list[Block] = [Table(caption, heads, rest, first)]
    if suite.axes[0]:
        blocks.insert(0, draw_benchmark(suite, models, labels))
    return Section(f"Benchmark: {suite.title}", notes, blocks)


def value_cell(column: TableColumn, seeds: Sequence[Metrics]) -> Cell | None:
    """A column's mean over seeds, with its standard error; None where it was left out."""
    known = [metrics for metrics in seeds if column.metric in metrics]
    if not known:
        return None
    one = estimate_column(column, known)
    text = format_metric(column, {column.metric: {"value": one.value / column.scale, "n": 0}})
    span = f"\N{PLUS-MINUS SIGN}{one.high - one.value:.2g}" if one.has_interval else ""
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


def draw_benchmark(suite: Benchmark, models: Sequence[Model], labels: Sequence[str]) -> Figure:
    """Each model's mark at two columns of the table."""
    axes = [next(c for c in suite.columns if c.title == title) for title in suite.axes]
    series, names = [], []
    for title, label, seeds in models:
        if not all(column.metric in metrics for column in axes for metrics in seeds):
            continue
        x, y = (estimate_column(column, seeds) for column in axes)
        look = make_look(GREY, RINGS.get(title, "circle"), size=12)
        if label:
            look = label_look(labels.index(label), size=11)
        else:
            names.append({"x": x.value, "y": y.value, "text": title, "showarrow": False, "yshift": 15})
        row = {column.title: one for column, one in zip(axes, (x, y), strict=True)}
        series.append(Series(title, [row], look, label))
    titles = [{"title": f"{column.title} {ARROWS[column.better]}"} for column in axes]
    figure = draw_figure(suite.title, series, axes[0].title, axes[1].title, x_axis=titles[0], y_axis=titles[1])
    figure.plot.update_layout(annotations=names)
    return figure
