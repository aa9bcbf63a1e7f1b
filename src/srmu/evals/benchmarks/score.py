"""Measure a model, or a run before and after, on a benchmark, beside an oracle."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from srmu.engine import distributed, weights
from srmu.engine.cache import cached
from srmu.engine.files import format_json, read_json, sha256, write_whole
from srmu.engine.loading import read_config
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals import benchmarks, results
from srmu.evals.benchmarks import base
from srmu.evals.subject import Subject
from srmu.runs.plan import load_tokenizer
from srmu.runs.run import OpenedModel, open_target

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

    def read(self, reference: base.Values | None = None, watch: Watch = ignore_progress) -> base.BenchmarkRequest:
        suite, part = benchmarks.find_benchmark(self.name)
        hub = suite.hub.format(part=part.capitalize())
        name = self.name.partition("/")[0]
        fetch = f"hf download {hub} --repo-type dataset --local-dir {name}"
        get = suite.get or f"with a hub in reach, `{fetch}`, then give --data {name}"
        folder = Path(self.data) if self.data else None
        if not folder and not hub:
            raise SrmuError(f"--tasks {self.name} has no data set of its own; {get}")
        if folder and not folder.is_dir():
            raise SrmuError(f"--data {folder}: there is no such folder; {get}")
        if folder and self.revision:
            raise SrmuError(f"--revision does not apply to the local folder {folder}")
        if self.template and "{question}" not in self.template:
            raise SrmuError(f"--template {self.template!r} has no {{question}} in it")
        if self.limit is not None and self.limit < 1:
            raise SrmuError(f"--limit {self.limit} must be 1 or more")
        revision = self.revision or suite.revision
        return base.BenchmarkRequest(hub, get, revision, folder, self.limit, part, self.template, reference, watch)


def score_benchmark(
    target: str, options: BenchmarkOptions, *, log: Path | None = None, watch: Watch = ignore_progress
) -> dict[str, Any]:
    """Measure a model folder, a hub id or a run on a suite: `{"after": metrics, ...}`.

    The data set is `options.data`, else `suites/NAME` beside the model, else the hub's. Of a run also `before`; of an
    oracle that is a model, its own metrics. A run's are merged into its `results.json`. `log` is where the values of
    each question are written, which can serve as another's `oracle`; they are numbers, no texts.
    """
    first, oracle = options.name.partition("/")[0], options.oracle
    suite, _ = benchmarks.find_benchmark(options.name)
    if suite.oracle and not oracle and not log:
        raise SrmuError(
            f"--tasks {options.name}: {suite.oracle} needs a model that never saw the forget set: give --oracle MODEL, "
            "or a log of one (srmu eval MODEL --tasks ... --log FILE.json), or --oracle none to leave it out"
        )
    if log and not log.parent.is_dir():
        raise SrmuError(f"--log {log}: there is no folder {log.parent}")
    opened = open_target(target, options.device)
    run, beside = opened.run, opened.base.parent / "suites" / first  # as in a testbed
    if not (options.data or options.revision) and beside.is_dir():
        options = replace(options, data=str(beside))
    options.read()  # what is wrong must show before anything is loaded
    if run:
        results.load_results(run.folder)
    marks = reference_marks(opened.base, options)
    known: dict[str, Any] = {"values": None}
    scores: dict[str, dict[str, Any]] = {}
    if oracle.endswith(".json"):
        known = read_log(Path(oracle), marks)
    elif oracle not in ("", "none"):
        model = OpenedModel(weights.locate_model(oracle), None, options.device)
        known = scores["oracle"] = measure_benchmark(model, options, None, watch)
    for when in ("before", "after") if run else ("after",):
        scores[when] = measure_benchmark(opened, options, known["values"], watch, changed=when == "after")
        if "rows" in known and scores[when]["rows"] != known["rows"]:
            raise SrmuError(f"--oracle {oracle}: its log was made from other rows than these")
    after = scores["after"]
    if log and distributed.is_first():
        write_whole(log, format_json(marks | {"rows": after["rows"], "values": after["values"]}))
    if run and distributed.is_first():
        rows = []
        for when, one in scores.items():
            answers = {f"{first}/{name}": {"answers": results.write_answers(v)} for name, v in one["values"].items()}
            metrics = {name: entry | answers.get(name, {}) for name, entry in one["metrics"].items()}
            rows += results.metric_rows(metrics, when, benchmark=options.name)
        asked = {options.name: {"asked": asdict(options), "rows": after["rows"]}}
        results.merge_results(run.folder, rows, benchmarks=asked)
    return {when: one["metrics"] for when, one in scores.items()}


def measure_benchmark(
    opened: OpenedModel, options: BenchmarkOptions, reference: base.Values | None, watch: Watch, *, changed: bool = True
) -> dict[str, Any]:
    """Metrics and values of a model, before or after its run, and `rows`, digests of those it read.

    Kept in the cache folder until the model, how it is asked, the reference or the code change.
    """
    run = opened.run if changed else None
    delta = dict(run.delta) if run else {}
    suite, _ = benchmarks.find_benchmark(options.name)

    def measure() -> dict[str, Any]:
        request = options.read(reference, watch)
        with opened.after() if run else nullcontext(opened.module) as module:
            # only that there is one is looked at: nothing may take these for the original's
            subject = Subject(module, opened.tokenizer, delta, fixed="suites change no weights")
            scores = suite.run(subject, request)
        return {"metrics": scores.metrics, "values": scores.values, "rows": request.seen}

    mark = weights.changed_fingerprint(weights.fingerprint_model(opened.base), delta)
    own = repr(run.config.method) if run and run.config.method.no_checkpoint else ""
    decides = asdict(options) | {"device": "", "data": digest_data(options), "oracle": reference}
    code = [sha256(path) for path in sorted(Path(benchmarks.__file__).parent.glob("*.*"))]
    versions = [version(package) for package in ("transformers", "torch", "rouge-score", "lm-eval")]
    return dict(cached("suites", [mark, own, decides, code, versions], measure, together=True))


def benchmark_table(suite: base.Benchmark, shown: Mapping[str, base.Metrics]) -> list[dict[str, str]]:
    """The table of a suite's paper: a row for each model, by title; "" for what was left out."""
    return [
        {"": title} | {column.title: format_metric(column, metrics) for column in suite.columns}
        for title, metrics in shown.items()
    ]


def format_metric(column: base.TableColumn, metrics: base.Metrics) -> str:
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
    modules = ("base", options.name.partition("/")[0])
    code = sha256(*(Path(benchmarks.__file__).with_name(f"{name}.py") for name in modules))
    return {
        "suite": options.name,
        "model": {name: getattr(config, name, None) for name in names},
        "tokenizer": sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())[:16],
        "template": options.template or tokenizer.chat_template or "",
        "limit": options.limit,
        "srmu": f"{version('srmu')}, {code[:16]}",
    }


def read_log(path: Path, marks: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an oracle that was measured before, and which rows; SrmuError if of another."""
    try:
        log = read_json(path)
        known = {"values": log["values"], "rows": log["rows"]}
        other = [name for name in marks if log[name] != marks[name]]
    except (SrmuError, KeyError, TypeError) as error:
        raise SrmuError(
            f"--oracle {path} is not a log ({type(error).__name__}); srmu eval MODEL "
            f"--tasks {marks['suite']} --log FILE.json writes one"
        ) from error
    if other:
        raise SrmuError(
            f"--oracle {path} is of another {', '.join(other)}: measure the model that never saw "
            f"the forget set again (srmu eval MODEL --tasks {marks['suite']} --log {path})"
        )
    return known
