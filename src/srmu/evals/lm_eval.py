"""Scores on lm-eval tasks, built in or one's own, and the interval around an accuracy."""

import io
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from difflib import get_close_matches
from functools import cache, lru_cache, partial
from importlib.metadata import version
from itertools import groupby
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import yaml

from srmu.engine import distributed
from srmu.engine.cache import find_cached, keep_cached
from srmu.engine.files import sha256
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, dict[str, Any]]
Local = dict[str, tuple[dict[str, Any], list[Path]]]  # task -> its YAML, the files it asks from
FILE_FORMATS = ("json", "csv", "parquet", "text")  # dataset_path of a task kept in local files
SEED = 1234  # lm-eval's own, for few-shot examples and sampled answers


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    fingerprint: str | None = None,
    watch: Watch = ignore_progress,
) -> Results:
    """Score a model on lm-eval tasks, built in or described by YAML files under `tasks_dir`.

    Gives `{"wmdp_bio/acc": {"value", "stderr", "n"}}`, for a group also each of its tasks; what is
    not a finite number is left out. `limit` takes the first questions of each task. `fingerprint`
    stands for weights, config and tokenizer: with it results are kept in the cache folder until
    the task, its local questions or a library change (a hub dataset is taken not to change).
    Raises SrmuError for a task that is unknown, broken or out of reach.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise SrmuError(f"batch size {batch_size} and limit {limit} must be 1 or more")
    local = _local_tasks(tasks_dir)
    keys = {name: _key_of(name, local, limit, fingerprint) for name in tasks}
    found = {name: find_cached("evals", keys[name]) if fingerprint else None for name in tasks}
    found = distributed.agree_on(found)
    missing = [name for name in found if found[name] is None]
    if missing:
        with _harness(model, tokenizer, batch_size) as lm:
            # load all before running any: a wrong name shows before hours have passed
            loaded = {name: _load(name, local) for name in missing}
            for name in missing:
                found[name] = _score(lm, name, loaded.pop(name), limit, watch)
                if fingerprint and distributed.is_first():
                    keep_cached("evals", keys[name], found[name])
    return {key: entry for results in found.values() for key, entry in (results or {}).items()}


def load_questions(name: str, tasks_dir: Path | None) -> list[tuple[str, list[str], int, Any]]:
    """A multiple-choice task as it asks: prompt, options as they follow it, the right one, the row.

    SrmuError for a task that is unknown or of another kind.
    """
    found = []
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # bars
        loaded = _load(name, _local_tasks(tasks_dir))
    for task in loaded["tasks"].values():
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
            raise SrmuError(f"task {name!r} is not made of questions with options to choose from")
        task.set_fewshot_seed(SEED)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            task.build_all_requests()
        for _, asked in groupby(task.instances, key=lambda one: one.doc_id):
            # a metric may add requests without the prompt
            requests = [one for one in asked if one.args[0]]
            row = requests[0].doc
            gold = task.doc_to_target(row)
            options = task.doc_to_choice(row)
            number = options.index(gold) if gold in options else int(gold)
            found.append((requests[0].args[0], [one.args[1] for one in requests], number, row))
    return found


def accuracy_interval(accuracies: Sequence[float], n: int) -> tuple[float, float]:
    """95 % interval for an accuracy, given each seed's accuracy on the same `n` questions.

    Wilson's interval at the mean with `n` questions (seeds share them, so do not multiply them),
    each side widened in quadrature by 1.96 sd(seeds) / sqrt(seeds), and clipped to [0, 1].
    """
    import numpy as np
    from statsmodels.stats.proportion import proportion_confint

    mean, seeds = float(np.mean(accuracies)), len(accuracies)
    low, high = proportion_confint(mean * n, n, alpha=0.05, method="wilson")
    spread = 1.96 * np.std(accuracies, ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    low, high = mean - np.hypot(mean - low, spread), mean + np.hypot(high - mean, spread)
    return max(0.0, float(low)), min(1.0, float(high))


def _local_tasks(folder: Path | None) -> Local:
    """The tasks described under `folder`, their data files made absolute."""
    found: Local = {}
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        try:
            config = yaml.safe_load(path.read_bytes())  # refuses !function, which runs code
        except (ValueError, yaml.YAMLError) as error:
            raise SrmuError(f"task file {path}: {getattr(error, 'problem', error)}") from error
        if not isinstance(config, dict) or not isinstance(config.get("task"), str):
            continue  # another kind of file
        if config["task"] in found:
            raise SrmuError(f"task file {path}: another file has task {config['task']!r} too")
        is_local = config.get("dataset_path") in FILE_FORMATS
        files = (config.get("dataset_kwargs") or {}).get("data_files") if is_local else None
        splits = files if isinstance(files, dict) else {"train": files} if files else {}
        paths = {k: [path.parent.resolve() / v for v in _listed(vs)] for k, vs in splits.items()}
        if paths:
            config["dataset_kwargs"]["data_files"] = {k: [*map(str, v)] for k, v in paths.items()}
        found[config["task"]] = config, [path for part in paths.values() for path in part]
    return found


def _key_of(name: str, local: Local, limit: int | None, fingerprint: str | None) -> list[Any]:
    """Everything that decides a task's results."""
    config, files = local.get(name, ({}, []))
    text = json.dumps(config, sort_keys=True, default=str)
    for file in files:
        if not file.is_file():
            raise SrmuError(f"task {name!r}: its data file {file} does not exist")
        text = text.replace(json.dumps(str(file)), sha256(file))  # what it holds, not where it is
    versions = [version(package) for package in ("lm-eval", "transformers", "torch")]
    from srmu.engine import likelihoods

    modules = (likelihoods, sys.modules[__name__])
    versions += [sha256(Path(str(module.__file__))) for module in modules]
    return [fingerprint, name, text, limit, versions]


