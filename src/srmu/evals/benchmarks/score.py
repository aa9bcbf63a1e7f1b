"""A model or a run on a suite: before and after, beside a model that never saw the forget set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from srmu.engine import distributed, weights
from srmu.engine.files import cache_dir, format_json, sha256, write_json, write_whole
from srmu.engine.loading import load_module, read_config
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals import benchmarks
from srmu.evals.benchmarks.base import (
    Benchmark,
    BenchmarkData,
    BenchmarkRequest,
    BenchmarkScores,
    Metrics,
    TableColumn,
    Values,
)
from srmu.evals.subject import Subject
from srmu.runs.record import extend_record
from srmu.runs.run import Run, find_device, load_tokenizer

FILE = "suites.json"  # in a run's folder: what was measured, by suite and part
NONE = "none"
TITLES = {"before": "original", "after": "unlearned", "oracle": "oracle"}


@dataclass(frozen=True)
class BenchmarkOptions:
    """How a suite is asked: what `srmu eval --tasks` was told.

    `oracle`: a model that never saw the forget set, a log of one (.json), or "none".
    """

    name: str
    data: str = ""
    revision: str = ""
    template: str = ""
    oracle: str = ""
    limit: int | None = None
    device: str = "auto"

    def read(self) -> BenchmarkData:
        suite, part = benchmarks.find_benchmark(self.name)
        hub = suite.hub.format(part=part.capitalize())
        if not self.data and not hub:
            raise SrmuError(f"--tasks {self.name} has no data set of its own; {suite.get}")
        folder = Path(self.data) if self.data else None
        if folder and not folder.is_dir():
            raise SrmuError(f"--data {folder}: there is no such folder; {suite.get}")
        if folder and self.revision:
            raise SrmuError(f"--revision does not apply to the local folder {folder}")
        if self.template and "{question}" not in self.template:
            raise SrmuError(f"--template {self.template!r} has no {{question}} in it")
        if self.limit is not None and self.limit < 1:
            raise SrmuError(f"--limit {self.limit} must be 1 or more")
        revision = self.revision or suite.revision
        return BenchmarkData(hub, suite.get, revision, folder, self.limit)


def score_benchmark(
    target: str, way: BenchmarkOptions, *, log: Path | None = None, watch: Watch = ignore_progress
) -> dict[str, Any]:
    """Measure a model folder, a hub id or a run on a suite: `{"after": metrics, ...}`.

    The data set is `way.data`, else `suites/NAME` beside the model, else the hub's. Of a run also
    `before`; of an oracle that is a model, its own metrics. A run's go into its `suites.json`.
    `log` is where the values of each question are written, which can serve as another's `oracle`;
    they are numbers, no texts.
    """
    suite, _ = benchmarks.find_benchmark(way.name)
    if suite.oracle and not way.oracle and not log:
        raise SrmuError(
            f"--tasks {way.name}: {suite.oracle} needs a model that never saw the forget set: give "
            "--oracle MODEL, or a log of one (srmu eval MODEL --tasks ... --log FILE.json), or "
            "--oracle none to leave it out"
        )
    if log and not log.parent.is_dir():
        raise SrmuError(f"--log {log}: there is no folder {log.parent}")
    place = Path(target)
    run = Run.open(place) if (place / "record.json").exists() else None
    folder = run.base if run else weights.locate_model(target)
    beside = folder.parent / "suites" / way.name.partition("/")[0]  # as in a testbed
    if not (way.data or way.revision) and beside.is_dir():
        way = replace(way, data=str(beside))
    way.read()  # what is wrong must show before anything is loaded
    read_config(folder)
    weights.list_shards(folder)
    reference: Values | None = None
    oracle: dict[str, Any] = {}
    marks = reference_marks(folder, way)
    given = asdict(way) | {"device": "", "data": digest_data(way)}
    measure = partial(measure_benchmark, way=way, given=given, watch=watch)
    if way.oracle.endswith(".json"):
        reference, rows = read_log(Path(way.oracle), marks)
    elif way.oracle not in ("", NONE):
        of_it, rows = measure(weights.locate_model(way.oracle))
        oracle, reference = {"oracle": of_it.metrics}, dict(of_it.values)
    found: dict[str, Any] = {}
    for when in ("before", "after") if run else ("after",):
        scores, seen = measure(folder, run if when == "after" else None, reference)
        if reference is not None and seen != rows:
            raise SrmuError(f"--oracle {way.oracle}: its log was made from other rows than these")
        found[when] = scores.metrics
    found |= oracle
    if not distributed.is_first():
        return found
    if log:
        write_whole(log, format_json(marks | {"rows": seen, "values": dict(scores.values)}))
    if run:
        known = json.loads((place / FILE).read_text()) if (place / FILE).exists() else {}
        write_json(place / FILE, known | {way.name: found | {"asked": asdict(way), "rows": seen}})
        extend_record(place, [FILE])
    return found


def measure_benchmark(
    folder: Path,
    run: Run | None = None,
    reference: Values | None = None,
    *,
    way: BenchmarkOptions,
    given: Mapping[str, Any],
    watch: Watch,
) -> tuple[BenchmarkScores, dict[str, str]]:
    """What a suite says of a model, changed by a run or not, and digests of the rows it read.

    Kept in the cache folder until the model, what is `given`, the reference or the code change.
    """
    delta = dict(run.delta) if run else {}
    mark = weights.changed_fingerprint(weights.fingerprint_model(folder), delta)
    method = run.config.method if run else None
    told = repr(method) if method and method.no_checkpoint else ""
    code = [sha256(path) for path in sorted(Path(benchmarks.__file__).parent.glob("*.py"))]
    versions = [version(package) for package in ("transformers", "torch", "rouge-score", "lm-eval")]
    decides = [mark, told, {**given, "oracle": reference}, code, versions]
    key = sha256(json.dumps(decides, sort_keys=True).encode())
    path = cache_dir() / "suites" / f"{key}.json"
    kept = distributed.agree_on(_read(path))
    if kept is not None:
        return BenchmarkScores(kept["metrics"], kept["values"]), kept["rows"]
    suite, part = benchmarks.find_benchmark(way.name)
    module = load_module(folder).eval().to(find_device(way.device))
    data = way.read()
    asked = BenchmarkRequest(data, part, way.template, reference, watch)
    changed = (
        method.at_inference(module, partial(weights.apply_delta, module, folder, delta))
        if method
        else nullcontext()
    )
    with changed:
        # only that there is one is looked at: nothing may take these for the original's
        subject = Subject(module, load_tokenizer(folder), delta, fixed="suites change no weights")
        scores = suite.run(subject, asked)
    if distributed.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"metrics": scores.metrics, "values": scores.values, "rows": data.seen})
    return scores, data.seen


def benchmark_table(suite: Benchmark, shown: Mapping[str, Metrics]) -> list[dict[str, str]]:
    """The table of a suite's paper: a row for each model, by title; "" for what was left out."""
    return [
        {"": title} | {column.title: format_metric(column, metrics) for column in suite.columns}
        for title, metrics in shown.items()
    ]


