"""What runs came to: their numbers, aggregated over the seeds of one method, and their facts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from srmu.engine.files import read_json, read_json_lines
from srmu.errors import SrmuError
from srmu.evals.results import UNATTACKED, Metrics, load_results, read_metrics
from srmu.evals.statistics import Estimate, average_seeds

CURVES = ("forget", "retain", "forget_cos", "retain_cos")  # keys of metrics.jsonl that are drawn
POINTS = 120  # at most this many points a curve
Columns = Mapping[str, Sequence[str]]  # a column's name: the metrics it is the mean of
VERSIONS = ("srmu", "torch", "transformers", "safetensors", "tokenizers")
ENVIRONMENT = ("platform", "python", "threads", *VERSIONS)  # the rest might name a folder


@dataclass(frozen=True)
class RunGroup:
    """One line of the comparison: the runs of one method that differ only in their seed."""

    label: str
    group: str  # the setting they ran in; "" where there is only one
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class GroupRow:
    """An entry's numbers by metric; a metric that its runs lack is not in the mapping."""

    label: str
    group: str
    seeds: int
    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]


def aggregate_metrics(entries: Sequence[RunGroup], metrics: Sequence[str]) -> list[GroupRow]:
    """The aggregated numbers before and after unlearning, one row an entry."""
    return aggregate_columns(entries, {metric: [metric] for metric in metrics})


def aggregate_columns(entries: Sequence[RunGroup], columns: Columns) -> list[GroupRow]:
    """The aggregated numbers in columns that are each the mean of some metrics."""
    found = []
    for entry in entries:
        for folder in entry.runs:
            read_config_tree(folder)  # a folder without one is no run
            if not has_results(folder):
                raise SrmuError(f"{folder} has no results; run `srmu eval {folder}` first")
        both = [read_results(folder) for folder in entry.runs]
        before, after = (estimate_columns([seed[when] for seed in both], columns) for when in ("before", "after"))
        found.append(GroupRow(entry.label, entry.group, len(entry.runs), before, after))
    for name in columns:
        if not any(name in row.after for row in found):
            raise SrmuError(f"no run has the result {name}; evaluate it or leave it out")
    return found


def has_results(folder: Path) -> bool:
    """Whether a run was evaluated or attacked; the attacks asked what an evaluation asks."""
    return any(not row.get("benchmark") for row in load_results(folder)["rows"])


def read_results(folder: Path) -> dict[str, Metrics]:
    """A run's flat results before and after, with those of its attacks' questions."""
    found = read_metrics(folder)
    for row in load_results(folder)["rows"]:
        if row.get("attack") in UNATTACKED and row["when"] in found:
            found[row["when"]].setdefault(f"{row['task']}/{row['metric']}", row)
    return found


def estimate_columns(seeds: Sequence[Metrics], columns: Columns) -> dict[str, Estimate]:
    """Average over a column's metrics, then over the seeds that have them all."""
    found = {name: average_seeds(seeds, metrics) for name, metrics in columns.items()}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def training_curves(runs: Sequence[Path]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values, averaged over seeds; neighbouring steps too where topics take turns."""
    lines = [line for folder in runs for line in read_run_file(folder / "metrics.jsonl")]
    length = max((line["step"] for line in lines), default=0) + 1
    width = max(len({line["topic"] for line in lines}), math.ceil(length / POINTS))
    found = {}
    for key in CURVES:
        bins: dict[int, list[float]] = {}
        for line in lines:
            if line.get(key) is not None and math.isfinite(line[key]):  # a run may diverge
                bins.setdefault(line["step"] // width * width, []).append(line[key])
        if bins:
            found[key] = sorted(bins), [float(f"{fmean(bins[x]):.4g}") for x in sorted(bins)]
    return found


def importance_maps(entries: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """The importance maps of each entry's first run; methods with the same map share one item."""
    from safetensors.numpy import load_file

    found: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        state = entry.runs[0] / "state.safetensors"
        topics = read_run_file(entry.runs[0] / "record.json").get("topics", {})
        for name, values in load_file(state).items() if state.exists() else ():
            topic, _, kind = name.rpartition(".")
            if kind == "importance":
                largest = (-values).argsort(kind="stable")
                item = {
                    "labels": [],
                    "group": entry.group,
                    "topic": topic,
                    "order": largest.tolist(),
                    "sizes": values[largest].astype(float).round(4).tolist(),
                    "facts": topics.get(topic, {}).get("importance"),
                }
                key = entry.group, topic, values.tobytes()
                found.setdefault(key, item)["labels"].append(entry.label)
    return list(found.values())


def run_settings(runs: Sequence[Path]) -> dict[str, list[str]]:
    """How the runs were made; one value where all of them agree, else one each."""
    columns = []
    for folder in runs:
        tree = read_config_tree(folder)
        column = {"seed": tree.get("seed"), "topics": list(tree.get("topics", ()))}
        for block in ("method", "train"):  # the others hold paths
            column |= {f"{block}.{key}": value for key, value in tree.get(block, {}).items()}
        for topic, facts in read_run_file(folder / "record.json").get("topics", {}).items():
            column |= {f"{topic}.{k}": v for k, v in facts.items() if isinstance(v, int | float)}
        columns.append(column)
    return _side_by_side(columns)


def record_facts(runs: Sequence[Path]) -> dict[str, list[str]]:
    """The facts that the records keep; of paths the last part, of texts only their counts."""
    columns = []
    for folder in runs:
        kept = read_run_file(folder / "record.json")
        column = {
            key: kept.get(key)
            for key in ("id", "method", "paper", "model", "started", "seconds", "steps",
                        "stop_reason", "diverged", "share", "weights")
        }  # fmt: skip
        if "peak" in kept.get("memory", {}):
            column["peak memory"] = f"{kept['memory']['peak'] / 1e6:.0f} MB"
        changed = kept.get("changed", [])
        column["changed tensors"] = f"{len(changed)}: {', '.join(changed[:12])}" + (", …" if len(changed) > 12 else "")
        for topic, sets in kept.get("data", {}).items():
            for name, facts in sets.items():
                said = [f"{v} {k.replace('_', ' ')}" for k, v in facts.items() if k != "digest"]
                said.append(f"SHA-256 {facts.get('digest', '')[:12]}")
                column[f"{topic}.{name} texts"] = ", ".join(said)
        for key in ENVIRONMENT:
            column[f"environment.{key}"] = kept.get("environment", {}).get(key)
        columns.append(column if kept else {})
    return _side_by_side(columns)


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Columns as rows, of text; a row in which all agree has one value."""
    plain = [{k: _plain(v) for k, v in column.items() if v is not None} for column in columns]
    names = dict.fromkeys(name for column in plain for name in column)
    found = {name: [column.get(name, "") for column in plain] for name in names}
    return {name: row if len(set(row)) > 1 else row[:1] for name, row in found.items()}


def _plain(value: Any) -> str:
    """A setting as text; of a path only the last part, as folders may tell whose data it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "/").rpartition("/")[2]


def strip_paths(text: str) -> str:
    """A sentence with only the last part of each absolute path in it."""
    return re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\][^\s'\"(]*[/\\]", "", text)


def read_config_tree(folder: Path) -> dict[str, Any]:
    """The tree of a run's config, as it was written."""
    if not (folder / "config.yaml").exists():
        raise SrmuError(f"{folder} has no config.yaml; run `srmu unlearn CONFIG` first")
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def read_run_file(path: Path) -> Any:
    """The object in a JSON file, all of those in a JSON-lines file; empty if there is no file."""
    return read_json_lines(path) if path.suffix == ".jsonl" else read_json(path, {})