@contextmanager
def _harness(model: Any, tokenizer: Any, batch_size: int) -> Iterator[Any]:
    """lm-eval's view of a model: silent while it lasts, and everything as it was afterwards."""
    import numpy as np
    import torch
    from lm_eval.api.task import tqdm
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import env

    from srmu.engine.likelihoods import keeps_past, loglikelihoods

    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), logging.root.manager.disable
    bar = tqdm.__init__
    with (
        torch.random.fork_rng(range(torch.cuda.device_count())),
        warnings.catch_warnings(action="ignore"),
        redirect_stdout(io.StringIO()),
        patch.object(tqdm, "__init__", lambda *a, **k: bar(*a, **k | {"disable": True})),
        patch.dict(os.environ, DISABLE_MULTIPROC="1"),  # resampling would fork a pool
        patch.object(env, "from_string", cache(env.from_string)),  # else compiled at each question
        patch.object(model, "tie_weights", lambda: None),  # HFLM would undo an edit of a tied head
    ):
        try:
            logging.disable()
            random.seed(0)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            # a copy, because HFLM may give the tokenizer a padding token
            lm = HFLM(model, tokenizer=deepcopy(tokenizer), batch_size=batch_size)
            lm.tok_encode = lru_cache(64)(lm.tok_encode)  # a question comes with each option
            if keeps_past(model):  # else it is left to lm-eval
                lm._loglikelihood_tokens = partial(loglikelihoods, lm)
            yield lm
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            logging.disable(states[2])
            for module, mode in modes.items():
                module.training = mode


