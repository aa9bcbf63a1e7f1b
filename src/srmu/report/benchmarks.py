"""The benchmarks in a report: for each suite its paper's table, and a figure of two columns."""

from collections.abc import Mapping, Sequence
from math import nan
from statistics import fmean, stdev
from typing import Any

from srmu.evals.benchmarks import find_benchmark
from srmu.evals.benchmarks.base import Metrics, TableColumn
from srmu.evals.results import read_benchmarks
from srmu.evals.statistics import Estimate
from srmu.report.figures import GREY, Row, Series, draw_figure, label_look, make_look
from srmu.report.format import format_value, write_words
from srmu.report.html import LABEL, Block, Section, Table
from srmu.report.results import RunGroup

HINTS = {"high": "higher is better", "low": "lower is better", "zero": "0 is best"}
RINGS = {"before": ("Original model", "circle-open"), "oracle": ("Oracle", "diamond-open")}


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
    models: list[tuple[str, str, Mapping[str, Any], Sequence[Metrics]]] = []  # title, label, look, seeds
    for when, (title, ring) in RINGS.items():
        distinct: list[Metrics] = []  # seeds that started from one model share a row
        for metrics in (one.get(name, {}).get(when) for _, seeds in measured for one in seeds):
            if metrics and metrics not in distinct:
                distinct.append(metrics)
        models += [(title, "", make_look(GREY, ring, size=12), [metrics]) for metrics in distinct]
    first = len(models)
    for entry, seeds in measured:
        if after := [one[name]["after"] for one in seeds if name in one]:
            models.append((entry.name, entry.label, label_look(labels.index(entry.label), size=11), after))
    means = [{c.title: estimate_column(c, seeds) for c in suite.columns} for _, _, _, seeds in models]
    rows: list[Row] = [
        {LABEL: label, "Model": title}
        | {f"{c.title}\n{HINTS[c.better]}": format_value(mean[c.title], "") for c in suite.columns}
        for (title, label, _, _), mean in zip(models, means, strict=True)
    ]
    caption = f"{suite.title}{f', {part}' if part else ''}: as in {suite.paper}"
    blocks = [Block(table=Table(caption, rows, first))]
    if suite.axes[0]:
        x, y = (next(c for c in suite.columns if c.title == title) for title in suite.axes)
        series = [
            Series(title, [{axis: mean[axis] for axis in suite.axes}], look, label)
            for (title, label, look, _), mean in zip(models, means, strict=True)
            if mean[x.title] and mean[y.title]
        ]
        titles = [{"title": f"{c.title} ({HINTS[c.better]})"} for c in (x, y)]
        figure = draw_figure(suite.title, series, x.title, y.title, x_axis=titles[0], y_axis=titles[1])
        blocks.insert(0, Block([figure]))
    return Section(f"Benchmark: {suite.title}", write_words("benchmark"), blocks)


def estimate_column(column: TableColumn, seeds: Sequence[Metrics]) -> Estimate | None:
    """The mean over seeds in the column's scale, with a standard error to each side; None where it was left out."""
    entries = [metrics[column.metric] for metrics in seeds if column.metric in metrics]
    if not entries:
        return None
    values = [column.scale * entry["value"] for entry in entries]
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else column.scale * entries[0].get("stderr", nan)
    return Estimate(fmean(values), fmean(values) - error, fmean(values) + error)
