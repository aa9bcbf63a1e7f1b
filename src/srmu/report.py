"""A comparison of unlearning runs as one HTML file that opens anywhere, also offline."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from srmu.errors import UserError
from srmu.files import write_whole

MEAN = "mean utility"  # the column that the vertical axis of the trade-off plot shows
CURVES = ("forget", "retain", "forget_cos", "retain_cos")  # keys of metrics.jsonl that are drawn
POINTS = 200  # at most this many points a curve
Columns = Mapping[str, Sequence[str]]  # a column's name: the metrics it is the mean of
NEEDED = {"config.yaml": "srmu unlearn CONFIG", "results.json": "srmu eval {}"}


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: the runs of one method that differ only in their seed."""

    label: str
    group: str  # the setting they ran in; "" where there is only one
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; only accuracies over a known number of questions have the interval."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g}"
        return f"{self.mean:.1%} ({self.low:.1%}\N{EN DASH}{self.high:.1%})".replace("%", "")


@dataclass(frozen=True)
class Row:
    """An entry's numbers by metric; a metric that its runs lack is not in the mapping."""

    label: str
    group: str
    seeds: int
    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]


def table(entries: Sequence[Entry], metrics: Sequence[str]) -> list[Row]:
    """The aggregated numbers before and after unlearning, one row an entry."""
    return _rows(entries, {metric: [metric] for metric in metrics})


def render(
    entries: Sequence[Entry],
    out: Path,
    *,
    title: str,
    forget_metrics: Sequence[str],
    utility_metrics: Sequence[str],
    command: str,
) -> Path:
    """Write the report on `entries` to the file `out`.

    The trade-off plot shows the first forget metric against the mean of the utility metrics, so
    these must be accuracies. `title`, `command` and the labels are printed as they are: keep
    paths to private data out of them.
    """
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it, such as {out / 'report.html'}")
    columns = {metric: [metric] for metric in (*forget_metrics, *utility_metrics)}
    if len(utility_metrics) > 1:
        columns[MEAN] = list(utility_metrics)
    rows = _rows(entries, columns)
    items = [
        {"row": row, "settings": _settings(entry.runs), "curves": _curves(entry.runs)}
        for entry, row in zip(entries, rows, strict=True)
    ]
    groups: dict[str, list[Any]] = {row.group: [] for row in rows}  # the distinct original models
    for row in rows:
        if row.before and row.before not in groups[row.group]:
            groups[row.group].append(row.before)
    environment = Environment(loader=PackageLoader("srmu"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html").render(
        title=title,
        command=command,
        groups=groups,
        items=items,
        columns=list(columns),
        forget_metrics=forget_metrics,
        maps=_maps(entries),
        plotly=get_plotlyjs(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


def _rows(entries: Sequence[Entry], columns: Columns) -> list[Row]:
    rows = []
    for entry in entries:
        for folder, (name, command) in product(entry.runs, NEEDED.items()):
            if not (folder / name).exists():
                raise UserError(f"{folder} has no {name}; run `{command.format(folder)}` first")
        before = _estimates([_read(folder / "before.json") for folder in entry.runs], columns)
        after = _estimates([_read(folder / "results.json") for folder in entry.runs], columns)
        rows.append(Row(entry.label, entry.group, len(entry.runs), before, after))
    for name in columns:
        if not any(name in row.after for row in rows):
            raise UserError(f"no run has the result {name}; evaluate it or leave it out")
    return rows


def _estimates(seeds: Sequence[dict[str, Any]], columns: Columns) -> dict[str, Estimate]:
    """Average over a column's metrics, then over the seeds that have them all."""
    from srmu.evals import interval

    found = {}
    for name, metrics in columns.items():
        whole = [[seed[m] for m in metrics] for seed in seeds if all(m in seed for m in metrics)]
        values = [fmean(cell["value"] for cell in cells) for cells in whole]
        counts = [cell.get("n") for cell in whole[0]] if whole else []
        if counts and all(counts) and all(0 <= value <= 1 for value in values):
            # the mean of k accuracies varies as much as one over this many questions
            n = round(len(counts) ** 2 / sum(1 / count for count in counts))
            found[name] = Estimate(fmean(values), *interval(values, n))
        elif values:
            found[name] = Estimate(fmean(values))
    return found


def _curves(runs: Sequence[Path]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values, averaged over seeds; neighbouring steps too where topics take turns."""
    lines = [line for folder in runs for line in _read(folder / "metrics.jsonl")]
    length = max((line["step"] for line in lines), default=0) + 1
    width = max(len({line["topic"] for line in lines}), math.ceil(length / POINTS))
    found = {}
    for key in CURVES:
        bins: dict[int, list[float]] = {}
        for line in lines:
            if line.get(key) is not None:
                bins.setdefault(line["step"] // width * width, []).append(line[key])
        if bins:
            found[key] = sorted(bins), [float(f"{fmean(bins[x]):.4g}") for x in sorted(bins)]
    return found


def _maps(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The importance maps of each entry's first run; methods with the same map share one item."""
    from safetensors.numpy import load_file

    found: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        state = entry.runs[0] / "state.safetensors"
        topics = _read(entry.runs[0] / "record.json").get("topics", {})
        for name, values in load_file(state).items() if state.exists() else ():
            topic, _, kind = name.rpartition(".")
            if kind == "importance":
                largest = (-values).argsort(kind="stable")
                item = {
                    "labels": [],
                    "group": entry.group,
                    "topic": topic,
                    "sizes": values[largest].astype(float).round(4).tolist(),
                    "largest": largest[:10].tolist(),
                    "facts": topics.get(topic, {}).get("importance"),
                }
                key = entry.group, topic, values.tobytes()
                found.setdefault(key, item)["labels"].append(entry.label)
    return list(found.values())


def _settings(runs: Sequence[Path]) -> dict[str, list[str]]:
    """How the runs were made; one value where all of them agree, else one each."""
    columns = []
    for folder in runs:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        record = _read(folder / "record.json")
        column = {"seed": config.get("seed"), "topics": list(config.get("topics", ()))}
        column |= {key: record.get(key) for key in ("id", "seconds", "steps", "stop_reason")}
        for block in ("method", "train"):  # the others hold paths
            column |= {f"{block}.{key}": value for key, value in config.get(block, {}).items()}
        for topic, facts in record.get("topics", {}).items():
            column |= {f"{topic}.{k}": v for k, v in facts.items() if isinstance(v, int | float)}
        columns.append({key: _plain(value) for key, value in column.items() if value is not None})
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name, "") for column in columns] for name in names}
    return {name: row if len(set(row)) > 1 else row[:1] for name, row in rows.items()}


def _plain(value: Any) -> str:
    """A setting as text; of a path only the last part, as folders may tell whose data it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "/").rpartition("/")[2]


def _read(path: Path) -> Any:
    """The object in a JSON file, all of those in a JSON-lines file, {} where there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else "{}"
    try:
        whole = path.suffix == ".json" or not path.exists()
        return json.loads(text) if whole else [json.loads(line) for line in text.splitlines()]
    except ValueError:
        raise UserError(f"{path} is damaged; repeat that run") from None
