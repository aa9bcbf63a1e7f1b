"""A run's `results.json`: every number that was measured of it, merged in by whoever measures.

    {"rows": [{"task": "quiz", "metric": "acc", "when": "after", "value": 0.4, "n": 20, ...}, ...],
     "attacks": {...}, "benchmarks": {...}}

A row is one number of the model `before` the run, `after` it, or of the `oracle`, with the `attack` or `benchmark` that
it is from; `unknown`: of the model before the run, on facts that it never knew. `answers` are right answers question by
question; `facts` number the fact that each asks for, the same for all its phrasings (without it, each asks for a
different one). Other keys say how it was measured.
"""

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from srmu.engine.files import end_lock, write_json
from srmu.engine.progress import print_line
from srmu.errors import SrmuError
from srmu.evals.statistics import average_seeds, parse_answers
from srmu.runs.record import RECORD, RESULTS_LOCK, extend_record, read_record

RESULTS = "results.json"
KEYS = ("task", "metric", "when", "benchmark", "attack")
WHEN = {"original": "before", "oracle": "oracle", "unknown": "unknown"}  # what a control's rows are called
WHOSE = {when: who for who, when in WHEN.items()}
UNATTACKED = PLAIN, KEPT = "forced_choice", "utility"  # attacks that only ask the questions
Row = dict[str, Any]
Metrics = dict[str, dict[str, Any]]  # "task/metric": value, n and what else is known


def list_names(names: str | Sequence[str]) -> list[str]:
    """Names of tasks, metrics or attacks; one may stand alone."""
    return [names] if isinstance(names, str) else [*names]


def load_results(folder: Path) -> dict[str, Any]:
    """The content of a folder's `results.json`; no rows where there is none."""
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        _ = [(row["task"], row["metric"], row["when"], row["value"]) for row in results["rows"]]
    except FileNotFoundError:
        return {"rows": []}
    except (OSError, ValueError, KeyError, TypeError):
        again = f"measure {folder} again with `srmu eval` and `srmu attack`"
        raise SrmuError(f"{path} is damaged, or of an earlier version: remove it, and {again}") from None
    return dict(results)


def check_results(folder: Path) -> None:
    """SrmuError where a folder's results, or the record beside them, are damaged: before the work."""
    load_results(folder)
    if (folder / RECORD).exists():
        read_record(folder / RECORD)


@contextmanager
def keep_going(folder: Path) -> Iterator[None]:
    """Where a folder cannot be written to, say so and go on: the results can still be shown."""
    try:
        yield
    except OSError as error:
        print_line(f"results were not saved in {folder}: {error.strerror or error}")


def row_key(row: Row) -> tuple[str, ...]:
    return tuple(row.get(key, "") for key in KEYS)


@contextmanager
def lock_results(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / RESULTS_LOCK, is_singleton=True)  # the same process may lock it twice
    with suppress(OSError):  # it cannot be written to, which the writing will say
        lock.acquire()
    try:
        yield
    finally:
        end_lock(lock)


def merge_results(folder: Path, rows: Iterable[Row] = (), record: Mapping[str, Any] = {}, **facts: Any) -> None:
    """Add rows and facts to a folder's results, and to the record that lies there.

    A row replaces that of the same KEYS. `attacks` and each of the `benchmarks` come with all of their rows: earlier
    ones go. `record` holds further blocks of the record.
    """
    with lock_results(folder):
        results = load_results(folder)
        kept = [row for row in results["rows"] if row.get("benchmark") not in facts.get("benchmarks", ())]
        if "attacks" in facts:
            kept = [row for row in kept if not row.get("attack")]
        merged = {row_key(row): row for row in (*kept, *rows)}
        for kind, added in facts.items():
            known = {} if kind == "attacks" else results.get(kind, {})
            results[kind] = known | dict(added)
        results["rows"] = [merged[key] for key in sorted(merged)]
        write_json(folder / RESULTS, results)
        if (folder / RECORD).exists():
            measured = {when: plain_metrics(of_it) for when, of_it in flat_metrics(results).items()}
            extend_record(folder, [RESULTS], results=measured, **record)


