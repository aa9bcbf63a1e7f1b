"""Score a model, or a run before and after, on tasks and benchmarks; results go into the run's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from srmu.engine import distributed, files, weights
from srmu.engine.progress import Watch, choose_progress, ignore_progress
from srmu.errors import SrmuError
from srmu.evals import benchmarks, results
from srmu.evals.benchmarks import base
from srmu.evals.continuations import Prompts, measure_repetition, read_prompts
from srmu.evals.lm_eval import evaluate
from srmu.evals.results import Metrics, list_names, merge_results, metric_rows, plain_metrics
from srmu.evals.subject import Subject
from srmu.runs.run import OpenedModel, Run, open_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


def score_model(
    target: str | Path | Run | PreTrainedModel,
    tasks: str | Sequence[str] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> dict[str, Metrics]:
    """Ask a model, or a run before and after, the questions of lm-eval tasks.

    Gives the metrics by task, `{"after": {"quiz/acc": {"value": 0.4, "stderr": 0.1, "n": 25}}}`, of a run also those
    `"before"`. `target` is a model's folder, a hub id, a run or its folder; a model in memory comes with its
    `tokenizer`, and is scored where it lies.

    `tasks` are names, or one; default: those in the run's `eval`. A task is one of lm-eval's own or a YAML file in
    `tasks_dir`, else in the run's, else in `tasks/` beside the model. `limit` takes the first questions. A run's scores
    also say how much it repeats itself, `repetition/forget` and `repetition/neutral`, and are merged into its
    `results.json`; those of a model's folder into that of the folder `out`. SrmuError for a task that is unknown,
    broken or out of reach.
    """
    watch, tasks, out = watch or choose_progress(), list_names(tasks), None if out is None else Path(out)
    if isinstance(target, nn.Module):
        if tokenizer is None:
            raise SrmuError("a model in memory is scored with its tokenizer: tokenizer=...")
        place = None if tasks_dir is None else Path(tasks_dir)
        return {"after": plain_metrics(evaluate(target, tokenizer, tasks, tasks_dir=place, limit=limit, watch=watch))}
    opened = open_target(target, device)
    folder, run = opened.base, opened.run
    if run:
        tasks, out = tasks or run.config.eval, run.folder
        tasks_dir = run.config.tasks_dir if tasks_dir is None else tasks_dir
    if not tasks:
        raise SrmuError("no task is named: give tasks, such as a,b")
    if out:
        results.check_results(out)  # what is wrong with them must show before the work
    tasks_dir = Path(tasks_dir) if tasks_dir is not None else tasks_beside(folder)
    base = weights.fingerprint_model(folder)
    prompts, metrics = read_prompts(opened), {}
    for when, module in opened.states():
        mark = fingerprint_state(base, opened.dtype, run if when == "after" else None)
        how: dict[str, Any] = {"fingerprint": mark, "watch": watch}
        metrics[when] = evaluate(module, opened.tokenizer, tasks, tasks_dir=tasks_dir, limit=limit, **how)
        metrics[when] |= measure_repetition(module, opened.tokenizer, prompts, **how)
    if out and distributed.is_first():
        with results.keep_going(out):
            merge_results(out, [row for when, of_it in metrics.items() for row in metric_rows(of_it, when)])
    return {when: plain_metrics(of_it) for when, of_it in metrics.items()}


def fingerprint_state(base: str, dtype: str, run: Run | None) -> str:
    """What tells a model as a run leaves it from all others; `base` is its fingerprint before that."""
    base += dtype.replace("auto", "")
    own = repr(run.config.method) if run and run.config.method.no_checkpoint else ""  # its options decide, too
    return weights.changed_fingerprint(base, run.delta if run else {}) + own


def tasks_beside(folder: Path) -> Path | None:
    """The folder of the tasks that come with a model, as in a testbed."""
    tasks = folder.parent / "tasks"
    return tasks if tasks.is_dir() else None


def score_benchmark(
    target: str,
    name: str,
    *,
    data: str = "",
    template: str = "",
    oracle: str = "",
    limit: int | None = None,
    device: str = "auto",
    watch: Watch = ignore_progress,
) -> dict[str, Metrics]:
    """Measure a model folder, a hub id or a run on a suite (`tofu/forget05`): `{"after": metrics, ...}`.

    The data set is in the folder `data`, else in `suites/NAME` beside the model, else on the hub. `oracle` is a model
    that never saw the forget set, or "none". Of a run also `before`, and all is merged into its `results.json`.
    """
    suite, part = benchmarks.find_benchmark(name)
    if suite.oracle and not oracle:
        # so open-unlearning names, on the hub, a model of all authors and one that never saw those to forget
        named = target.endswith("_full") and re.fullmatch(r"forget(\d+)", part)
        twin = f"{target.removesuffix('full')}retain{100 - int(named[1])}" if named else "MODEL"
        raise SrmuError(
            f"--tasks {name}: {suite.oracle} needs a model that never saw the forget set: give --oracle {twin}, "
            "or --oracle none to leave it out"
        )
    opened = open_target(target, device)
    run, first = opened.run, name.partition("/")[0]
    beside = opened.base.parent / "suites" / first  # as in a testbed
    data = data or (str(beside) if beside.is_dir() else "")
    request = pose_request(name, data, template, limit)  # what is wrong shows before the work
    if run:
        results.check_results(run.folder)
    scores, prompts = {}, read_prompts(opened)
    if oracle not in ("", "none"):
        model = OpenedModel(weights.locate_model(oracle), None, device)
        scores["oracle"] = measure_benchmark(model, None, name, request, {}, watch)
        request = replace(request, reference=scores["oracle"]["values"])
    for when, state in {"before": None, "after": run}.items() if run else {"after": None}.items():
        scores[when] = measure_benchmark(opened, state, name, request, prompts, watch)
    if run and distributed.is_first():
        rows = []
        for when, one in scores.items():
            answers = {f"{first}/{key}": {"answers": results.write_answers(v)} for key, v in one["values"].items()}
            metrics = {key: entry | answers.get(key, {}) for key, entry in one["metrics"].items()}
            rows += [*metric_rows(metrics, when, benchmark=name), *metric_rows(one["repetition"], when)]
        asked = {"data": data, **request.pin, "template": template, "oracle": oracle, "limit": limit}
        with results.keep_going(run.folder):
            merge_results(run.folder, rows, benchmarks={name: {"asked": asked, "rows": scores["after"]["rows"]}})
    return {when: one["metrics"] | one["repetition"] for when, one in scores.items()}


def pose_request(name: str, data: str, template: str, limit: int | None) -> base.BenchmarkRequest:
    """The request to a suite that the options of `srmu eval` describe."""
    suite, part = benchmarks.find_benchmark(name)
    hub, first = suite.hub.format(part=part.capitalize()), name.partition("/")[0]
    fetch = f"hf download {hub} --repo-type dataset --local-dir {first}"
    get = suite.get or f"with a hub in reach, `{fetch}`, then give --data {first}"
    folder = Path(data) if data else None
    if not folder and not hub:
        raise SrmuError(f"--tasks {name} has no data set of its own; {get}")
    if folder and not folder.is_dir():
        raise SrmuError(f"--data {folder}: there is no such folder; {get}")
    if template and "{question}" not in template:
        raise SrmuError(f"--template {template!r} has no {{question}} in it")
    if limit is not None and limit < 1:
        raise SrmuError(f"--limit {limit} must be 1 or more")
    return base.BenchmarkRequest(hub, get, suite.revision, folder, limit, part, template)


def measure_benchmark(
    opened: OpenedModel, run: Run | None, name: str, request: base.BenchmarkRequest, prompts: Prompts, watch: Watch
) -> dict[str, Any]:
    """Metrics and values of a model as `run` leaves it, and `rows`, digests of those it read; kept in the cache.

    Also its `repetition` after `prompts`.
    """
    mark = fingerprint_state(weights.fingerprint_model(opened.base), opened.dtype, run)
    delta, request = dict(run.delta) if run else {}, replace(request, seen={})

    def measure() -> dict[str, Any]:
        with opened.after() if run else nullcontext(opened.module) as module:
            # only that there is one is looked at: nothing may take these for the original's
            subject = Subject(module, opened.tokenizer, delta, fixed="suites change no weights", watch=watch)
            scores = benchmarks.find_benchmark(name)[0].run(subject, request)
            repetition = measure_repetition(module, opened.tokenizer, prompts, mark, watch)
        return {"metrics": scores.metrics, "values": scores.values, "rows": request.seen, "repetition": repetition}

    # a data folder's name may stay while its files change; WMDP is asked with MMLU, which lies beside it
    folders = [request.folder, request.folder.with_name("mmlu")] if request.folder else []
    held = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    data = files.sha256(*(part for path in held for part in (path.name.encode(), path)))
    asked = [name, data, request.revision, request.template, request.limit, request.reference, prompts]
    code = [files.sha256(path) for path in sorted(Path(benchmarks.__file__).parent.glob("*.*"))]
    versions = [version(package) for package in ("transformers", "torch", "rouge-score", "lm-eval")]
    return dict(files.cached("suites", [mark, asked, code, versions], measure, together=True))


def title_models(scores: Mapping[str, T]) -> dict[str, T]:
    """Scores, or answers, by what a table calls the model that they are of."""
    titles = {"before": "original", "after": "unlearned" if "before" in scores else "model", "oracle": "oracle"}
    return {title: scores[when] for when, title in titles.items() if when in scores}


def score_table(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row a metric: of each model that has it, the value with its standard error."""

    def write(entry: Mapping[str, float]) -> str:
        return f"{entry['value']:.3f}" + (f" ± {entry['stderr']:.3f}" if "stderr" in entry else "")

    columns = title_models(scores).items()
    return [
        {"metric": name, **{title: write(of_it[name]) if name in of_it else "" for title, of_it in columns}}
        | {"n": f"{entry['n']:.0f}"}
        for name, entry in scores["after"].items()
    ]


def benchmark_table(suite: base.Benchmark, scores: Mapping[str, Metrics]) -> list[dict[str, str]]:
    """The table of a suite's paper: a row for each model; "" for what was left out."""
    return [
        {"": title} | {column.title: format_metric(column, metrics) for column in suite.columns}
        for title, metrics in title_models(scores).items()
    ]


def format_metric(column: base.TableColumn, metrics: base.Metrics) -> str:
    if column.metric not in metrics:
        return ""
    value = column.scale * metrics[column.metric]["value"]
    return f"{value:.1f}" if column.scale == 100 else f"{value:.3g}"
