"""Many runs at once, in as many processes as there are processors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srmu.engine.progress import Watch, ignore_progress, silence_libraries
from srmu.evals.score import score_model
from srmu.runs.config import load_config
from srmu.runs.run import unlearn


class RunJob(NamedTuple):
    """A config file with overrides, and the tasks to score instead of the config's own."""

    config: Path
    overrides: tuple[str, ...]
    tasks: tuple[str, ...] = ()


def run_one(job: RunJob) -> Path:
    """Unlearn and score one job; the folder of its run."""
    # Threads that wait for each other spin: one in each of several processes is faster.
    torch.set_num_threads(1)
    silence_libraries()
    run = unlearn(load_config(job.config, job.overrides))
    score_model(run, job.tasks)
    return run.folder


def count_cpus() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(
    jobs: Sequence[Any], watch: Watch = ignore_progress, function: Callable[[Any], Any] = run_one
) -> list[Any]:
    """Run the jobs in as many processes as there are processors; their folders in order."""
    workers = min(count_cpus(), len(jobs))
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        watch("unlearning and measuring", len(jobs)) as tick,
    ):
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                tick("")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]
