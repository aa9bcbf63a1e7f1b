"""Measure a model, or a run before and after, on a benchmark, beside an oracle."""

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
from srmu.engine.cache import find_cached, keep_cached
from srmu.engine.files import format_json, read_json, sha256, write_whole
from srmu.engine.loading import read_config
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
from srmu.evals.results import Row, load_results, merge_results, metric_rows, write_answers
from srmu.evals.subject import Subject
from srmu.runs.open import OpenedModel, open_target
from srmu.runs.plan import load_tokenizer

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
    target: str, options: BenchmarkOptions, *, log: Path | None = None, watch: Watch = ignore_progress
) -> dict[str, Any]:
    """Measure a model folder, a hub id or a run on a suite: `{"after": metrics, ...}`.

    The data set is `options.data`, else `suites/NAME` beside the model, else the hub's. Of a run
    also `before`; of an oracle that is a model, its own metrics. A run's are merged into its
    `results.json`. `log` is where the values of each question are written, which can serve as
    another's `oracle`; they are numbers, no texts.
    """
    suite, _ = benchmarks.find_benchmark(options.name)
    if suite.oracle and not options.oracle and not log:
        raise SrmuError(
            f"--tasks {options.name}: {suite.oracle} needs a model that never saw the forget set: "
            "give --oracle MODEL, or a log of one (srmu eval MODEL --tasks ... --log FILE.json), "
            "or --oracle none to leave it out"
        )
    if log and not log.parent.is_dir():
        raise SrmuError(f"--log {log}: there is no folder {log.parent}")
    opened = open_target(target, options.device)
    folder, run = opened.base, opened.run
    beside = folder.parent / "suites" / options.name.partition("/")[0]  # as in a testbed
    if not (options.data or options.revision) and beside.is_dir():
        options = replace(options, data=str(beside))
    options.read()  # what is wrong must show before anything is loaded
    if run:
        load_results(run.folder)
    reference: Values | None = None
    scores: dict[str, BenchmarkScores] = {}
    marks = reference_marks(folder, options)
    decides = asdict(options) | {"device": "", "data": digest_data(options)}
    measure = partial(measure_benchmark, options=options, decides=decides, watch=watch)
    if options.oracle.endswith(".json"):
        reference, rows = read_log(Path(options.oracle), marks)
    elif options.oracle not in ("", NONE):
        oracle = OpenedModel(weights.locate_model(options.oracle), None, options.device)
        scores["oracle"], rows = measure(oracle)
        reference = dict(scores["oracle"].values)
    for when in ("before", "after") if run else ("after",):
        scores[when], seen = measure(opened, reference, changed=when == "after")
        if reference is not None and seen != rows:
            raise SrmuError(f"--oracle {options.oracle}: its log was made from other rows than these")
    if log and distributed.is_first():
        values = dict(scores["after"].values)
        write_whole(log, format_json(marks | {"rows": seen, "values": values}))
    if run and distributed.is_first():
        measured = [row for when, one in scores.items() for row in benchmark_rows(options.name, when, one)]
        asked = {options.name: {"asked": asdict(options), "rows": seen}}
        merge_results(run.folder, measured, benchmarks=asked)
    return {when: one.metrics for when, one in scores.items()}


def benchmark_rows(name: str, when: str, scores: BenchmarkScores) -> list[Row]:
    """A benchmark's metrics as rows of the results, with values of single questions."""
    first = name.partition("/")[0]
    answers = {f"{first}/{key}": {"answers": write_answers(values)} for key, values in scores.values.items()}
    metrics = {key: entry | answers.get(key, {}) for key, entry in scores.metrics.items()}
    return metric_rows(metrics, when, benchmark=name)


def measure_benchmark(
    opened: OpenedModel,
    reference: Values | None = None,
    *,
    changed: bool = True,
    options: BenchmarkOptions,
    decides: Mapping[str, Any],
    watch: Watch,
) -> tuple[BenchmarkScores, dict[str, str]]:
    """A benchmark's scores of a model, before or after its run, and digests of the rows it read.

    Kept in the cache folder until the model, what `decides`, the reference or the code change.
    """
    run = opened.run if changed else None
    delta = dict(run.delta) if run else {}
    method = run.config.method if run else None
    mark = weights.changed_fingerprint(weights.fingerprint_model(opened.base), delta)
    own = repr(method) if method and method.no_checkpoint else ""
    code = [sha256(path) for path in sorted(Path(benchmarks.__file__).parent.glob("*.py"))]
    versions = [version(package) for package in ("transformers", "torch", "rouge-score", "lm-eval")]
    key = [mark, own, {**decides, "oracle": reference}, code, versions]
    kept = distributed.agree_on(find_cached("suites", key))
    if kept is not None:
        return BenchmarkScores(kept["metrics"], kept["values"]), kept["rows"]
    suite, part = benchmarks.find_benchmark(options.name)
    data = options.read()
    request = BenchmarkRequest(data, part, options.template, reference, watch)
    with opened.after() if run else nullcontext(opened.module) as module:
        # only that there is one is looked at: nothing may take these for the original's
        subject = Subject(module, opened.tokenizer, delta, fixed="suites change no weights")
        scores = suite.run(subject, request)
    if distributed.is_first():
        kept = {"metrics": scores.metrics, "values": scores.values, "rows": data.seen}
        keep_cached("suites", key, kept)
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


def digest_data(options: BenchmarkOptions) -> str:
    """Where the data are, or what they are: a folder's name may stay while its files change."""
    if not options.data:
        return ""
    folder = Path(options.data)
    places = (folder, folder.with_name("mmlu"))  # WMDP is asked with MMLU, which lies beside it
    files = sorted(path for place in places for path in place.rglob("*") if path.is_file())
    return sha256(*(part for path in files for part in (path.name.encode(), path)))


def reference_marks(folder: Path, options: BenchmarkOptions) -> dict[str, Any]:
    """What two models must have in common for the log of one to serve the other."""
    config = read_config(folder)
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    tokenizer = load_tokenizer(folder)
    code = sha256(Path(benchmarks.__file__).with_name("base.py"), Path(str(find_module(options).__file__)))
    return {
        "suite": options.name,
        "model": {name: getattr(config, name, None) for name in names},
        "tokenizer": sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())[:16],
        "template": options.template or tokenizer.chat_template or "",
        "limit": options.limit,
        "srmu": f"{version('srmu')}, {code[:16]}",
    }


def find_module(options: BenchmarkOptions) -> Any:
    return getattr(benchmarks, options.name.partition("/")[0])


def read_log(path: Path, marks: Mapping[str, Any]) -> tuple[Values, dict[str, str]]:
    """The values of an oracle that was measured before, and which rows; SrmuError if of another."""
    try:
        log = read_json(path)
        values, rows, own = log["values"], log["rows"], {name: log[name] for name in marks}
    except (SrmuError, KeyError, TypeError) as error:
        raise SrmuError(
            f"--oracle {path} is not a log ({type(error).__name__}); srmu eval MODEL "
            f"--tasks {marks['suite']} --log FILE.json writes one"
        ) from error
    other = [name for name in marks if own[name] != marks[name]]
    if other:
        raise SrmuError(
            f"--oracle {path} is of another {', '.join(other)}: measure the model that never saw "
            f"the forget set again (srmu eval MODEL --tasks {marks['suite']} --log {path})"
        )
    return values, rows