@cache
def _builtin() -> Any:
    """lm-eval's own tasks: reading their 14,000 files takes seconds, so once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(name: str, local: Local) -> Any:
    """Build a task or group with its questions."""
    from lm_eval.tasks import TaskManager

    if name not in local and name not in _builtin().task_index:
        close = get_close_matches(name, {*local, *_builtin().all_tasks})
        meant = f", did you mean {' or '.join(close)}?" if close else ";"
        where = f"the tasks folder ({', '.join(local) or 'none there'}) and in lm-eval's own"
        raise SrmuError(f"task {name!r} does not exist{meant} looked in {where} (lm-eval ls tasks)")
    try:
        if name not in local:
            return _builtin().load([name])
        config, files = local[name]
        with TemporaryDirectory() as scratch:  # the user's cache gains and lends nothing
            if files:
                config["dataset_kwargs"] |= {"cache_dir": scratch, "keep_in_memory": True}
            loaded = TaskManager(include_defaults=False).load([config])
        for task in loaded["tasks"].values():
            _check_answers(task)
    except Exception as error:  # whatever lm-eval or datasets cannot use is the user's to mend
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SrmuError(f"task {name!r} cannot be loaded: {why}") from error
    return loaded


def _check_answers(task: Any) -> None:
    """Refuse an answer that is none of the options: lm-eval would count the question as wrong."""
    for row, doc in enumerate(task.eval_docs if task.OUTPUT_TYPE == "multiple_choice" else (), 1):
        options = task.doc_to_choice(doc)
        for gold in _listed((task.doc_to_text if task.multiple_input else task.doc_to_target)(doc)):
            if gold not in options and gold not in range(len(options)):
                raise ValueError(f"question {row}: answer {gold!r} is none of {options}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def asked_how(task: Any) -> dict[str, Any]:
    """A task's version, and a digest of the template of its prompts, for the record."""
    names = ["doc_to_text", "doc_to_choice", "doc_to_target", "description"]
    names += ["target_delimiter", "num_fewshot", "fewshot_delimiter"]
    parts = {name: getattr(task.config, name, None) for name in names}
    # of a function its name: it has no text
    text = json.dumps(parts, sort_keys=True, default=lambda f: getattr(f, "__qualname__", str(f)))
    return {"version": task.VERSION, "prompt": sha256(text.encode())[:16]}


def _score(lm: Any, name: str, loaded: Any, limit: int | None, watch: Watch) -> Results:
    """Run a loaded task or group, and flatten what lm-eval reports."""
    from lm_eval.evaluator import evaluate as run

    def answer(kind: str, requests: list[Any]) -> list[Any]:
        # of several processes each answers some, neighbours together: they share their prompts
        each = max(1, -(-len(requests) // distributed.get_size()))
        parts = [requests[low : low + each] for low in range(0, len(requests), each)]
        with watch(name, len(requests) // distributed.get_size()) as tick:
            lm.cache_hook.add_partial = lambda *answered: tick("")

            def some(part: list[Any]) -> list[Any]:
                return list(getattr(type(lm), kind)(lm, part, disable_tqdm=True))

            answers = [one for part in distributed.share_work(parts, some) for one in part]
        scores = [one[0] if isinstance(one, tuple) else one for one in answers]
        if any(score != score for score in scores):
            raise SrmuError(f"task {name!r}: the model's output is not a number (NaN)")
        return answers

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, partial(answer, kind))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    # 1000 resamples serve only errors without a closed form; an accuracy's has one
    report = run(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
    flat: Results = {}
    asked = {task.config.task: asked_how(task) for task in loaded["tasks"].values()}
    for task, metrics in report["results"].items():
        for key in (key for key in metrics if "," in key and "_stderr," not in key):
            entry = {"value": metrics[key], "stderr": metrics.get(key.replace(",", "_stderr,", 1))}
            entry = {k: float(v) for k, v in entry.items() if isinstance(v, float) and isfinite(v)}
            if "value" in entry:
                how = {"n": metrics["sample_len"], **asked.get(task, {})}
                flat[f"{task}/{key.removesuffix(',none')}"] = entry | how
    if not flat:
        raise SrmuError(f"task {name!r} gives no finite number: does lm-eval know its metrics?")
    return flat
