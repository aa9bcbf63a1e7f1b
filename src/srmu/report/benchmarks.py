"""The benchmarks in a report: for each suite its paper's table, and a figure of two columns."""

from collections.abc import Mapping, Sequence
from math import nan
from statistics import fmean, stdev
from typing import Any, NamedTuple

from srmu.errors import SrmuError
from srmu.evals.benchmarks import find_benchmark
from srmu.evals.benchmarks.base import Metrics, TableColumn
from srmu.evals.peers import PeerResults
from srmu.evals.results import read_benchmarks
from srmu.evals.statistics import Estimate
from srmu.report.figures import GREY, Look, Row, Series, draw_figure, label_look, make_look
from srmu.report.format import format_value, write_words
from srmu.report.html import LABEL, Block, Section, Table
from srmu.report.results import RunGroup

HINTS = {"high": "higher is better", "low": "lower is better", "zero": "0 is best"}
Measured = Sequence[tuple[RunGroup, Sequence[Mapping[str, Any]]]]  # by suite and by model, of each seed
RINGS = {"before": ("Original model", "circle-open"), "oracle": ("Oracle", "diamond-open")}


class MeasuredModel(NamedTuple):
    """A row of a suite's table: a model, how it is drawn, and its numbers by column."""

    title: str
    label: str  # "" for a model that no method made
    look: Look
    means: dict[str, Estimate | None]


def benchmark_sections(
    entries: Sequence[RunGroup], labels: Sequence[str], peers: Sequence[PeerResults] = ()
) -> list[Section]:
    """A section for each suite that any of the runs or of the peers' models was measured on."""
    measured = list_measured(entries, peers)
    return [benchmark_section(name, measured, labels, peers) for name in name_suites(measured)]


def list_measured(entries: Sequence[RunGroup], peers: Sequence[PeerResults]) -> Measured:
    """What runs, and models that another tool measured, came to, by suite and by model."""
    own = [(entry, [read_benchmarks(folder) for folder in entry.runs]) for entry in entries]
    return own + [(RunGroup(one.name, "", ()), [{one.benchmark: {"after": one.metrics}}]) for one in peers]


def name_suites(measured: Measured) -> list[str]:
    return [*dict.fromkeys(name for _, seeds in measured for one in seeds for name in one)]


def list_models(name: str, measured: Measured, labels: Sequence[str]) -> list[MeasuredModel]:
    """The rows of a suite's table: first the original models and the oracles, then what methods made of them."""
    suite, _ = find_benchmark(name)
    models: list[MeasuredModel] = []

    def add(title: str, label: str, look: Look, seeds: Sequence[Metrics]) -> None:
        models.append(MeasuredModel(title, label, look, {c.title: estimate_column(c, seeds) for c in suite.columns}))

    for when, (title, ring) in RINGS.items():
        distinct: list[Metrics] = []  # seeds that started from one model share a row
        for metrics in (one.get(name, {}).get(when) for _, seeds in measured for one in seeds):
            if metrics and metrics not in distinct:
                distinct.append(metrics)
                add(title, "", make_look(GREY, ring, size=12), [metrics])
    for entry, seeds in measured:
        if after := [one[name]["after"] for one in seeds if name in one]:
            add(entry.name, entry.label, label_look(labels.index(entry.label), size=11), after)
    return models


def tabulate_suites(entries: Sequence[RunGroup], peers: Sequence[PeerResults]) -> dict[str, list[Row]]:
    """By suite a row for each model, with its name under `model`; SrmuError for a run that shares none with the peers.

    A number has one standard error to each side.
    """
    measured, suites = list_measured(entries, peers), dict.fromkeys(one.benchmark for one in peers)
    for entry, seeds in measured:
        for run, own in zip(entry.runs, seeds, strict=False):  # peers have no runs
            if not suites.keys() & own.keys():
                more = f"run `srmu eval {run} --tasks {next(iter(suites))} --oracle MODEL` first"
                raise SrmuError(f"{run} has no results on {' or '.join(suites)}; {more}")
    labels = [entry.label for entry, _ in measured]
    return {
        name: [{"model": one.title, **one.means} for one in list_models(name, measured, labels)]
        for name in name_suites(measured)
    }


def benchmark_section(
    name: str, measured: Measured, labels: Sequence[str], peers: Sequence[PeerResults] = ()
) -> Section:
    """The table of a suite, and its figure where the suite names two columns to draw."""
    suite, part = find_benchmark(name)
    models = list_models(name, measured, labels)
    rows: list[Row] = [
        {LABEL: one.label, "Model": one.title}
        | {f"{c.title}\n{HINTS[c.better]}": format_value(one.means[c.title], "") for c in suite.columns}
        for one in models
    ]
    caption = f"{suite.title}{f', {part}' if part else ''}: as in {suite.paper}"
    blocks = [Block(table=Table(caption, rows, sum(not one.label for one in models)))]
    if suite.axes[0]:
        x, y = (next(c for c in suite.columns if c.title == title) for title in suite.axes)
        series = [
            Series(one.title, [{axis: one.means[axis] for axis in suite.axes}], one.look, one.label)
            for one in models
            if one.means[x.title] and one.means[y.title]
        ]
        titles = [{"title": f"{c.title} ({HINTS[c.better]})"} for c in (x, y)]
        figure = draw_figure(suite.title, series, x.title, y.title, x_axis=titles[0], y_axis=titles[1])
        blocks.insert(0, Block([figure]))
    others = [one.name for one in peers if one.benchmark == name]
    return Section(f"Benchmark: {suite.title}", write_words("benchmark", peers=others), blocks)


def estimate_column(column: TableColumn, seeds: Sequence[Metrics]) -> Estimate | None:
    """The mean over seeds in the column's scale, with a standard error to each side; None where it was left out."""
    entries = [metrics[column.metric] for metrics in seeds if column.metric in metrics]
    if not entries:
        return None
    values = [column.scale * entry["value"] for entry in entries]
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else column.scale * entries[0].get("stderr", nan)
    return Estimate(fmean(values), fmean(values) - error, fmean(values) + error)
