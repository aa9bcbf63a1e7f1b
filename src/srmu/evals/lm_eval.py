"""Scores on lm-eval tasks, built in or one's own."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from itertools import groupby
from math import isfinite
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from srmu.engine import distributed, likelihoods
from srmu.engine.files import find_cached, keep_cached, sha256
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.local_tasks import Local, as_list, describe_local, find_parts, read_local_tasks, write_parts
from srmu.evals.results import Metrics, number_facts, write_answers
from srmu.evals.subject import Question

BATCH = 64  # inputs read at once
SEED = 1234  # lm-eval's own, for few-shot examples and sampled answers


@contextmanager
def silence_output() -> Iterator[None]:
    """Without what lm-eval and datasets print, and without their bars."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def evaluate(
    model: Any,  # a PreTrainedModel, and its tokenizer
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    fingerprint: str | None = None,
    watch: Watch = ignore_progress,
) -> Metrics:
    """Score a model on lm-eval tasks, built in or described by YAML files under `tasks_dir`.

    Gives `{"wmdp_bio/acc": {"value", "stderr", "n", "answers", ...}}`, for a group also each of its tasks. `limit`
    takes the first questions. With `fingerprint`, that of weights, config and tokenizer, results are kept in the cache
    folder until a task, its questions or a library change. SrmuError if a task is unknown, broken or out of reach.
    """
    if limit is not None and limit < 1:
        raise SrmuError(f"limit {limit}: expected 1 or more")
    local = read_local_tasks(tasks_dir)
    keys = {name: _cache_key(name, local, limit, fingerprint) for name in tasks}
    results = distributed.agree_on({name: find_cached("evals", keys[name]) if fingerprint else None for name in tasks})
    missing = [name for name in results if results[name] is None]
    if missing:
        from srmu.evals.harness import open_harness

        with open_harness(model, tokenizer, BATCH) as harness:
            # load all before running any: a wrong name shows before hours have passed
            with silence_output():
                loaded = {name: _load_task(name, local) for name in missing}
            for name in missing:
                results[name] = _score_task(harness, name, loaded.pop(name), limit, watch)
                if fingerprint and distributed.is_first():
                    keep_cached("evals", keys[name], results[name])
    return {key: entry for metrics in results.values() for key, entry in (metrics or {}).items()}


@silence_output()
def load_questions(name: str, tasks_dir: Path | None) -> tuple[Question, ...]:
    """The questions of a multiple-choice task; of several right options only the first is kept."""
    questions: list[Question] = []
    for task in _load_task(name, read_local_tasks(tasks_dir))["tasks"].values():
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
            raise SrmuError(f"task {name!r} is not made of questions with options to choose from")
        task.set_fewshot_seed(SEED)
        task.build_all_requests()
        for _, requests in groupby(task.instances, key=lambda one: one.doc_id):
            first, *others = requests
            row, names = first.doc, task.doc_to_choice(first.doc)
            golds = [names.index(gold) if gold in names else int(gold) for gold in as_list(task.doc_to_target(row))]
            kept = [i for i in range(len(names)) if i == golds[0] or i not in golds]
            # a metric may add requests, without the prompt, after those of the options
            options = tuple(one.args[1] for i, one in enumerate((first, *others)) if i in kept)
            fact = str(row.get("fact") or f"{name} {len(questions)}")
            about = str(row.get("subject") or "") if row.get("fact") else ""  # MMLU's subject is a school subject
            forms = tuple(row.get("paraphrases") or ())
            foreign = tuple(row.get("translations") or ())
            questions.append(Question(first.args[0], options, kept.index(golds[0]), fact, forms, foreign, about))
    return tuple(questions)


def _cache_key(name: str, local: Local, limit: int | None, fingerprint: str | None) -> list[Any]:
    """Everything that decides a task's results."""
    text = describe_local(name, local)
    own = (Path(__file__).with_name(f"{module}.py") for module in ("lm_eval", "local_tasks", "harness"))
    code = sha256(Path(likelihoods.__file__), *own)
    versions = [version(package) for package in ("lm-eval", "transformers", "torch")]
    return [fingerprint, name, text, limit, [*versions, code]]


