"""Read what open-unlearning measured of a model, as the metrics of srmu's benchmarks that are the same.

It writes `TOFU_EVAL.json`, with a value for each question, and `TOFU_SUMMARY.json` without; for MUSE likewise.
"""

import re
from collections.abc import Mapping, Sequence
from math import exp, isfinite, log10
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srmu.engine.files import read_json
from srmu.errors import SrmuError
from srmu.evals.benchmarks import BENCHMARKS, base
from srmu.runs.record import CONFIG

# Of each suite: its metric here, and there (letter case varies) with the key of a question's value.
SAME = {
    "tofu": {
        "model_utility": ("model_utility", ""),
        "forget_quality": ("forget_quality", ""),
        "forget/probability": ("forget_q_a_prob", "prob"),
        "forget/rouge": ("forget_q_a_rouge", "rougeL_recall"),
        "retain/rouge": ("retain_q_a_rouge", "rougeL_recall"),
        "real_authors/rouge": ("ra_q_a_rouge", "rougeL_recall"),
        "world_facts/rouge": ("wf_q_a_rouge", "rougeL_recall"),
    },
    "muse": {
        "verbmem_f": ("forget_verbmem_rouge", "rougeL_f1"),
        "knowmem_f": ("forget_knowmem_rouge", "rougeL_f1"),
        "knowmem_r": ("retain_knowmem_rouge", "rougeL_f1"),
        "privleak": ("privleak", ""),
    },
}
PERCENT = "privleak"  # is a share here
FILES = [f"{suite.upper()}_{kind}.json" for suite in SAME for kind in ("EVAL", "SUMMARY")]
RETAIN = {"retain90": "forget10", "retain95": "forget05", "retain99": "forget01"}  # a model, and what it never saw


class PeerResults(NamedTuple):
    """A model that another tool measured: its name, the benchmark (`tofu/forget10`) and the metrics."""

    name: str
    benchmark: str
    metrics: base.Metrics


def find_peers(paths: Sequence[Path]) -> tuple[list[Path], list[PeerResults]]:
    """Split paths into those of runs, and the results that open-unlearning wrote: its files, or their folders."""
    runs, peers = [], []
    for path in paths:
        inside = [] if (path / CONFIG).exists() else [path / name for name in FILES if (path / name).is_file()]
        if path.is_file():
            inside = [path]
        suites = {file.name.partition("_")[0]: file for file in reversed(inside)}  # EVAL, which says more, comes last
        peers += [read_peer(file) for file in suites.values()]
        runs += [] if suites else [path]
    return runs, peers


def read_peer(path: Path) -> PeerResults:
    """The metrics of one of FILES; SrmuError where it is another file."""
    if path.name not in FILES:
        raise SrmuError(f"{path} is neither a run's folder nor one of open-unlearning's files: {', '.join(FILES)}")
    suite, logs = path.name.partition("_")[0].lower(), read_json(path)
    try:
        logs = {name.lower(): entry for name, entry in logs.items()}
        read = {name: read_metric(logs.get(there), key) for name, (there, key) in SAME[suite].items()}
        if near := measure_nearness(logs):
            read["forget/truth_ratio"] = base.mean_metric(near)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SrmuError(f"{path} is not as open-unlearning writes it: expected numbers by metric") from None
    metrics = {f"{suite}/{name}": entry for name, entry in read.items() if entry}
    if not metrics:
        names = ", ".join(there for there, _ in SAME[suite].values())
        raise SrmuError(f"{path} has no metric that srmu has, too: expected one of {names}")
    if quality := metrics.get("tofu/forget_quality"):
        metrics["tofu/forget_quality_log10"] = {"value": log10(max(quality["value"], 1e-300))}
    if read.get(PERCENT):
        metrics[f"{suite}/{PERCENT}"]["value"] /= 100
    folders = [part for part in path.resolve().parts[:-1] if not re.match(r"evals|checkpoint-", part)]
    return PeerResults(folders[-1], f"{suite}/{find_part(suite, path)}", metrics)


def read_metric(entry: Any, key: str) -> dict[str, float]:
    """A metric, with its standard error over questions where their values are there; {} where it was not measured."""
    value, asked = (entry.get("agg_value"), entry.get("value_by_index")) if isinstance(entry, dict) else (entry, None)
    if value is None or not isfinite(value):
        return {}
    known = [one[key] for one in (asked or {}).values() if one and isinstance(one.get(key), Real)] if key else []
    return (base.mean_metric(known) if known else {}) | {"value": float(value)}


def measure_nearness(logs: Mapping[str, Any]) -> list[float]:
    """min(R, 1 / R) of each question of TOFU's forget set, R its truth ratio; [] without the losses of its answers.

    The file's own truth ratio is this in some versions of open-unlearning, and 1 / (1 + R) in others.
    """
    entries = [logs.get(f"forget_q_a_{kind}_prob") for kind in ("para", "pert")]
    right, wrong = (entry["value_by_index"] if isinstance(entry, dict) else {} for entry in entries)
    both = [(right[i], wrong[i]) for i in right if right[i] and wrong.get(i)]
    return [exp(-abs(float(np.mean(one["avg_loss"]) - np.mean(other["avg_loss"])))) for one, other in both]


def find_part(suite: str, path: Path) -> str:
    """The part of a suite that a file is on, which only the names of its folders tell."""
    parts = BENCHMARKS[suite].parts
    words = {part: part for part in parts} | {word: part for word, part in RETAIN.items() if part in parts}
    for folder in reversed(path.resolve().parts[:-1]):
        if found := {words[word] for word in re.split(r"[^a-z0-9]+", folder.lower()) if word in words}:
            return found.pop()
    raise SrmuError(f"{path} does not say what was asked: put {' or '.join(parts)} into the name of its folder")