def format_metric(column: TableColumn, metrics: Metrics) -> str:
    if column.metric not in metrics:
        return ""
    value = column.scale * metrics[column.metric]["value"]
    return f"{value:.1f}" if column.scale == 100 else f"{value:.3g}"


def digest_data(way: BenchmarkOptions) -> str:
    """Where the data are, or what they are: a folder's name may stay while its files change."""
    if not way.data:
        return ""
    folder = Path(way.data)
    places = (folder, folder.with_name("mmlu"))  # WMDP is asked with MMLU, which lies beside it
    files = sorted(path for place in places for path in place.rglob("*") if path.is_file())
    return sha256(*(part for path in files for part in (path.name.encode(), path)))


def reference_marks(folder: Path, way: BenchmarkOptions) -> dict[str, Any]:
    """What two models must have in common for the log of one to serve the other."""
    config = read_config(folder)
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    tokenizer = load_tokenizer(folder)
    code = sha256(
        Path(benchmarks.__file__).with_name("base.py"), Path(str(module_of(way).__file__))
    )
    return {
        "suite": way.name,
        "model": {name: getattr(config, name, None) for name in names},
        "tokenizer": sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())[:16],
        "template": way.template or tokenizer.chat_template or "",
        "limit": way.limit,
        "srmu": f"{version('srmu')}, {code[:16]}",
    }


def module_of(way: BenchmarkOptions) -> Any:
    return getattr(benchmarks, way.name.partition("/")[0])


def read_log(path: Path, marks: Mapping[str, Any]) -> tuple[Values, dict[str, str]]:
    """The values of an oracle that was measured before, and which rows; SrmuError if of another."""
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        values, rows, found = log["values"], log["rows"], {name: log[name] for name in marks}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SrmuError(
            f"--oracle {path} is not a log ({type(error).__name__}); srmu eval MODEL "
            f"--tasks {marks['suite']} --log FILE.json writes one"
        ) from error
    other = [name for name in marks if found[name] != marks[name]]
    if other:
        raise SrmuError(
            f"--oracle {path} is of another {', '.join(other)}: measure the model that never saw "
            f"the forget set again (srmu eval MODEL --tasks {marks['suite']} --log {path})"
        )
    return values, rows


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text())
        return {name: kept[name] for name in ("metrics", "values", "rows")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