@cache
def _builtin_tasks() -> Any:
    """lm-eval's own tasks, once a process: reading their 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_task(name: str, local: Local) -> Any:
    from lm_eval.tasks import TaskManager

    if name not in local and name not in _builtin_tasks().task_index:
        close = get_close_matches(name, {*local, *_builtin_tasks().all_tasks})
        meant = f", did you mean {' or '.join(close)}?" if close else ";"
        where = f"the tasks folder ({', '.join(local) or 'none there'}) and in lm-eval's own"
        raise SrmuError(
            f"task {name!r} does not exist{meant} looked in {where} (lm-eval ls tasks); tasks_dir names another"
        )
    try:
        if name not in local:
            return _builtin_tasks().load([name])
        with TemporaryDirectory() as scratch:
            members = {one for task in find_parts(name, local).values() for one in task.members}
            folder = write_parts(name, local, Path(scratch))
            loaded = TaskManager(include_path=str(folder), include_defaults=bool(members - {*local})).load([name])
        for task in loaded["tasks"].values():
            for row, doc in enumerate(task.eval_docs if task.OUTPUT_TYPE == "multiple_choice" else (), 1):
                # lm-eval would count such a question as wrong
                options = task.doc_to_choice(doc)
                for gold in as_list((task.doc_to_text if task.multiple_input else task.doc_to_target)(doc)):
                    if gold not in options and gold not in range(len(options)):
                        raise ValueError(f"question {row}: answer {gold!r} is none of {options}")
    except SrmuError:
        raise
    except Exception as error:  # whatever lm-eval or datasets cannot use is for the user to fix
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SrmuError(f"task {name!r} cannot be loaded: {why}") from error
    return loaded


def describe_task(task: Any) -> dict[str, Any]:
    """A task's version, and a digest of the template of its prompts, for the record."""
    names = ["doc_to_text", "doc_to_choice", "doc_to_target", "description"]
    names += ["target_delimiter", "num_fewshot", "fewshot_delimiter"]
    parts = {name: getattr(task.config, name, None) for name in names}
    # of a function its name: it has no text
    text = json.dumps(parts, sort_keys=True, default=lambda f: getattr(f, "__qualname__", str(f)))
    return {"version": task.VERSION, "prompt": sha256(text.encode())[:16]}


def _score_task(harness: Any, name: str, loaded: Any, limit: int | None, watch: Watch) -> Metrics:
    """Run a loaded task or group, and flatten what lm-eval reports."""
    from lm_eval.evaluator import evaluate as run

    harness.task, harness.watch, harness.screen = name, watch, sys.stderr
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    with silence_output():
        # 1000 resamples serve only errors without a closed form; an accuracy's has one
        report = run(lm=harness, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=True)
    flat: Metrics = {}
    asked = {task.config.task: describe_task(task) for task in loaded["tasks"].values()}
    for task, metrics in report["results"].items():
        for key in (key for key in metrics if "," in key and "_stderr," not in key):
            entry = {"value": metrics[key], "stderr": metrics.get(key.replace(",", "_stderr,", 1))}
            entry = {k: float(v) for k, v in entry.items() if isinstance(v, float) and isfinite(v)}
            if "value" in entry:
                how = {"n": metrics["sample_len"], **asked.get(task, {})}
                how |= read_answers(report["samples"].get(task, []), *key.split(",", 1))
                flat[f"{task}/{key.removesuffix(',none')}"] = entry | how
    if not flat:
        raise SrmuError(f"task {name!r} gives no finite number: does lm-eval know its metrics?")
    return flat


def read_answers(samples: Sequence[Any], metric: str, kind: str) -> dict[str, Any]:
    """A metric question by question, if it has numbers, and the facts asked for, where several share one."""
    asked = [one for one in samples if one["filter"] == kind and metric in one]
    right = [one[metric] for one in asked]
    if not right or not all(isinstance(value, Real) for value in right):
        return {}
    answers = {"answers": write_answers([float(value) for value in right])}
    rows = [one["doc"] if isinstance(one["doc"], dict) else {} for one in asked]
    facts = [row.get("fact") or f"question {i}" for i, row in enumerate(rows)]
    return answers | ({"facts": number_facts(facts)} if len({*facts}) < len(facts) else {})
