"""What runs came to: their numbers, aggregated over the seeds of one method, and their facts."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from srmu.engine.files import read_json
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.evals.results import UNATTACKED, Metrics, load_results, read_metrics
from srmu.evals.statistics import Estimate, average_seeds
from srmu.methods import METHODS
from srmu.runs.config import read_tree
from srmu.runs.effect import REPETITION, explain_repetition
from srmu.runs.record import CONFIG, METRICS, RECORD, STATE

POINTS = 120  # at most this many points a curve
Columns = Mapping[str, Sequence[str]]  # a column's name: the metrics it is the mean of
FEW = 3  # models that repeat themselves, named in the headline
FACTS = ("id", "method", "paper", "model", "started", "seconds", "steps", "stop_reason", "diverged", "share", "weights")
ENVIRONMENT = ("platform", "python", "threads", "packages")


@dataclass(frozen=True)
class RunGroup:
    """One line of the comparison: the runs of one method that differ only in their seed."""

    label: str
    group: str  # the setting they ran in; "" where there is only one
    runs: tuple[Path, ...]

    @property
    def name(self) -> str:
        return " \N{MIDDLE DOT} ".join(filter(None, [self.label, self.group]))


@dataclass(frozen=True)
class GroupRow(RunGroup):
    """A line with its numbers by metric; a metric that its runs lack is not in the mapping."""

    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]


def aggregate_columns(entries: Sequence[RunGroup], columns: Columns) -> list[GroupRow]:
    """The aggregated numbers before and after unlearning, one row an entry."""
    rows = [aggregate_runs(entry, columns) for entry in entries]
    for name in columns:
        if not any(name in row.after for row in rows):
            raise SrmuError(f"no run has the result {name}; evaluate it or leave it out")
    return rows


def aggregate_runs(entry: RunGroup, columns: Columns | None = None) -> GroupRow:
    """An entry's numbers: averages over a column's metrics, then over the seeds that have them all.

    Without columns, of all that was measured after.
    """
    seeds = [read_results(folder) for folder in entry.runs]
    columns = columns or {name: [name] for seed in seeds for name in seed["after"]}
    numbers: dict[str, dict[str, Estimate]] = {}
    for when in ("before", "after"):
        means = {name: average_seeds([seed[when] for seed in seeds], metrics) for name, metrics in columns.items()}
        # a mean of shares has no interval of a share of questions
        numbers[when] = {
            name: Estimate(mean.value) if name.startswith(f"{REPETITION}/") else mean
            for name, mean in means.items()
            if mean
        }
    return GroupRow(**vars(entry) | numbers)


def read_results(folder: Path) -> dict[str, Metrics]:
    """A run's flat results before and after, with those of its attacks' questions."""
    found = read_metrics(folder)
    for row in load_results(folder)["rows"]:
        if row.get("attack") in UNATTACKED and row["when"] in found:
            found[row["when"]].setdefault(f"{row['task']}/{row['metric']}", row)
    return found


def training_curves(runs: Sequence[Path], keys: Sequence[str]) -> dict[str, pd.Series]:
    """By step, of each key that there is: means over seeds, and over steps where topics take turns."""
    lines = pd.DataFrame([line for folder in runs for line in read_json(folder / METRICS, [])])
    if lines.empty:
        return {}
    width = max(lines["topic"].nunique(), math.ceil((lines["step"].max() + 1) / POINTS))
    values = lines.reindex(columns=keys).astype(float)
    values = values.where(values.abs() < math.inf)  # a run may diverge
    means = values.groupby(lines["step"] // width * width).mean()
    curves = {key: means[key].dropna().map(lambda value: float(f"{value:.4g}")) for key in keys}
    return {key: curve for key, curve in curves.items() if len(curve)}


def importance_maps(entries: Sequence[RunGroup]) -> dict[tuple[str, str, tuple[float, ...]], list[str]]:
    """By group, topic and importance map of each entry's first run: the labels of the methods that share it."""
    from safetensors.numpy import load_file

    found: dict[tuple[str, str, tuple[float, ...]], list[str]] = {}
    for entry in entries:
        state = entry.runs[0] / STATE
        for name, values in load_file(state).items() if state.exists() else ():
            topic, _, kind = name.rpartition(".")
            if kind == "importance":
                found.setdefault((entry.group, topic, tuple(values.tolist())), []).append(entry.label)
    return found


def list_run_facts(folder: Path) -> dict[str, Any]:
    """How a run was made, from its config and its record; of paths the last part, of texts only their counts."""
    tree, record = read_tree(folder / CONFIG), read_json(folder / RECORD, {})
    blocks = {name: tree.get(name, {}) for name in ("method", "train")}  # the others hold paths
    for topic, facts in record.get("topics", {}).items():
        blocks[topic] = {key: value for key, value in facts.items() if isinstance(value, int | float)}
    blocks["environment"] = {key: record.get("environment", {}).get(key) for key in ENVIRONMENT}
    found = {"seed": tree.get("seed"), "topics": list(tree.get("topics", ()))}
    found |= {f"{name}.{key}": value for name, block in blocks.items() for key, value in block.items()}
    found |= {key: record.get(key) for key in FACTS}
    if "peak" in record.get("memory", {}):
        found["peak memory"] = f"{record['memory']['peak'] / 1e6:.0f} MB"
    if changed := record.get("changed"):
        found["changed tensors"] = f"{len(changed)}: {', '.join(changed[:12])}" + (", …" if len(changed) > 12 else "")
    found["effect"] = "; ".join(read_effect(folder)) or None
    data = record.get("data", {})
    return found | {f"{topic}.{name} texts": facts for topic, sets in data.items() for name, facts in sets.items()}


def list_defaults(folder: Path) -> dict[str, str]:
    """The options of a run's method and of its training as text, as they are where a config leaves them open."""
    method = METHODS.get(read_tree(folder / CONFIG).get("method", {}).get("name", ""))
    owners = [("train", TrainOptions), *([("method", method)] if method else [])]
    found = {f"{key}.{one.name}": format_fact(one.default) for key, owner in owners for one in fields(owner)}
    own = {f"train.{key}": format_fact(getattr(method, key)) for key in ("learning_rate", "schedule") if method}
    return found | own


def read_effect(folder: Path) -> list[str]:
    """What a run said of its effect when it ended."""
    effect = read_json(folder / RECORD, {}).get("effect", {})
    return [*effect.get("warnings", ()), *effect.get("sentences", ())]


def explain_degeneration(entries: Sequence[RunGroup]) -> list[str]:
    """A paragraph on the entries whose models repeat themselves; none where none does."""
    said = []
    for row in map(aggregate_runs, entries):
        numbers = {"before": row.before, "after": row.after}
        plain = {when: {name: vars(one) for name, one in of_it.items()} for when, of_it in numbers.items()}
        told = explain_repetition(plain)
        said += [f"{row.name}: {one}" if len(entries) > 1 else f"{one[0].upper()}{one[1:]}" for one in told]
    if len(said) > FEW:
        return [f"{'; '.join(said[:FEW])}. The section on other measurements has more of these."]
    return [f"{'; '.join(said)}."] if said else []


def format_fact(value: Any) -> str:
    """A setting as text; of a path only the last part, as folders may tell whose data it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text}" for key, item in value.items() if (text := format_fact(item)))
    if isinstance(value, list | tuple):
        return ", ".join(map(format_fact, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "/").rpartition("/")[2]


def strip_paths(text: str) -> str:
    """A sentence with only the last part of each absolute path in it."""
    return re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\][^\s'\"(]*[/\\]", "", text)