def metric_rows(metrics: Mapping[str, Mapping[str, Any]], when: str, **labels: str) -> list[Row]:
    """Rows of flat metrics (`quiz/acc`), those of tasks with their interval where they have one."""
    rows = []
    for name, entry in metrics.items():
        task, _, metric = name.partition("/")
        row = {"task": task, "metric": metric, "when": when, **labels, **entry}
        estimate = None if labels else average_seeds([metrics], [name])
        rows.append(row | ({"low": estimate.low, "high": estimate.high} if estimate and estimate.n else {}))
    return rows


def flat_metrics(results: Mapping[str, Any]) -> dict[str, Metrics]:
    """The rows of tasks by model and by `task/metric`, without benchmarks and attacks."""
    metrics: dict[str, Metrics] = {"before": {}, "after": {}}
    for row in results["rows"]:
        if not (row.get("benchmark") or row.get("attack")):
            metrics[row["when"]][f"{row['task']}/{row['metric']}"] = row
    return metrics


def read_metrics(folder: Path) -> dict[str, Metrics]:
    """The metrics of a folder's tasks, before and after: `{"after": {"quiz/acc": row}, ...}`."""
    return flat_metrics(load_results(folder))


def plain_metrics(metrics: Metrics) -> Metrics:
    """Metrics without their answers and the keys of a row."""
    left_out = {*KEYS, "answers", "facts", "low", "high"}
    return {name: {key: entry[key] for key in entry if key not in left_out} for name, entry in metrics.items()}


def read_benchmarks(folder: Path) -> dict[str, dict[str, Any]]:
    """By benchmark (`tofu/forget10`): its metrics by model, and how it was asked."""
    results = load_results(folder)
    benchmarks = {name: dict(facts) for name, facts in results.get("benchmarks", {}).items()}
    for row in results["rows"]:
        if name := row.get("benchmark"):
            benchmarks[name].setdefault(row["when"], {})[f"{row['task']}/{row['metric']}"] = row
    return benchmarks


def attack_rows(report: Mapping[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """Split a report of attacks into rows and the rest, which says how the attacks were made."""
    rest = deepcopy({key: value for key, value in report.items() if key not in ("original", "utility")})
    tasks, unknown = (" + ".join(report["tasks"].get(kind, ())) for kind in ("test", "unknown"))
    rows: list[Row] = []
    for name, entry in rest["attacks"].items():
        entries = {"after": entry} | {WHEN[who]: control for who, control in entry.get("controls", {}).items()}
        for when, one in entries.items():
            if "right" in one:
                row = {"task": unknown if when == "unknown" else tasks, "metric": "acc", "when": when, "attack": name}
                rows.append(row | {"answers": one.pop("right"), **one.pop("accuracy")})
    for (task, kept), when in product(report["utility"].items(), ("before", "after")):
        right = {"answers": kept[when], "facts": kept["facts"], "n": len(kept[when])}
        row = {"task": task, "metric": "acc", "when": when, "attack": KEPT, **right}
        rows.append(row | {"value": float(np.mean(parse_answers(kept[when])))})
    return rows, rest


def read_attacks(folder: Path) -> dict[str, Any]:
    """What `attack_run` gave of a run, with right answers and accuracies; {} where it has none."""
    results = load_results(folder)
    if "attacks" not in results:
        return {}
    report = results["attacks"] | {"utility": {}}
    for row in results["rows"]:
        name, when = row.get("attack"), row["when"]
        if name == KEPT:
            report["utility"].setdefault(row["task"], {"facts": row["facts"]})[when] = row["answers"]
        elif name:
            entry = report["attacks"][name]
            one = entry if when == "after" else entry["controls"][WHOSE[when]]
            one["right"] = row["answers"]
            one["accuracy"] = {key: row[key] for key in ("value", "low", "high", "n")}
    original = report["attacks"][PLAIN]["controls"]["original"]
    return report | {"original": {key: original[key] for key in ("right", "accuracy")}}


def write_answers(right: Sequence[float]) -> str | list[float]:
    """A digit a question; numbers where some are neither right nor wrong."""
    return "".join(f"{value:.0f}" for value in right) if {*right} <= {0.0, 1.0} else list(right)


def number_facts(names: Sequence[Hashable]) -> list[int]:
    """Facts as numbers, so that what is written holds no text."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]
